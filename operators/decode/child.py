"""The process in which foreign bytes are decoded: serves one call after another over a pipe, and never imports Ray.

Run as ``python -m operators.decode.child FD LIMITS_JSON`` by `operators.decode.box`. For each call it imports the
named generator function, runs it, and sends each item on. The messages are::

    parent -> child   (function, arguments, first_timeout_seconds, next_timeout_seconds)
    child -> parent   ("started", None)  ("item", value)...  then one of  ("end", usage)  ("error", fields)
"""

import importlib
import json
import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from schemas.errors import DecodeError, RecordError

IDLE_CHECK_SECONDS = 30.0


class PipeError(Exception):
    """The pipe to the parent is of no more use."""


def send_message(connection: Connection, kind: str, value: Any) -> None:
    """Send one message; the memory of arrays inside `value` follows it uncopied.

    Raises:
        PipeError: part of the message may have gone out; nothing after it could be understood.
    """
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps((kind, value), protocol=5, buffer_callback=buffers.append)
    parts = [buffer.raw() for buffer in buffers]
    try:
        connection.send_bytes(pickle.dumps((data, len(parts))))
        for part in parts:
            connection.send_bytes(part)
    except OSError as error:
        raise PipeError(str(error)) from error


def receive_message(connection: Connection) -> tuple[str, Any]:
    """Return the next (kind, value); arrays inside are read-only views of the received bytes.

    Raises:
        EOFError, OSError: the other end is gone.
    """
    data, buffer_count = pickle.loads(connection.recv_bytes())
    buffers = [connection.recv_bytes() for _ in range(buffer_count)]
    kind, value = pickle.loads(data, buffers=buffers)
    return kind, value


def error_fields(error: BaseException) -> dict[str, Any]:
    """Return what `operators.decode.box` needs to raise `error` again; only a `RecordError` keeps its class."""
    if isinstance(error, RecordError):
        found = error
        fields = {"class_name": type(error).__name__, "traceback": None}
    elif isinstance(error, MemoryError):
        found = DecodeError("the memory limit of the decoder was reached", code="memory_limit")
        fields = {"class_name": "DecodeError", "traceback": None}
    else:
        found = DecodeError(f"{type(error).__name__}: {error}", code="internal")
        text = "".join(traceback.format_exception(error))[-8000:]
        fields = {"class_name": "DecodeError", "traceback": text}
    cause = found.__cause__ or error
    return fields | {
        "message": str(found),
        "code": found.code,
        "stage": found.stage,
        "exit_signal": found.exit_signal,
        "exception_type": found.exception_type or type(cause).__name__,
        "retryable": found.retryable,
    }


def memory_usage() -> dict[str, int]:
    """Return resident and highest resident bytes of this process."""
    with open("/proc/self/status") as lines:
        found = dict(line.split(":", 1) for line in lines if line.startswith(("VmRSS", "VmHWM")))
    return {
        "rss_bytes": int(found["VmRSS"].split()[0]) * 1024,
        "peak_rss_bytes": int(found["VmHWM"].split()[0]) * 1024,
    }


def load_function(name: str) -> Callable[..., Iterator[Any]]:
    """Return the generator function named `package.module:function`."""
    module_name, _, attribute = name.partition(":")
    function: Callable[..., Iterator[Any]] = getattr(importlib.import_module(module_name), attribute)
    return function


def arm(seconds: float) -> None:
    """Let the kernel end this process after `seconds`; 0 disarms.

    A decoder that hangs in native code runs no Python, so neither a Python signal handler nor a look at the pipe
    would end it when the parent has died.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds)


def run_call(connection: Connection, call: tuple[str, dict[str, Any], float, float], limits: dict[str, Any]) -> None:
    """Run one call to its end and send what it yields; the alarm is set only while the decoder works."""
    name, arguments, first_timeout_seconds, next_timeout_seconds = call
    margin_seconds = limits["alarm_margin_seconds"]
    try:
        arm(limits["start_timeout_seconds"] + margin_seconds)
        function = load_function(name)
        arm(0)
        send_message(connection, "started", None)
        items = iter(function(**arguments))
        timeout_seconds = first_timeout_seconds
        while True:
            arm(timeout_seconds + margin_seconds)
            item = next(items, items)
            arm(0)
            if item is items:
                break
            send_message(connection, "item", item)
            # The frame would keep the last item alive while the next one is made.
            del item
            timeout_seconds = next_timeout_seconds
    except PipeError:
        raise
    except BaseException as error:
        arm(0)
        send_message(connection, "error", error_fields(error))
        return
    send_message(connection, "end", memory_usage())


def serve(connection: Connection, limits: dict[str, Any]) -> None:
    """Answer calls until the parent closes the pipe or is gone."""
    parent = os.getppid()
    while True:
        # A process forked from the parent may hold a copy of its end of the pipe, so EOF alone is not enough.
        while not connection.poll(IDLE_CHECK_SECONDS):
            if os.getppid() != parent:
                return
        run_call(connection, pickle.loads(connection.recv_bytes()), limits)


def apply_limits(limits: dict[str, Any]) -> None:
    """Bound this process: address space, no core files, signals as a decoder needs them."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    address_space_bytes = limits["address_space_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes, address_space_bytes))
    # Ignored and blocked signals are inherited over exec, and an ignored alarm would never fire.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM, signal.SIGTERM})
    # An interrupt from the keyboard reaches the whole group; the parent decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> None:
    """Serve the pipe whose descriptor is the first argument."""
    connection = Connection(int(sys.argv[1]))
    limits = json.loads(sys.argv[2])
    apply_limits(limits)
    try:
        serve(connection, limits)
    except (EOFError, OSError, PipeError):
        return


if __name__ == "__main__":
    main()
