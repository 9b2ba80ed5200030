"""The lease that keeps two drivers off one run."""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ConfigDict

from pipeline.storage import Storage
from schemas.errors import ConfigError, one_line

logger = logging.getLogger(__name__)

LEASES = "ledger/leases"
BEAT_SECONDS = 15.0
STALE_SECONDS = 90.0
"""Six missed beats: a driver that cannot write for so long cannot commit either."""

MOST_LOOKS = 20
GOING_SECONDS = 3.0
"""Memory is given back before a killed process is gone, which takes a moment."""

WATCHED_BEATS = 2.5
"""A beat that looks old may be that of a clock that runs behind ours: only one that stays away this long is missing."""


class Holder(BaseModel):
    """Who holds the run.

    Attributes:
        host: machine and process-id namespace, in which `pid` means something.
        process_start: start time of the process in clock ticks, which tells a reused pid.
    """

    model_config = ConfigDict(frozen=True)

    owner: str
    host: str
    pid: int
    process_start: str
    beat_at: str
    released: bool = False


class Lease:
    """Holds a run for one driver; use it as a context manager.

    Each holder creates the next generation's file, which only one of several can do; the highest generation holds the
    run. A holder writes a beat into its own file. A lease is free when it was released, when its process is gone from
    this machine or goes within a moment, or when its last beat is `stale_seconds` away from our clock and no other
    comes while we watch.

    Args:
        storage: where the run lives.
        clock: the present time, in UTC.
        stale_seconds: silence after which another driver may take over.
        beat_seconds: time between beats; 0 leaves them to the caller of `beat`, and watches for none.
    """

    def __init__(
        self,
        storage: Storage,
        clock: Callable[[], datetime],
        stale_seconds: float = STALE_SECONDS,
        beat_seconds: float = BEAT_SECONDS,
    ) -> None:
        self._storage = storage
        self._clock = clock
        self._stale_seconds = stale_seconds
        self._beat_seconds = beat_seconds
        self._owner = uuid.uuid4().hex
        self._generation = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = False

    def __enter__(self) -> "Lease":
        self.acquire()
        if self._beat_seconds > 0:
            self._thread = threading.Thread(target=self._beat_until_stopped, name="lease", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the run.

        Raises:
            ConfigError: another driver works on it, or won it a moment ago.
        """
        names, holder = self._newest()
        if holder is not None and not self._is_free(holder) and not self._stays_silent(names[-1], holder):
            raise ConfigError(
                f"{self._storage.uri} is being worked on by process {holder.pid} on {holder.host.partition('/')[0]} "
                f"(last sign of life {holder.beat_at}); wait for it, or end it"
            )
        self._generation = _generation(names[-1]) + 1 if names else 1
        if not self._storage.put_if_absent(self._name(), self._signed(released=False)):
            raise ConfigError(f"{self._storage.uri} was taken by another driver at the same moment")
        # Who was slow to get here may have made a generation that others have left behind them.
        if self._storage.list(LEASES)[-1:] != [self._name()]:
            self._storage.delete(self._name())
            self._generation = 0
            raise ConfigError(f"{self._storage.uri} was taken by another driver at the same moment")
        for name in names:
            self._storage.delete(name)

    def beat(self) -> None:
        """Show a sign of life; sets `lost` when another driver has taken over."""
        names = self._storage.list(LEASES)
        if not names or _generation(names[-1]) != self._generation:
            self.lost = True
            return
        self._storage.put(self._name(), self._signed(released=False))

    def confirm(self) -> None:
        """Look whether the run is still ours, right before a write that would undo another driver's.

        Raises:
            ConfigError: another driver took over after a long silence of this one.
        """
        self.beat()
        self.check()

    def check(self) -> None:
        """Raise when the run is no longer ours, as far as the last beat told.

        Raises:
            ConfigError: another driver took over after a long silence of this one.
        """
        if self.lost:
            raise ConfigError(f"{self._storage.uri} was taken over by another driver")

    def release(self) -> None:
        """Give the run back; the file stays, so that generations only grow."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if not self.lost and self._generation:
            self._storage.put(self._name(), self._signed(released=True))
        self._generation = 0

    def _beat_until_stopped(self) -> None:
        while not self._stop.wait(self._beat_seconds):
            try:
                self.beat()
            # A thread that ends here would end the beats without a word, and another driver would take the run.
            except Exception as error:  # noqa: BLE001
                logger.warning("no beat this time: %s", one_line(error))

    def _is_free(self, holder: Holder) -> bool:
        if holder.released:
            return True
        return holder.host == _host() and _goes(holder.pid, holder.process_start)

    def _stays_silent(self, name: str, holder: Holder) -> bool:
        """Return whether a holder's last beat is far from our clock, and no other comes for a while."""
        away = abs((self._clock() - datetime.fromisoformat(holder.beat_at)).total_seconds())
        if away <= self._stale_seconds:
            return False
        time.sleep(WATCHED_BEATS * self._beat_seconds)
        try:
            return self._storage.list(LEASES)[-1] == name and self._holder(name) == holder
        except (FileNotFoundError, IndexError):
            return False

    def _newest(self) -> tuple[list[str], Holder | None]:
        """Return the names of all generations, and who holds the newest; None where there is none.

        Raises:
            ConfigError: others took it from each other each time that we looked.
        """
        for _ in range(MOST_LOOKS):
            names = self._storage.list(LEASES)
            try:
                return names, self._holder(names[-1]) if names else None
            except FileNotFoundError:
                # Another driver has taken it over between the two, and removed what was before.
                continue
        raise ConfigError(f"{self._storage.uri} is taken by one driver after the other")

    def _holder(self, name: str) -> Holder:
        return Holder.model_validate_json(self._storage.get(name))

    def _name(self) -> str:
        return f"{LEASES}/{self._generation:08d}.json"

    def _signed(self, *, released: bool) -> bytes:
        holder = Holder(
            owner=self._owner,
            host=_host(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()),
            beat_at=self._clock().isoformat(),
            released=released,
        )
        return json.dumps(holder.model_dump()).encode()


def _generation(name: str) -> int:
    return int(name.rsplit("/", 1)[-1].removesuffix(".json"))


def _host() -> str:
    # Containers may share a host name but not a process-id namespace, and machines both, but not a boot.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}/{boot}"
    except OSError:
        return socket.gethostname()


def _goes(pid: int, start: str) -> bool:
    """Return whether a process is gone, or goes while we look."""
    deadline = time.monotonic() + (0.0 if pid == os.getpid() else GOING_SECONDS)
    while _process_start(pid) == start:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _process_start(pid: int) -> str:
    """Return the start time of a process in clock ticks since boot, empty where there is none that still runs."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]
