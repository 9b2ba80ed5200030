"""Every member of the family on CUDA; without pytest: `python -m tests.gpu.family_on_cuda`, which also measures."""

import pytest

from operators.minicpmv.family import FAMILIES
from tests.gpu.checks import write_members
from tests.gpu.family_on_cuda import FAMILY_CHECKS, PATH_CHECKS

pytestmark = pytest.mark.needs_gpu


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_members(tmp_path_factory.mktemp("members"), FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("check", FAMILY_CHECKS, ids=lambda check: check.__name__)
def test_a_member_on_cuda(folders, name, check):
    check(folders[name], name)


@pytest.mark.parametrize(("check", "value"), PATH_CHECKS, ids=lambda part: getattr(part, "__name__", str(part)))
def test_the_variable_length_kernel_gives_the_numbers_of_padded_calls(check, value):
    check(value)
