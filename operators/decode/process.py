"""A decoder process and the thread that starts it, watches its memory and collects it when it has ended."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from operators.base import OperatorConfig
from operators.decode.wire import Receiver, send_value

KEPT_VARIABLES: Final = ("PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "VIRTUAL_ENV", "LANG", "LC_ALL")
WATCH_SECONDS: Final = 0.05
"""A process takes new memory at 2 to 4 GB a second, so that it is found within 200 MB of its limit."""

CLOSE_SECONDS: Final = 5.0
REST_OF_MESSAGE_SECONDS: Final = 20.0
"""A process may stop, or be stopped, within a message."""

KillReason = Literal["memory_limit", "time_limit", "abandoned"]


class BoxLimits(OperatorConfig):
    """Bounds on one decoder process."""

    address_space_bytes: Annotated[
        int, Field(ge=500_000_000, description="RLIMIT_AS of the process: an allocation beyond it fails at once.")
    ] = 3_000_000_000
    resident_bytes: Annotated[
        int, Field(ge=100_000_000, description="A process that holds more, at any time, is ended as memory_limit.")
    ] = 2_000_000_000
    recycle_rss_bytes: Annotated[
        int, Field(gt=0, description="A process that holds more than this after a call is replaced.")
    ] = 1_000_000_000
    recycle_call_count: Annotated[int, Field(ge=1, description="Calls after which the process is replaced.")] = 500
    start_timeout_seconds: Annotated[
        float, Field(gt=0, description="Time for the process to start and import its decoder; not counted to a file.")
    ] = 120.0
    alarm_margin_seconds: Annotated[
        float, Field(gt=0, description="How long after a timeout the process ends itself if its parent does not.")
    ] = 5.0


class DecoderProcess:
    """One decoder process; it ends when this object is closed or collected, or its parent is gone.

    Attributes:
        call_count: calls that it has served to their end.
    """

    def __init__(self, limits: BoxLimits) -> None:
        """Start the process.

        Raises:
            OSError: the machine has no process, memory or descriptor left for it.
        """
        self.call_count = 0
        self._end, other = socket.socketpair()
        self._end.settimeout(REST_OF_MESSAGE_SECONDS)
        with other:
            self._life = _Life(other.fileno(), limits)
            self._life.started.wait()
        self._receiver = Receiver(self._end)
        if self._life.failure is not None:
            self._end.close()
            raise self._life.failure

    def send(self, value: Any) -> None:
        """Send a call.

        Raises:
            PipeError: the process is gone.
        """
        send_value(self._end, value)

    def is_ready(self, timeout_seconds: float) -> bool:
        """Return whether a message, or the end of the process, comes within a time."""
        poll = select.poll()
        poll.register(self._end, select.POLLIN)
        return bool(poll.poll(timeout_seconds * 1000))

    def receive(self) -> Any:
        """Return the next message.

        Raises:
            PipeError: the process is gone, or stopped within the message.
        """
        return self._receiver.receive()

    def is_running(self) -> bool:
        """Return whether the process has not ended."""
        return self._life.process.poll() is None

    def end_status(self, timeout_seconds: float) -> int | None:
        """Return the status with which the process has ended, as `Popen.returncode`; None if it has not."""
        try:
            return self._life.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self, reason: KillReason) -> None:
        """End the process by force, and collect it."""
        self._life.kill(reason)
        self._life.process.wait()
        self._end.close()

    def close(self) -> None:
        """End the process: by closing its connection, and by force if it does not go."""
        self._end.close()
        if self.end_status(CLOSE_SECONDS) is None:
            self.kill("abandoned")

    @property
    def process_id(self) -> int:
        """Its number on this machine."""
        return self._life.process.pid

    @property
    def killed_for(self) -> KillReason | None:
        """Why this side has ended the process; None if it did not."""
        return self._life.killed_for

    @property
    def last_rss_bytes(self) -> int:
        """Resident memory at the last look."""
        return self._life.last_rss_bytes

    @property
    def oom_kills(self) -> int:
        """Processes of this machine that the kernel has ended for want of memory while this one lived."""
        return oom_kill_count() - self._life.oom_kills_before


class _Life(threading.Thread):
    """Starts the process and stays until it has ended.

    The kernel ends a process when the *thread* that started it ends, so it is this one that starts it, and not a
    thread of whoever needs pages. The connection is not held here: a box that is collected must close it.
    """

    def __init__(self, descriptor: int, limits: BoxLimits) -> None:
        super().__init__(name="decoder-process", daemon=True)
        self.process: subprocess.Popen[bytes]
        self.started = threading.Event()
        self.failure: OSError | None = None
        self.killed_for: KillReason | None = None
        self.last_rss_bytes = 0
        self.oom_kills_before = oom_kill_count()
        self._descriptor = descriptor
        self._limits = limits
        self._lock = threading.Lock()
        self.start()

    def run(self) -> None:
        """Start the process and watch it to its end."""
        try:
            self.process = start_process(self._descriptor, self._limits)
        except OSError as error:
            self.failure = error
            return
        finally:
            self.started.set()
        while self.process.poll() is None:
            self.last_rss_bytes = resident_bytes(self.process.pid) or self.last_rss_bytes
            if self.last_rss_bytes > self._limits.resident_bytes:
                self.kill("memory_limit")
            time.sleep(WATCH_SECONDS)

    def kill(self, reason: KillReason) -> None:
        """Send the process its end; the first reason stays."""
        with self._lock:
            if self.killed_for is None and self.process.poll() is None:
                self.killed_for = reason
                self.process.kill()


def start_process(descriptor: int, limits: BoxLimits) -> "subprocess.Popen[bytes]":
    """Start a decoder process that is served over `descriptor`.

    Not a fork and not `multiprocessing`'s spawn: the parent may be a Ray worker, whose threads a fork would break and
    whose main module a spawned child would import.
    """
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "operators.decode.child",
            str(descriptor),
            str(os.getpid()),
            limits.model_dump_json(),
        ],
        stdin=subprocess.DEVNULL,
        # MuPDF and FFmpeg write their complaints about hostile files to these.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[descriptor],
        env=child_environment(),
    )


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
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def oom_kill_count() -> int:
    """Return how many processes of this machine the kernel has ended for want of memory; 0 if it does not say."""
    try:
        with open("/proc/vmstat", "rb") as lines:
            return next((int(line.split()[1]) for line in lines if line.startswith(b"oom_kill ")), 0)
    except OSError:
        return 0


def signal_name(number: int) -> str:
    """Return the name of a signal, also of one that Python has no name for."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
