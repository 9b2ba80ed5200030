"""A run goes on in a child of the process that the user started, so that somebody is left to say how it ended.

Ray ends the process of a driver with status 1 and no word where the node on its machine has died, and a machine that is
out of memory ends it with SIGKILL. Only the standard library is loaded here: the fork comes before any thread.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from types import FrameType
from typing import Final, NoReturn

PR_SET_PDEATHSIG: Final = 1
FROM_THE_KERNEL: Final = 0x80
"""Code of a signal that a terminal sends: the child, which is in the same foreground group, has it too."""

ENDED_BY_RAY: Final = 1
"""No status of ours."""

INCOMPLETE: Final = 3
FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_SECONDS: Final = 1.0
"""A signal to the whole process group comes twice, the second time by way of the parent."""

NODE_GONE: Final = "stopped: Ray ended the run, because its node on this machine is gone; the same command resumes"
KILLED: Final = "stopped: the run was ended by {name}{cause}; the same command resumes"
OUT_OF_MEMORY: Final = ", as a machine that is out of memory does"


class InterruptOnce:
    """Raises `KeyboardInterrupt` for a signal, but not again for its echo."""

    def __init__(self) -> None:
        self._last = -ECHO_SECONDS

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take one signal."""
        now = time.monotonic()
        if now - self._last < ECHO_SECONDS:
            return
        self._last = now
        raise KeyboardInterrupt


def go_on_in_child() -> None:
    """Return in a child process; this one waits for it, hands signals on, and ends as it does, saying why."""
    blocked = {*FORWARDED, signal.SIGCHLD}
    # A caller may have had it ignored, and then there is nobody to wait for.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    parent = os.getpid()
    child = os.fork()
    if child:
        _end_as(_wait_for(child, blocked))
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(INCOMPLETE)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)


def _wait_for(child: int, signals: set[signal.Signals]) -> int:
    """Return the exit code of a child: its status, or the number of the signal that ended it, negative."""
    while True:
        found = signal.sigwaitinfo(signals)
        if found.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
        elif found.si_code != FROM_THE_KERNEL:
            os.kill(child, found.si_signo)


def _end_as(code: int) -> NoReturn:
    if code == ENDED_BY_RAY:
        _say(NODE_GONE)
        os._exit(INCOMPLETE)
    if code < 0:
        name = signal.Signals(-code).name
        _say(KILLED.format(name=name, cause=OUT_OF_MEMORY if name == "SIGKILL" else ""))
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
    os._exit(code)


def _say(message: str) -> None:
    sys.stderr.write(f"pagereel: {message}\n")
    sys.stderr.flush()
