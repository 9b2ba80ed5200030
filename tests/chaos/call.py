"""One call of the command, with what goes wrong during it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.storage import Storage
from tests.chaos.corpora import Corpus
from tests.chaos.processes import Process, descendants, end_all, reap
from tests.chaos.schedules import Fault
from tests.cluster.namespaces import Cluster

ROOT = Path(__file__).parents[2]
LOOK_SECONDS = 0.02
REMOTE_LOOK_SECONDS = 0.5
KILLED = -signal.SIGKILL

WORKER, DECODER, DRIVER = "ray::MapWorker", "operators.decode", " -m jobs "
"""What the commands of the processes of a run contain."""


@dataclass
class Scene:
    """Where a schedule takes place.

    Attributes:
        folder: everything of the schedule, removed after it.
        output: of the run.
        inputs: the files of the corpus.
        options: where the run takes place, for the command line.
        environment: of the command.
        prefix: what stands before the command, to run it on another host.
        standing: processes that belong to no call.
        expected_bytes: what an undisturbed run folder takes.
        most_seconds: after which a call is held to be hung.
        cluster: the cluster of several hosts that it runs on.
        s3_url: the address of the server that holds the output, None for a folder.
    """

    folder: Path
    corpus: Corpus
    inputs: Path
    output: str
    options: list[str]
    environment: dict[str, str]
    prefix: list[str] = field(default_factory=list)
    standing: frozenset[int] = frozenset()
    expected_bytes: int = 0
    most_seconds: float = 300.0
    cluster: Cluster | None = None
    s3_url: str | None = None

    @property
    def has_workers(self) -> bool:
        """True when workers of Ray do the work."""
        return "--local" not in self.options

    @property
    def temporary(self) -> Path:
        """The folder for temporary files of every process of the run."""
        return self.folder / "tmp"

    def command(self) -> list[str]:
        """Return the command, the same in every call."""
        corpus = self.corpus
        asked = [sys.executable, "-m", "jobs", corpus.task, str(self.inputs), "-o", self.output, "--quiet"]
        return [*self.prefix, *asked, *corpus.options, *self.options]

    def commits(self) -> int:
        """Return how many commits there are now."""
        if "://" not in self.output:
            with contextlib.suppress(OSError):
                return sum(name.endswith(".json") for name in os.listdir(f"{self.output}/ledger/commits"))
            return 0
        return len(Storage(self.output).list("ledger/commits"))

    def published(self) -> set[str]:
        """Return the names of the files of a table, those that are half written among them."""
        if "://" not in self.output:
            with contextlib.suppress(OSError):
                return set(os.listdir(f"{self.output}/documents"))
            return set()
        return set(Storage(self.output).list("documents"))

    def processes(self) -> list[Process]:
        """Return the living processes of all calls so far."""
        everything = descendants(os.getpid())
        found = [process for process in everything if process.pid not in self.standing]
        # The processes of a cluster outlive a run.
        return [process for process in found if self.cluster is None or is_of_a_run(process)]


def is_of_a_run(process: Process) -> bool:
    """Return whether a process of a cluster works for a run."""
    return any(word in process.command for word in (WORKER, DECODER, DRIVER))


class Injector:
    """One fault, while its call lasts.

    Args:
        fault: what, when and how bad.
    """

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.due: float | None = None
        self.struck = False

    def prepare(self, call: "Call") -> None:
        """Change the surroundings of a call that is about to start."""

    def strike(self, call: "Call") -> bool:
        """Do it; return False to be asked again a moment later."""
        raise NotImplementedError

    def relent(self, call: "Call") -> None:
        """Undo it when the call is over, or its time has passed."""


class Call:
    """One driver, from its start to its end.

    Args:
        scene: where it runs.
        number: of the call within its schedule.
        injectors: what goes wrong.
    """

    def __init__(self, scene: Scene, number: int, injectors: list[Injector]) -> None:
        self.scene = scene
        self.injectors = injectors
        self.environment = dict(scene.environment)
        self.command = scene.command()
        self.log = scene.folder / f"call-{number}.log"
        self.driver: subprocess.Popen[bytes] | None = None
        self.others: list[subprocess.Popen[bytes]] = []
        self.guests: list[subprocess.Popen[bytes]] = []
        self.began = 0.0
        self.seconds = 0.0
        self.hung = False
        self._looked = 0.0
        self._commits = 0
        self._published: set[str] = set()

    def start(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a driver."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_guest(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Start a process that is no driver of the run; it is ended with the call."""
        with (self.scene.folder / "guests.log").open("ab") as log:
            return subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def run(self) -> int | None:
        """Run the call to its end, which a fault may bring; return its status, None where it hung."""
        for injector in self.injectors:
            injector.prepare(self)
        self._commits, self._published = self.scene.commits(), self.scene.published()
        self.began = time.monotonic()
        self.driver = self.start(self.environment)
        try:
            while self.driver.poll() is None or any(other.poll() is None for other in self.others):
                time.sleep(LOOK_SECONDS)
                if time.monotonic() - self.began > self.scene.most_seconds:
                    self.hung = True
                    end_all(self.scene.processes())
                    break
                self._attack()
        finally:
            for guest in self.guests:
                guest.kill()
                guest.wait()
            for injector in self.injectors:
                injector.relent(self)
            self.seconds = time.monotonic() - self.began
        self.driver.wait()
        reap()
        return None if self.hung else self.driver.returncode

    def text(self) -> str:
        """Return what the drivers of this call have said."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _attack(self) -> None:
        now = time.monotonic()
        for injector in self.injectors:
            if injector.struck:
                continue
            if injector.due is None and self._is_triggered(injector.fault, now):
                injector.due = now + injector.fault.delay_seconds
            if injector.due is not None and now >= injector.due:
                injector.struck = injector.strike(self)

    def _is_triggered(self, fault: Fault, now: float) -> bool:
        if fault.trigger == "start":
            return True
        if fault.trigger == "seconds":
            return now - self.began >= fault.amount
        if "://" in self.scene.output:
            if now - self._looked < REMOTE_LOOK_SECONDS:
                return False
            self._looked = now
        if fault.trigger == "publish":
            return bool(self.scene.published() - self._published)
        return self.scene.commits() - self._commits >= fault.amount
