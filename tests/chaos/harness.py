"""Schedules carried out: a run is disturbed, left in peace until it ends, and compared with an undisturbed one."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import fsspec

from jobs.watched import NODE_GONE
from pipeline.runner import status_of
from pipeline.storage import Storage
from schemas.errors import PagereelError
from tests.chaos.call import KILLED, ROOT, Call, Injector, Scene
from tests.chaos.compare import Comparison, Rows, compare, read_rows
from tests.chaos.corpora import CORPORA
from tests.chaos.faults import INJECTORS, mount, unmount
from tests.chaos.processes import Process, adopt_orphans, descendants, end_all, is_service_of_ray, reap, waits_in
from tests.chaos.schedules import NEEDS_ROOT, Schedule
from tests.cluster.namespaces import Cluster, can_build, must_build

MOST_QUIET_CALLS = 4
LEAST_PATIENCE_SECONDS, PATIENCE = 180.0, 15.0
"""A call is held to be hung after so long, and so many times the time of an undisturbed run: machines may be busy."""

LEAVING_SECONDS = 120.0
"""Time for what a killed driver leaves behind to end; workers of Ray are nice, and a busy machine forgets them."""

OTHERS_TEMPORARIES = ("torchinductor_", ".ses")
"""Caches that libraries keep in the temporary folder for the next process."""

OBJECT_STORE_MB, SMALLEST_STORE_MB = 150, 100
BUCKET = "chaos"
DONE, CONFIG, INCOMPLETE = 0, 2, 3
MAY_BE_REFUSED = {"second_driver", "disk_full"}
"""Faults with which a call may say that it cannot run as written: the run is taken, or nothing can be written."""

DEFECT = "a defect ended the run"


@dataclass
class Outcome:
    """What became of one schedule.

    Attributes:
        schedule: what was asked for.
        comparison: of its tables.
        injected: faults that struck, by kind.
        missed: faults that found nothing to strike before the call was over.
        statuses: of all calls, None for one that had to be ended.
        hung: calls that had to be ended, or all quiet calls gone and the run not done.
        unexpected: what else should not have been, in words.
        left_by_ray: services of Ray's own that outlived a driver which was killed while they started.
        ended_by_ray: drivers that Ray ended because the node on their machine had died.
        skipped: why the schedule was not carried out.
    """

    schedule: Schedule
    comparison: Comparison = field(default_factory=Comparison)
    injected: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    statuses: list[int | None] = field(default_factory=list)
    hung: int = 0
    unexpected: list[str] = field(default_factory=list)
    left_by_ray: int = 0
    ended_by_ray: int = 0
    seconds: float = 0.0
    skipped: str = ""
    kept: str = ""

    @property
    def sound(self) -> bool:
        """True when nothing is wrong."""
        found = self.comparison
        return not (found.lost or found.doubled or found.different or self.hung or self.unexpected)


@dataclass(frozen=True)
class Expected:
    """An undisturbed run over a corpus: its tables, the bytes of its folder, and how long it took in a plain loop."""

    rows: Rows
    folder_bytes: int
    seconds: float


class Stage:
    """What schedules share: corpora, the tables that are expected, servers; use it as a context manager."""

    def __init__(self) -> None:
        adopt_orphans()
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self._expected: dict[str, Expected] = {}
        self._server: subprocess.Popen[bytes] | None = None
        self._cluster: Cluster | None = None

    def __enter__(self) -> "Stage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._cluster is not None:
            self._cluster.close()
            shutil.rmtree(self._cluster.folder, ignore_errors=True)
        end_all(descendants(os.getpid()))
        if self._server is not None:
            self._server.wait()
        reap()
        kept = [path for path in self.folder.iterdir() if path.name.startswith("schedule-")]
        for path in self.folder.iterdir() if not kept else []:
            shutil.rmtree(path)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def inputs(self, corpus: str) -> Path:
        """Return the folder of a corpus, written at its first use."""
        folder = self.folder / "inputs" / corpus
        if not folder.exists():
            folder.mkdir(parents=True)
            CORPORA[corpus].write(folder)
        return folder

    def expected(self, corpus: str) -> "Expected":
        """Return what an undisturbed run over a corpus comes to."""
        if corpus not in self._expected:
            output = self.folder / "expected" / corpus
            scene = Scene(
                folder=self.folder / "expected",
                corpus=CORPORA[corpus],
                inputs=self.inputs(corpus),
                output=str(output),
                options=["--local"],
                environment=plain_environment(),
            )
            began = time.monotonic()
            done = subprocess.run(scene.command(), cwd=ROOT, env=scene.environment, capture_output=True, check=False)
            if done.returncode != DONE:
                raise RuntimeError(f"the undisturbed run over {corpus} failed: {done.stderr.decode()[-2000:]}")
            size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
            self._expected[corpus] = Expected(read_rows(str(output)), size, time.monotonic() - began)
        return self._expected[corpus]

    def s3_url(self) -> str:
        """Return the address of an S3 server, started at its first use."""
        if self._server is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._port = probe.getsockname()[1]
            command = [sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", str(self._port)]
            self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            url = f"http://127.0.0.1:{self._port}"
            wait_for_answer(f"{url}/moto-api/")
            # This process reads what the runs have written there.
            os.environ.update(s3_variables(url))
            fsspec.filesystem("s3").mkdir(BUCKET)
        return f"http://127.0.0.1:{self._port}"

    def cluster(self) -> Cluster:
        """Return a cluster of three hosts, whole, built at its first use."""
        if self._cluster is None:
            self.s3_url()
            folder = Path(tempfile.mkdtemp(prefix="prb-", dir="/tmp"))
            variables = s3_variables(f"http://{{host}}:{self._port}") | {"PYTHONPATH": str(ROOT)}
            self._cluster = Cluster(folder, variables=variables).__enter__()
        else:
            self._cluster.mend()
        return self._cluster

    def standing(self) -> frozenset[int]:
        """Return the processes that serve every schedule."""
        return frozenset(process.pid for process in descendants(os.getpid()))


def s3_variables(url: str) -> dict[str, str]:
    """Return the variables with which a process uses the server at `url`."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "chaos",
        "AWS_SECRET_ACCESS_KEY": "chaos",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def wait_for_answer(url: str) -> None:
    """Wait until a server answers.

    Raises:
        TimeoutError: it does not, for a minute.
    """
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).read()
            return
        time.sleep(0.1)
    raise TimeoutError(f"nobody answers at {url}")


