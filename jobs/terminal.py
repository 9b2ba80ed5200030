"""The terminal belongs to pagereel: what native libraries and Ray's processes say goes to a log file."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from schemas.errors import ConfigError


@contextlib.contextmanager
def own_terminal() -> Iterator[tuple[TextIO, TextIO, Path]]:
    """Redirect file descriptors 1 and 2 to a log file; yield streams to the real output and error, and the log's path.

    Ray's core worker and raylet write to the descriptors directly, whatever Python's logging is told. The log is
    removed at the end unless an exception passes that it may explain.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    handle, name = tempfile.mkstemp(prefix="pagereel-", suffix=".log")
    path = Path(name)
    streams = [os.fdopen(os.dup(number), "w", buffering=1, encoding="utf-8", errors="replace") for number in (1, 2)]
    for number in (1, 2):
        os.dup2(handle, number)
    os.close(handle)
    keep = True
    try:
        yield streams[0], streams[1], path
        keep = False
    except (ConfigError, KeyboardInterrupt):
        keep = False
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, stream in zip((1, 2), streams, strict=True):
            stream.flush()
            os.dup2(stream.fileno(), number)
            stream.close()
        if not keep:
            path.unlink(missing_ok=True)


def printable(text: str) -> str:
    """Return `text` with its control characters written as escapes: file names and answers may hold any."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
