"""The engine on CUDA; without pytest: `python -m tests.gpu.engine_on_cuda`, which also measures."""

import pytest
import torch

from tests.gpu.checks import write_members
from tests.gpu.engine_on_cuda import ANYWHERE_CHECKS, CUDA_CHECKS, MEMBERS

pytestmark = pytest.mark.needs_gpu


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_members(tmp_path_factory.mktemp("members"), MEMBERS)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("check", ANYWHERE_CHECKS + CUDA_CHECKS, ids=lambda check: check.__name__)
def test_the_engine_on_cuda(folders, name, check):
    check(folders[name], torch.device("cuda"))
