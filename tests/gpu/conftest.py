"""Tests of this folder need a GPU."""

import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _cuda():
    if not torch.cuda.is_available():
        if os.environ.get("PAGEREEL_EXPECT_GPU") == "1":
            pytest.fail("PAGEREEL_EXPECT_GPU=1 and torch finds no CUDA device")
        pytest.skip("no CUDA device")
