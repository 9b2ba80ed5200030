"""The terminal belongs to pagereel: what native libraries and Ray's processes say goes to a log file.

Nothing that a file name, a page or a model says can steer it.
"""

import contextlib
import logging
import os
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from schemas.errors import ConfigError

STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Categories of characters that move the cursor, colour, end a line, turn the direction of writing, or stand for no
character at all."""
HARMLESS = "\u200c\u200d\u200e\u200f\u00ad"
"""Of those, what words of some languages are spelled with: joiners, direction marks, soft hyphens."""


def visible(text: str) -> str:
    """Return `text` as one line that no terminal obeys: what would steer one is written as its code."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if unicodedata.category(c) not in STEERING or c in HARMLESS else c.encode("unicode_escape").decode()
        for c in text
    )


def visible_lines(text: str) -> str:
    """Return `text` with each of its lines made visible."""
    return "\n".join(visible(line) for line in text.split("\n"))


class VisibleFormatter(logging.Formatter):
    """Writes one line a record, whatever its values hold, and the lines of a traceback below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line of a record."""
        record.message = visible(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Return the traceback of a record."""
        return visible_lines(super().formatException(ei))


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
