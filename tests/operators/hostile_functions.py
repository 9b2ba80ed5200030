"""What a decoder may do to its process; called by name inside it."""

import ctypes
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from schemas.errors import FetchError


def count(stop: int) -> Iterator[int]:
    yield from range(stop)


def arrays(side_px: int) -> Iterator[dict[str, Any]]:
    for value in (1, 2):
        yield {"image": np.full((side_px, side_px, 3), value, np.uint8), "raw": b"x" * 10}


def endless(count: int) -> Iterator[bytes]:
    while True:
        yield b"x" * 1_000_000


def process_id() -> Iterator[int]:
    yield os.getpid()


def environment() -> Iterator[dict[str, str]]:
    yield dict(os.environ)


def imported_modules() -> Iterator[list[str]]:
    import sys

    yield list(sys.modules)


def segfault_after(count: int) -> Iterator[int]:
    yield from range(count)
    ctypes.string_at(0)


def hang_after(count: int) -> Iterator[int]:
    yield from range(count)
    time.sleep(3600)


def native_hang_after(count: int) -> Iterator[int]:
    """Hold the GIL for ever in native code."""
    yield from range(count)
    ctypes.PyDLL(None).sleep(3600)


def memory_bomb() -> Iterator[int]:
    held = []
    while True:
        held.append(bytearray(100_000_000))
        yield len(held)


def hold(byte_count: int) -> Iterator[int]:
    global kept
    kept = bytearray(byte_count)
    yield byte_count


def raise_value_error() -> Iterator[int]:
    yield 1
    raise ValueError("a message")


def raise_fetch_error() -> Iterator[int]:
    yield 1
    raise FetchError("gone", code="not_found", stage="fetch", retryable=True)


def exit_with_status() -> Iterator[int]:
    yield 1
    os._exit(7)


def print_much() -> Iterator[int]:
    os.write(1, b"noise on stdout")
    os.write(2, b"noise on stderr")
    yield 1


def unpicklable() -> Iterator[Any]:
    yield lambda: None
