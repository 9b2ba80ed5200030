"""What the processes of a run hold while it goes on: memory, descriptors, processes, shared memory."""

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from jobs.bench.machine import process_tree

SHARED_FOLDER = Path("/dev/shm")
ROLES = (
    ("decoder", "operators.decode.child"),
    ("worker", "ray::"),
    ("object store", "raylet/raylet"),
    ("control", "gcs_server"),
    ("driver", "-m jobs"),
    ("agent", "ray"),
)
"""Role of a process by what its command contains, the first that fits; everything else is `other`."""


@dataclass(frozen=True)
class Process:
    """One process: a number is used again, so that when it began belongs to it."""

    pid: int
    birth: str
    role: str


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    memory_bytes: int
    descriptors: int


@dataclass
class Sample:
    """One look at a run.

    Attributes:
        seconds: since the run was started.
        done: records that were done.
        held: what each process holds.
        shared_bytes: what `/dev/shm` holds; that of others on this machine is part of it.
    """

    seconds: float
    done: int = 0
    held: dict[Process, Held] = field(default_factory=dict)
    shared_bytes: int = 0

    def of_role(self, role: str) -> list[Held]:
        """Return what the processes of a role hold."""
        return [held for process, held in self.held.items() if process.role == role]


class Watch:
    """Looks at a process and all below it, and remembers every process it ever saw.

    Args:
        root_pid: the process at the top.
    """

    def __init__(self, root_pid: int) -> None:
        self.root_pid = root_pid
        self._start = time.monotonic()
        self._seen: set[Process] = set()

    def look(self, done: int) -> Sample:
        """Take a sample."""
        sample = Sample(round(time.monotonic() - self._start, 1), done, shared_bytes=shared_bytes())
        for pid in process_tree(self.root_pid):
            command, birth, memory_bytes = command_of(pid), birth_of(pid), proportional_bytes(pid)
            if command is not None and birth is not None and memory_bytes is not None:
                process = Process(pid, birth, role_of(command))
                self._seen.add(process)
                sample.held[process] = Held(memory_bytes, descriptor_count(pid))
        return sample

    def left_behind(self) -> list[Process]:
        """Return the processes that were seen and have not ended."""
        return [process for process in self._seen if birth_of(process.pid) == process.birth]


def role_of(command: str) -> str:
    """Return the role of a process."""
    return next((role for role, word in ROLES if word in command), "other")


def command_of(pid: int) -> str | None:
    """Return the command of a process, or None when it is gone or a zombie."""
    text = read(f"/proc/{pid}/cmdline")
    return text.replace("\0", " ") if text else None


def birth_of(pid: int) -> str | None:
    """Return when a process began, which tells it from a later one of the same number; None when it is gone."""
    text = read(f"/proc/{pid}/stat")
    fields = text.rsplit(")", 1)[1].split() if text else []
    return fields[19] if fields and fields[0] != "Z" else None


def proportional_bytes(pid: int) -> int | None:
    """Return the memory of a process, pages shared by n processes counted as an n-th."""
    for line in (read(f"/proc/{pid}/smaps_rollup") or "").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return None


def descriptor_count(pid: int) -> int:
    """Return the open descriptors of a process."""
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def shared_bytes() -> int:
    """Return what `/dev/shm` holds: the object store has no name there once it is open."""
    found = os.statvfs(SHARED_FOLDER)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def shared_names() -> set[str]:
    """Return the names in `/dev/shm`."""
    return {path.name for path in SHARED_FOLDER.iterdir()}


def read(path: str) -> str | None:
    """Return the text of a file of `/proc`; None when the process is gone."""
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return None


def growth(values: Iterable[tuple[float, float]]) -> float:
    """Return by how much a straight line through (place, value) rises from the first place to the last."""
    points = list(values)
    if not points:
        return 0.0
    places = [place for place, _ in points]
    middle = sum(places) / len(places)
    level = sum(value for _, value in points) / len(points)
    spread = sum((place - middle) ** 2 for place in places)
    if not spread:
        return 0.0
    slope = sum((place - middle) * (value - level) for place, value in points) / spread
    return slope * (places[-1] - places[0])
