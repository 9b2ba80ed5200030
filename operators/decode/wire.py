"""Messages between a decoder process and its parent: pickled values, with large arrays in shared memory.

A message is a header, a pickle and, when its arrays are large, memory that holds them. The memory has no name and lies
in no file system of a fixed size: it is gone when the last side that maps it lets go. The sender keeps a few slots of
it and writes into one again when the receiver has let go of what was there, because new memory costs more than the
writing: 4.4 ms against 1.1 ms for a page of 11 MB (measured), of which decoding takes 20 to 70. The receiver says when
it has taken such a message, and the sender goes on only then: without that it would run ahead of a slow receiver by as
many pages as the socket has room for messages.
"""

import contextlib
import fcntl
import mmap
import os
import pickle
import socket
import struct
import weakref
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

SHARED_BYTES: Final = 256 * 1024
"""From here on arrays travel in shared memory."""

SLOT_BYTES: Final = 32 * 1024 * 1024
"""The largest rendered page has 18 MB. Only what was once written of a slot takes memory."""

SLOT_COUNT: Final = 4
"""Arrays that the receiver may hold at once before others get memory of their own, which is not used again."""

HEADER: Final = struct.Struct("!QQi")
TAKEN: Final = b"t"
NO_SLOT: Final = -1
FLAG_BYTES: Final = mmap.PAGESIZE
"""In front of the arrays; its first byte is 1 while the receiver holds any of them."""
FREE, HELD = b"\0", b"\1"
ALIGNMENT_BYTES: Final = 64
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class PipeError(Exception):
    """The connection is of no more use: the other side is gone, or has stopped within a message."""


class Sender:
    """Sends values over one connection, with large arrays in shared memory; the other side has a `Receiver`.

    Args:
        end: a connected socket.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._slots: list[int] = []
        self._is_taken = True

    def send(self, value: Any) -> None:
        """Send one value.

        Raises:
            PipeError: part of the message may have gone out; nothing after it could be understood.
            Exception: whatever pickle raises on a value that it cannot hold; nothing has gone out.
        """
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        parts = [buffer.raw() for buffer in buffers]
        sizes = [part.nbytes for part in parts]
        try:
            if not self._is_taken:
                receive_exactly(self._end, len(TAKEN))
                self._is_taken = True
            if sum(sizes) < SHARED_BYTES:
                send_inline(self._end, data, parts)
                return
            body = pickle.dumps((data, sizes))
            self._send_shared(len(body), parts, laid_out(sizes)[-1])
            self._end.sendall(body)
            self._is_taken = False
        except (OSError, EOFError) as error:
            raise PipeError(str(error)) from error

    def _send_shared(self, body_bytes: int, parts: list[memoryview], shared_bytes: int) -> None:
        slot = self._free_slot() if shared_bytes <= SLOT_BYTES else NO_SLOT
        is_new = slot == NO_SLOT or slot == len(self._slots)
        memory = new_memory(SLOT_BYTES if slot != NO_SLOT else shared_bytes) if is_new else self._slots[slot]
        if slot != NO_SLOT and is_new:
            self._slots.append(memory)
        try:
            write_parts(memory, parts)
            os.pwrite(memory, HELD, 0)
            socket.send_fds(self._end, [HEADER.pack(body_bytes, shared_bytes, slot)], [memory] if is_new else [])
        finally:
            if slot == NO_SLOT:
                os.close(memory)

    def _free_slot(self) -> int:
        """Return the number of a slot that may be written, one more than there are for a new one, or `NO_SLOT`."""
        for slot, memory in enumerate(self._slots):
            if os.pread(memory, 1, 0) == FREE:
                return slot
        return len(self._slots) if len(self._slots) < SLOT_COUNT else NO_SLOT


class Receiver:
    """Receives values over one connection.

    Args:
        end: a connected socket; its timeout is how long the rest of a begun message may take.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._slots: dict[int, mmap.mmap] = {}

    def receive(self) -> Any:
        """Return the next value; large arrays inside are read-only views of shared memory, held while they are.

        Raises:
            PipeError: the other end is gone, or stopped within the message.
        """
        try:
            head, descriptors, _, _ = socket.recv_fds(self._end, HEADER.size, 1)
            try:
                head += receive_exactly(self._end, HEADER.size - len(head))
                body_bytes, shared_bytes, slot = HEADER.unpack(head)
                body = receive_exactly(self._end, body_bytes)
                memory = self._memory(descriptors, shared_bytes, slot) if shared_bytes else None
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
        except (OSError, EOFError, ValueError) as error:
            raise PipeError(str(error)) from error
        data, buffers = pickle.loads(body)
        if memory is not None:
            # A sender that is gone has its last message read all the same.
            with contextlib.suppress(OSError):
                self._end.sendall(TAKEN)
            starts = laid_out(buffers)
            buffers = [memory[start : start + size] for start, size in zip(starts, buffers, strict=False)]
        return pickle.loads(data, buffers=buffers)

    def _memory(self, descriptors: list[int], shared_bytes: int, slot: int) -> memoryview:
        mapped = map_memory(descriptors[0], shared_bytes) if descriptors else self._slots.get(slot)
        if mapped is None:
            raise ValueError("a message without the memory that it announces")
        if slot != NO_SLOT:
            self._slots[slot] = mapped
        return lend(mapped, shared_bytes)


