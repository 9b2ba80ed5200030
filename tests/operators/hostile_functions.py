"""What a decoder may do to its process; called by name inside it."""

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from operators.decode.wire import HEADER
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


def fill_then_hang(byte_count: int) -> Iterator[int]:
    """Fill memory in one native call that never gives the interpreter back."""
    yield 0
    memory = mmap.mmap(-1, byte_count)
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 1, byte_count)
    ctypes.PyDLL(None).sleep(3600)


def pages(byte_count: int, count: int) -> Iterator[dict[str, Any]]:
    """Arrays with their own numbers in every byte, as a decoder sends pages."""
    for value in range(count):
        yield {"number": value, "image": np.full(byte_count, value, np.uint8)}


def logged_pages(byte_count: int, count: int, log: str) -> Iterator[dict[str, Any]]:
    """As `pages`, with the number of each written down before it is sent."""
    for page in pages(byte_count, count):
        with open(log, "a") as file:
            file.write(f"{page['number']}\n")
        yield page


def rows_of_arrays() -> Iterator[list[Any]]:
    """Several arrays in one item, of sizes that no alignment likes, and one that is not contiguous."""
    numbers = np.arange(900_000, dtype=np.float64)
    yield [np.full(300_001, 7, np.uint8), numbers, np.full(3, 9, np.uint8), numbers[::2], np.zeros(0, np.uint8)]


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


def half_a_message() -> Iterator[int]:
    """Announce a message of a million bytes and send three."""
    yield 1
    os.write(int(sys.argv[1]), HEADER.pack(1_000_000, 0, -1) + b"abc")
    time.sleep(3600)


def freed_memory() -> Iterator[Any]:
    """Send an array over memory that is no longer mapped."""
    page = mmap.mmap(-1, 1_000_000)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    array = np.ctypeslib.as_array((ctypes.c_uint8 * 1_000_000).from_address(address))
    ctypes.CDLL(None).munmap(ctypes.c_void_p(address), ctypes.c_size_t(1_000_000))
    yield array


def unpicklable() -> Iterator[Any]:
    yield lambda: None
