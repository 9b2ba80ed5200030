"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The wider corpus of real and hostile files, with its MANIFEST.csv; goes with the marker `needs_corpus`."""
    folder = os.environ.get("PAGEREEL_CORPUS")
    if not folder:
        pytest.skip("PAGEREEL_CORPUS is not set")
    path = Path(folder)
    assert (path / "MANIFEST.csv").is_file(), f"PAGEREEL_CORPUS={folder} holds no MANIFEST.csv"
    return path
