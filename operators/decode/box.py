"""A decoder in a killable process: crashes, hangs and memory bombs of one input become one `DecodeError`."""

import contextlib
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

import schemas.errors
from operators.base import OperatorConfig
from operators.decode.child import receive_message
from schemas.errors import DecodeError, RecordError

KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "VIRTUAL_ENV", "LANG", "LC_ALL")
ENDED_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM)
CLOSE_SECONDS = 5.0
REST_OF_MESSAGE_SECONDS = 20


class BoxLimits(OperatorConfig):
    """Bounds on one decoder process."""

    address_space_bytes: Annotated[
        int, Field(ge=500_000_000, description="RLIMIT_AS of the process; its resident memory cannot exceed it.")
    ] = 3_000_000_000
    recycle_rss_bytes: Annotated[
        int, Field(gt=0, description="A process that holds more than this after a call is replaced.")
    ] = 1_000_000_000
    recycle_call_count: Annotated[int, Field(ge=1, description="Calls after which the process is replaced.")] = 500
    start_timeout_seconds: Annotated[
        float, Field(gt=0, description="Time for the process to start and import its decoder; not counted to a file.")
    ] = 120.0
    alarm_margin_seconds: Annotated[
        float, Field(gt=0, description="How long after a timeout the process ends itself if its parent is gone.")
    ] = 5.0


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    connection: Connection
    call_count: int = 0
    rss_bytes: int = 0


class DecoderBox:
    """Owns one long-lived decoder process, started when first needed and replaced after it dies.

    Not thread-safe: one call at a time. The process ends when the box is closed or collected, or its parent is gone.

    Attributes:
        peak_rss_bytes: highest resident memory that any finished call of this box has reported.
        start_count: processes started so far.
    """

    def __init__(self, limits: BoxLimits | None = None) -> None:
        self.limits = limits or BoxLimits()
        self.peak_rss_bytes = 0
        self.start_count = 0
        self._child: _Child | None = None
        self._streaming = False

    def stream(
        self, function: str, arguments: dict[str, Any], *, first_timeout_seconds: float, next_timeout_seconds: float
    ) -> Iterator[Any]:
        """Call a generator function in the process and yield its items one by one.

        A generator that is closed before its end costs the process.

        Args:
            function: "package.module:function", importable in a fresh interpreter.
            arguments: keyword arguments; anything pickle can hold.
            first_timeout_seconds: time to the first item; importing the module does not count.
            next_timeout_seconds: time to each further item, and from the last one to the end.

        Raises:
            RecordError: raised by the function, with its class, code and stage.
            DecodeError: `crash` (with `exit_signal`) when the process died, `time_limit` when an item did not come
                in time, `memory_limit` when it ran out of address space, `internal` for any other exception, with
                the traceback as its note.
        """
        if self._streaming:
            self._kill()
        self._streaming = True
        finished = False
        try:
            child, kind, value = self._begin((function, arguments, first_timeout_seconds, next_timeout_seconds))
            timeout_seconds = first_timeout_seconds
            while kind in ("started", "item"):
                if kind == "item":
                    yield value
                    del value
                    timeout_seconds = next_timeout_seconds
                kind, value = self._receive(child, timeout_seconds, function)
            finished = kind == "end" or value["code"] != "memory_limit"
        finally:
            self._streaming = False
            if not finished:
                self._kill()
        if kind == "error":
            raise remade_error(value)
        self._note_usage(child, value)

    def call(self, function: str, arguments: dict[str, Any], *, timeout_seconds: float) -> Any:
        """Return the only item of a generator function; raises as `stream` does."""
        [item] = self.stream(
            function, arguments, first_timeout_seconds=timeout_seconds, next_timeout_seconds=timeout_seconds
        )
        return item

    def close(self) -> None:
        """End the process: by closing its pipe, and by force if it does not go."""
        child, self._child = self._child, None
        if child is None:
            return
        child.connection.close()
        try:
            child.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()

    def _begin(self, call: tuple[Any, ...]) -> tuple[_Child, str, Any]:
        """Return the process that has begun `call`, and its first message.

        A process may have died while it was idle, and show it only now: that costs a new process, not the call.
        """
        while True:
            child = self._ready_child()
            was_idle = child.call_count > 0
            self._send(child, call)
            try:
                return child, *self._receive(child, self.limits.start_timeout_seconds, call[0])
            except DecodeError as error:
                self._kill()
                if not was_idle or error.code == "time_limit":
                    raise

    def _ready_child(self) -> _Child:
        child = self._child
        if child is not None and child.process.poll() is not None:
            self._kill()
        if self._child is None:
            self._child = start_child(self.limits)
            self.start_count += 1
        return self._child

    def _send(self, child: _Child, call: tuple[Any, ...]) -> None:
        # A child that died just now is noticed by the receive that follows.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            child.connection.send_bytes(pickle.dumps(call, protocol=5))

    def _receive(self, child: _Child, timeout_seconds: float, function: str) -> tuple[str, Any]:
        try:
            if child.connection.poll(timeout_seconds):
                return receive_message(child.connection)
        except (EOFError, OSError):
            raise self._death(child, function) from None
        child.process.kill()
        raise DecodeError(f"{function}: no answer within {timeout_seconds:g} s", code="time_limit")

    def _death(self, child: _Child, function: str) -> DecodeError:
        try:
            status = child.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return DecodeError(f"{function}: the decoder closed its pipe", code="crash")
        if status == -signal.SIGALRM:
            return DecodeError(f"{function}: the decoder ended itself after its time limit", code="time_limit")
        if status >= 0:
            return DecodeError(f"{function}: the decoder ended with status {status}", code="crash")
        name = signal.Signals(-status).name
        retryable = -status in ENDED_FROM_OUTSIDE
        return DecodeError(
            f"{function}: the decoder was ended by {name}", code="crash", exit_signal=-status, retryable=retryable
        )

    def _note_usage(self, child: _Child, usage: dict[str, int]) -> None:
        child.call_count += 1
        self.peak_rss_bytes = max(self.peak_rss_bytes, usage["peak_rss_bytes"])
        worn = child.call_count >= self.limits.recycle_call_count
        if worn or usage["rss_bytes"] > self.limits.recycle_rss_bytes:
            self.close()

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.process.kill()
            child.process.wait()
            child.connection.close()


