"""The engine on CUDA; without pytest: `python -m tests.gpu.engine_on_cuda`, which also measures."""

import os

import pytest
import torch

from operators.minicpmv.tiny import write_tiny_model
from tests.gpu.engine_on_cuda import ANYWHERE_CHECKS, CUDA_CHECKS, MEMBERS

pytestmark = pytest.mark.needs_gpu


@pytest.fixture(scope="module", autouse=True)
def _cuda():
    if not torch.cuda.is_available():
        if os.environ.get("PAGEREEL_EXPECT_GPU") == "1":
            pytest.fail("PAGEREEL_EXPECT_GPU=1 and torch finds no CUDA device")
        pytest.skip("no CUDA device")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name in MEMBERS:
        made[name] = tmp_path_factory.mktemp(name)
        write_tiny_model(made[name], name)
    return made


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("check", ANYWHERE_CHECKS + CUDA_CHECKS, ids=lambda check: check.__name__)
def test_the_engine_on_cuda(folders, name, check):
    check(folders[name], torch.device("cuda"))
