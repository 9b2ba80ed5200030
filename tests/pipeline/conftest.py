"""What tests of the pipeline share."""

import uuid
from collections.abc import Iterator

import fsspec
import pytest


@pytest.fixture
def root() -> Iterator[str]:
    """Memory: thousands of writes, none of which needs a disk; the protocol is the same on every store."""
    uri = f"memory://{uuid.uuid4().hex}"
    yield uri
    filesystem, path = fsspec.core.url_to_fs(uri)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)
