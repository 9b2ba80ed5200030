"""The processes that descend from this one, read from /proc; orphans among them stay ours."""

import contextlib
import ctypes
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

PR_SET_CHILD_SUBREAPER = 36

SERVICES_OF_RAY = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Both end when they see that their raylet is gone, but not where it went before they began to look (seen)."""


@dataclass(frozen=True)
class Process:
    """One process; its start, in clock ticks since boot, tells a reused `pid`."""

    pid: int
    parent: int
    state: str
    start: int
    command: str


def adopt_orphans() -> None:
    """Make every process that descends from this one ours for good, whoever dies in between."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def all_processes() -> dict[int, Process]:
    """Return every process there is, by its id."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            found[int(name)] = read_process(int(name))
    return found


def read_process(pid: int) -> Process:
    """Return one process.

    Raises:
        OSError: it is gone.
    """
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
        command = " ".join(file.read().split("\0")).strip()
    return Process(pid=pid, parent=int(fields[1]), state=fields[0], start=int(fields[19]), command=command)


def descendants(root: int) -> list[Process]:
    """Return the living processes below `root`, parents first."""
    processes = all_processes()
    children: dict[int, list[Process]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(0), [])
        waiting += [process.pid for process in below]
        found += [process for process in below if process.state not in "ZX"]
    return found


def reap(known: Iterable[int] = ()) -> None:
    """Take the exit status of dead orphans; those of `known` processes are left to whoever started them."""
    own = set(known)
    for process in all_processes().values():
        if process.parent == os.getpid() and process.state == "Z" and process.pid not in own:
            with contextlib.suppress(OSError):
                os.waitpid(process.pid, os.WNOHANG)


def send(process: Process, number: signal.Signals) -> bool:
    """Send a signal unless the process is gone by now; return whether it went out."""
    if not is_alive(process):
        return False
    try:
        os.kill(process.pid, number)
    except OSError:
        return False
    return True


def end_all(processes: Iterable[Process], seconds: float = 10.0) -> None:
    """Kill `processes`, and wait until none is left."""
    left = list(processes)
    for process in left:
        send(process, signal.SIGKILL)
    deadline = time.monotonic() + seconds
    while any(is_alive(process) for process in left) and time.monotonic() < deadline:
        time.sleep(0.05)


def waits_in(process: Process) -> str:
    """Return what the kernel says of the threads of a process: how many wait in what."""
    found: Counter[str] = Counter()
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process.pid}/task"):
            with open(f"/proc/{process.pid}/task/{thread}/wchan", encoding="utf-8") as file:
                found[file.read()] += 1
    return ", ".join(f"{count} in {place or '?'}" for place, count in found.most_common(4))


def is_alive(process: Process) -> bool:
    """Return whether it is still there, and no zombie."""
    try:
        found = read_process(process.pid)
    except OSError:
        return False
    return found.start == process.start and found.state not in "ZX"


def is_service_of_ray(process: Process) -> bool:
    """Return whether a process is one that a node of Ray runs for itself, with nothing of a run in it."""
    return process.command.startswith(SERVICES_OF_RAY)
