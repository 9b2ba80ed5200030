"""A decoder in a killable process: crashes, hangs and memory bombs of one input become one `DecodeError`."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any, Final

import schemas.errors
from operators.decode.process import CLOSE_SECONDS, BoxLimits, DecoderProcess, signal_name
from operators.decode.wire import PipeError
from schemas.errors import DecodeError, RecordError, WorkerLostError

ENDED_FROM_OUTSIDE: Final = (signal.SIGKILL, signal.SIGTERM)


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
        self._child: DecoderProcess | None = None
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
                in time, `memory_limit` when it held too much or ran out of address space, `internal` for any other
                exception, with the traceback as its note.
            WorkerLostError: this machine could not start a process.
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

    @property
    def process_id(self) -> int | None:
        """Number of the process on this machine; None when there is none."""
        return self._child.process_id if self._child else None

    def close(self) -> None:
        """End the process: by closing its connection, and by force if it does not go."""
        child, self._child = self._child, None
        if child is not None:
            child.close()

    def _begin(self, call: tuple[Any, ...]) -> tuple[DecoderProcess, str, Any]:
        """Return the process that has begun `call`, and its first message.

        A process may have died while it was idle, and show it only now: that costs a new process, not the call.
        """
        while True:
            child = self._ready_child()
            was_idle = child.call_count > 0
            # A process that died just now is noticed by the receive that follows.
            with contextlib.suppress(PipeError):
                child.send(call)
            try:
                return child, *self._receive(child, self.limits.start_timeout_seconds, call[0])
            except DecodeError as error:
                self._kill()
                if not was_idle or error.code == "time_limit":
                    raise

    def _ready_child(self) -> DecoderProcess:
        if self._child is not None and not self._child.is_running():
            self._kill()
        if self._child is None:
            try:
                self._child = DecoderProcess(self.limits)
            except OSError as error:
                raise WorkerLostError(f"no decoder process can be started: {error}") from error
            self.start_count += 1
        return self._child

    def _receive(self, child: DecoderProcess, timeout_seconds: float, function: str) -> tuple[str, Any]:
        if not child.is_ready(timeout_seconds):
            child.kill("time_limit")
            raise DecodeError(
                f"{function}: no answer within {timeout_seconds:g} s", code="time_limit", exit_signal=signal.SIGKILL
            )
        try:
            kind, value = child.receive()
        except PipeError:
            raise death_of(child, function, self.limits) from None
        return kind, value

    def _note_usage(self, child: DecoderProcess, usage: dict[str, int]) -> None:
        child.call_count += 1
        self.peak_rss_bytes = max(self.peak_rss_bytes, usage["peak_rss_bytes"])
        worn = child.call_count >= self.limits.recycle_call_count
        if worn or usage["rss_bytes"] > self.limits.recycle_rss_bytes:
            self.close()

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill("abandoned")


def death_of(child: DecoderProcess, function: str, limits: BoxLimits) -> DecodeError:
    """Return the error of the call during which a process closed its connection."""
    status = child.end_status(CLOSE_SECONDS)
    if status is None:
        return DecodeError(f"{function}: the decoder closed its connection", code="crash")
    if status >= 0:
        return DecodeError(f"{function}: the decoder ended with status {status}", code="crash")
    number, held = -status, f"{child.last_rss_bytes / 1e6:.0f} MB"
    if child.killed_for == "memory_limit":
        message = f"{function}: the decoder held {held}, it may hold {limits.resident_bytes / 1e6:.0f} MB"
        return DecodeError(message, code="memory_limit", exit_signal=number)
    if number == signal.SIGALRM:
        message = f"{function}: the decoder ended itself after its time limit"
        return DecodeError(message, code="time_limit", exit_signal=number)
    message = f"{function}: the decoder was ended by {signal_name(number)}"
    if number in ENDED_FROM_OUTSIDE:
        message += f" from outside while it held {held}"
        if child.oom_kills > 0:
            message += "; meanwhile the kernel ended processes for want of memory"
    return DecodeError(message, code="crash", exit_signal=number, retryable=number in ENDED_FROM_OUTSIDE)


def was_ended_from_outside(error: RecordError) -> bool:
    """Return whether a decoder was ended by someone else: the kernel, an operator, a node that goes down.

    That says nothing about what it decoded, which deserves another process.
    """
    return error.code == "crash" and error.exit_signal in ENDED_FROM_OUTSIDE


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
