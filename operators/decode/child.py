"""The process in which foreign bytes are decoded: serves one call after another over a pipe, and never imports Ray.

Run as ``python -m operators.decode.child FD PARENT_PID LIMITS_JSON`` by `operators.decode.process`. For each call it
imports the named generator function, runs it, and sends each item on. The messages are::

    parent -> child   (function, arguments, first_timeout_seconds, next_timeout_seconds)
    child -> parent   ("started", None)  ("item", value)...  then one of  ("end", usage)  ("error", fields)
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from operators.decode.wire import PipeError, Receiver, Sender
from schemas.errors import DecodeError, RecordError

PR_SET_PDEATHSIG = 1


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

    A decoder that hangs in native code runs no Python, so a Python signal handler would not end it. The parent may be
    busy with the last item for long: then it is this alarm that ends a hang.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds)


def run_call(sender: Sender, call: tuple[str, dict[str, Any], float, float], limits: dict[str, Any]) -> None:
    """Run one call to its end and send what it yields; the alarm is set only while the decoder works."""
    name, arguments, first_timeout_seconds, next_timeout_seconds = call
    margin_seconds = limits["alarm_margin_seconds"]
    try:
        arm(limits["start_timeout_seconds"] + margin_seconds)
        function = load_function(name)
        arm(0)
        sender.send(("started", None))
        items = iter(function(**arguments))
        timeout_seconds = first_timeout_seconds
        while True:
            arm(timeout_seconds + margin_seconds)
            item = next(items, items)
            arm(0)
            if item is items:
                break
            sender.send(("item", item))
            # The frame would keep the last item alive while the next one is made.
            del item
            timeout_seconds = next_timeout_seconds
    except PipeError:
        raise
    except BaseException as error:
        arm(0)
        sender.send(("error", error_fields(error)))
        return
    sender.send(("end", memory_usage()))


def serve(connection: socket.socket, limits: dict[str, Any]) -> None:
    """Answer calls until the parent closes the connection."""
    sender, receiver = Sender(connection), Receiver(connection)
    while True:
        run_call(sender, receiver.receive(), limits)


def die_with_parent(parent_pid: int) -> None:
    """Let the kernel end this process when its parent ends, however either of them is stuck.

    The end of the connection alone is not enough: a process forked from the parent may hold a copy of it.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("the parent is gone")


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
    """Serve the connection whose descriptor is the first argument."""
    die_with_parent(int(sys.argv[2]))
    connection = socket.socket(fileno=int(sys.argv[1]))
    limits = json.loads(sys.argv[3])
    apply_limits(limits)
    try:
        serve(connection, limits)
    except PipeError:
        return


if __name__ == "__main__":
    main()