def send_value(end: socket.socket, value: Any) -> None:
    """Send one value that holds no large arrays.

    Raises:
        PipeError: the other end is gone.
    """
    try:
        send_inline(end, pickle.dumps(value, protocol=5), [])
    except OSError as error:
        raise PipeError(str(error)) from error


def send_inline(end: socket.socket, data: bytes, parts: list[memoryview]) -> None:
    """Send a pickle and its arrays over the socket."""
    body = pickle.dumps((data, [bytes(part) for part in parts]))
    end.sendall(HEADER.pack(len(body), 0, NO_SLOT) + body)


@dataclass
class _Flag:
    """Tells the sender that its memory is free again."""

    mapped: mmap.mmap

    def free(self) -> None:
        self.mapped[:1] = FREE


def lend(mapped: mmap.mmap, byte_count: int) -> memoryview:
    """Return the arrays' part of `mapped`, read-only; when nothing refers to it any more, the memory is free again."""
    # A view of an array refers to what the array itself is a view of; a view of its memoryview refers to the array.
    loan = np.frombuffer(mapped, np.uint8, byte_count, FLAG_BYTES)
    loan.flags.writeable = False
    weakref.finalize(loan, _Flag(mapped).free).atexit = False
    return loan.data


def new_memory(byte_count: int) -> int:
    """Return the descriptor of anonymous memory for arrays of `byte_count` bytes, of a size that stays."""
    memory = os.memfd_create("pagereel-arrays", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, FLAG_BYTES + byte_count)
    # The parent maps what it is given: memory that shrank under it would end the parent.
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEALS)
    return memory


def write_parts(memory: int, parts: list[memoryview]) -> None:
    """Write arrays where `laid_out` says."""
    for start, part in zip(laid_out([part.nbytes for part in parts]), parts, strict=False):
        written = 0
        while written < part.nbytes:
            written += os.pwrite(memory, part[written:], FLAG_BYTES + start + written)


def map_memory(descriptor: int, shared_bytes: int) -> mmap.mmap:
    """Return the memory behind a descriptor.

    Raises:
        ValueError: it may shrink, or is smaller than announced.
    """
    size = os.fstat(descriptor).st_size
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) != SEALS or size < FLAG_BYTES + shared_bytes:
        raise ValueError("shared memory that is not as announced")
    return mmap.mmap(descriptor, size)


def laid_out(sizes: list[int]) -> list[int]:
    """Return where each array starts in shared memory, and where the last one ends."""
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    return starts


def receive_exactly(end: socket.socket, byte_count: int) -> bytes:
    """Return the next `byte_count` bytes.

    Raises:
        EOFError: the other end is gone.
    """
    found = bytearray(byte_count)
    rest = memoryview(found)
    while rest:
        count = end.recv_into(rest)
        if not count:
            raise EOFError("the other end closed the connection")
        rest = rest[count:]
    return bytes(found)
