"""The terminal belongs to pagereel: what native libraries and Ray's processes say goes to a log file."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def own_terminal() -> Iterator[tuple[TextIO, Path]]:
    """Redirect file descriptor 2 to a log file; yield a stream to the real standard error, and the log's path.

    Ray's core worker and raylet write to the descriptor directly, whatever Python's logging is told.
    The log is removed at the end unless an exception passes, or something was written that a person should see.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    handle, name = tempfile.mkstemp(prefix="pagereel-", suffix=".log")
    path = Path(name)
    os.dup2(handle, 2)
    os.close(handle)
    failed = True
    terminal = os.fdopen(saved, "w", buffering=1, encoding="utf-8", errors="replace")
    try:
        yield terminal, path
        failed = False
    finally:
        sys.stderr.flush()
        os.dup2(terminal.fileno(), 2)
        terminal.flush()
        if not failed:
            path.unlink(missing_ok=True)