def start_child(limits: BoxLimits) -> _Child:
    """Start a decoder process.

    Not a fork and not `multiprocessing`'s spawn: the parent may be a Ray worker, whose threads a fork would break and
    whose main module a spawned child would import.
    """
    parent_end, child_end = Pipe()
    bound_reads(parent_end)
    with child_end:
        process = subprocess.Popen(
            [sys.executable, "-m", "operators.decode.child", str(child_end.fileno()), limits.model_dump_json()],
            stdin=subprocess.DEVNULL,
            # MuPDF and FFmpeg write their complaints about hostile files to these.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[child_end.fileno()],
            env=child_environment(),
        )
    return _Child(process, parent_end)


def bound_reads(connection: Connection) -> None:
    """Make a read fail that waits too long for the rest of a message: a child may stop, or be stopped, within one."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", REST_OF_MESSAGE_SECONDS, 0))


def child_environment() -> dict[str, str]:
    """Return the variables that a decoder gets: none that could hold a secret."""
    root = str(Path(__file__).resolve().parents[2])
    kept = {name: value for name, value in os.environ.items() if name in KEPT_VARIABLES or name.startswith("PYTHON")}
    return kept | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        # One process a worker is the unit of parallelism; idle threads would only take address space.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }


def remade_error(fields: dict[str, Any]) -> RecordError:
    """Return the error that the decoder process described, in the class it had there."""
    kind: type[RecordError] = getattr(schemas.errors, fields["class_name"])
    error = kind(
        fields["message"],
        code=fields["code"],
        stage=fields["stage"],
        exit_signal=fields["exit_signal"],
        exception_type=fields["exception_type"],
        retryable=fields["retryable"],
    )
    if fields["traceback"]:
        error.add_note(fields["traceback"])
    return error