def plain_environment() -> dict[str, str]:
    """Return the variables of a command, without those that would take it to another Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_schedule(stage: Stage, schedule: Schedule) -> Outcome:
    """Carry out one schedule.

    Args:
        stage: what schedules share.
        schedule: what goes wrong.
    """
    outcome = Outcome(schedule)
    kinds = {fault.kind for faults in schedule.calls for fault in faults}
    if kinds & set(NEEDS_ROOT) and can_build():
        outcome.skipped = can_build()
        return outcome
    expected = stage.expected(schedule.corpus)
    began = time.monotonic()
    scene = _scene(stage, schedule, expected)
    try:
        _disturb(scene, schedule, outcome)
        if _finish(scene, schedule, outcome):
            _judge(scene, expected.rows, outcome)
        _look_for_leftovers(scene, outcome)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        # One schedule that cannot be carried out does not end two hundred.
        outcome.unexpected.append(f"the harness failed: {error!r}")
    finally:
        end_all(scene.processes())
        reap()
        _clear(scene, outcome)
    outcome.seconds = time.monotonic() - began
    return outcome


def _scene(stage: Stage, schedule: Schedule, expected: Expected) -> Scene:
    # Short names: the path of a socket of Ray's may have 107 bytes.
    folder = stage.folder / f"schedule-{schedule.seed}"
    folder.mkdir()
    disk = folder / "disk"
    if any(fault.kind == "disk_full" for faults in schedule.calls for fault in faults):
        mount(disk, 512 * 1024)
    cluster = stage.cluster() if schedule.venue == "cluster" else None
    s3_url = stage.s3_url() if schedule.on_s3 else None
    scene = Scene(
        folder=folder,
        corpus=CORPORA[schedule.corpus],
        inputs=stage.inputs(schedule.corpus),
        output=f"s3://{BUCKET}/{schedule.seed}-{uuid.uuid4().hex[:6]}/run" if schedule.on_s3 else str(disk / "run"),
        options=_options(schedule, cluster),
        environment=plain_environment(),
        prefix=cluster.prefix(cluster.head) if cluster else [],
        expected_bytes=expected.folder_bytes,
        most_seconds=LEAST_PATIENCE_SECONDS + PATIENCE * expected.seconds,
        cluster=cluster,
        s3_url=s3_url,
    )
    scene.temporary.mkdir()
    scene.environment["TMPDIR"] = str(scene.temporary)
    if cluster:
        scene.environment |= cluster.environment
    else:
        (folder / "ray").mkdir()
        scene.environment["RAY_TMPDIR"] = str(folder / "ray")
    scene.standing = stage.standing()
    return scene


def _options(schedule: Schedule, cluster: Cluster | None) -> list[str]:
    if schedule.venue == "loop":
        return ["--local"]
    if cluster:
        return ["--address", cluster.address]
    has_small_store = any(fault.kind == "store_full" for faults in schedule.calls for fault in faults)
    return ["--object-store-mb", str(SMALLEST_STORE_MB if has_small_store else OBJECT_STORE_MB)]


def _disturb(scene: Scene, schedule: Schedule, outcome: Outcome) -> None:
    for number, faults in enumerate(schedule.calls):
        injectors = [INJECTORS[fault.kind](fault) for fault in faults]
        call = Call(scene, number, injectors)
        status = call.run()
        outcome.statuses.append(status)
        _count(injectors, outcome)
        _check_status(call, status, {fault.kind for faults in schedule.calls for fault in faults}, outcome)


def _count(injectors: list[Injector], outcome: Outcome) -> None:
    for injector in injectors:
        (outcome.injected if injector.struck else outcome.missed)[injector.fault.kind] += 1


def _check_status(call: Call, status: int | None, kinds: set[str], outcome: Outcome) -> None:
    if status is None:
        outcome.hung += 1
        return
    fine = {DONE, INCOMPLETE}
    struck = {injector.fault.kind for injector in call.injectors if injector.struck}
    if "driver_kill" in struck:
        fine.add(KILLED)
    if status == INCOMPLETE and NODE_GONE in call.text():
        outcome.ended_by_ray += 1
    if kinds & MAY_BE_REFUSED:
        fine.add(CONFIG)
    statuses = [status, *(other.returncode for other in call.others)]
    if not set(statuses) <= fine:
        outcome.unexpected.append(f"{call.log.name}: ended with status {statuses}: {_last_lines(call)}")
    if DEFECT in call.text():
        outcome.unexpected.append(f"{call.log.name}: a defect: {_last_lines(call)}")


def _finish(scene: Scene, schedule: Schedule, outcome: Outcome) -> bool:
    """Give the same command until it ends with status 0, nothing going wrong any more; return whether it did."""
    for number in range(MOST_QUIET_CALLS):
        call = Call(scene, len(schedule.calls) + number, [])
        before = _temporaries(scene)
        status = call.run()
        outcome.statuses.append(status)
        _check_status(call, status, set(), outcome)
        left = _temporaries(scene) - before
        if left and status == DONE:
            outcome.unexpected.append(f"{call.log.name}: left behind {sorted(left)[:3]}")
        if status == DONE:
            return True
    outcome.hung += 1
    outcome.unexpected.append(f"{MOST_QUIET_CALLS} calls in peace did not finish the run: {_last_lines(call)}")
    return False


def _judge(scene: Scene, wanted: Rows, outcome: Outcome) -> None:
    try:
        accounting = status_of(scene.output, verify=True)
        outcome.comparison = compare(read_rows(scene.output), wanted)
    except (PagereelError, OSError) as error:
        outcome.unexpected.append(f"the run cannot be read: {error!r}")
        return
    if not accounting.complete:
        outcome.unexpected.append(f"status --verify: owed {accounting.owed}, {accounting.problems[:3]}")


def _look_for_leftovers(scene: Scene, outcome: Outcome) -> None:
    deadline = time.monotonic() + LEAVING_SECONDS
    while True:
        reap()
        left: list[Process] = scene.processes()
        if not left:
            return
        if time.monotonic() > deadline:
            outcome.left_by_ray = sum(is_service_of_ray(process) for process in left)
            left = [process for process in left if not is_service_of_ray(process)]
            if not left:
                return
            last = left[-1]
            shown = f"{last.command[:200]} (state {last.state}, parent {last.parent}, {waits_in(last)})"
            outcome.unexpected.append(f"{len(left)} processes left, such as {shown}")
            return
        time.sleep(0.1)


def _temporaries(scene: Scene) -> set[str]:
    return {path.name for path in scene.temporary.iterdir() if not path.name.startswith(OTHERS_TEMPORARIES)}


def _last_lines(call: Call) -> str:
    return " / ".join(call.text().strip().splitlines()[-3:])[-800:]


def _clear(scene: Scene, outcome: Outcome) -> None:
    """Remove what the schedule wrote, unless there is something to look at."""
    for disk in (scene.folder / "disk", scene.folder / "ray"):
        if disk.is_mount():
            if not outcome.sound:
                shutil.copytree(disk, scene.folder / f"{disk.name}-kept", ignore=shutil.ignore_patterns("sockets"))
            unmount(disk)
    if outcome.sound:
        shutil.rmtree(scene.folder, ignore_errors=True)
        return
    outcome.kept = str(scene.folder)
    if scene.s3_url:
        storage = Storage(scene.output)
        storage.filesystem.get(storage.root, str(scene.folder / "s3-kept"), recursive=True)


def say_where_root_is_needed() -> None:
    """End where root is promised and is not there: what needs it must fail there, not be skipped."""
    if can_build() and must_build():
        sys.exit(f"chaos: {can_build()}")
