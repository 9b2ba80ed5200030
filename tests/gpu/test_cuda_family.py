"""Every member of the family on CUDA; without pytest: `python -m tests.gpu.family_on_cuda`, which also measures."""

import os

import pytest
import torch

from operators.minicpmv.family import FAMILIES
from operators.minicpmv.tiny import write_tiny_model
from tests.gpu.family_on_cuda import FAMILY_CHECKS, PATH_CHECKS

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
    for name in FAMILIES:
        made[name] = tmp_path_factory.mktemp(name)
        write_tiny_model(made[name], name)
    return made


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("check", FAMILY_CHECKS, ids=lambda check: check.__name__)
def test_a_member_on_cuda(folders, name, check):
    check(folders[name], name)


@pytest.mark.parametrize(("check", "value"), PATH_CHECKS, ids=lambda part: getattr(part, "__name__", str(part)))
def test_the_variable_length_kernel_gives_the_numbers_of_padded_calls(check, value):
    check(value)
