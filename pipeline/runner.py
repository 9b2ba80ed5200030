"""A run from beginning to end: list, plan, run what is owed, publish, prove by counting."""

import platform
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from operators.probe import parse_page_ranges
from pipeline.accounting import Accounting, account
from pipeline.config import FlowConfig, compose, planning_settings
from pipeline.executor import Executor, LocalExecutor, RayExecutor, check_address
from pipeline.flow import VIDEO_HEAD, head_of, plan_flow, record_flow
from pipeline.lease import Lease
from pipeline.ledger import Again, CommittedRecords, Ledger, utc_now
from pipeline.local import rebatch
from pipeline.plan import ListingCache, PlanCounts, PlanReader, as_units, count_plan, owed_units
from pipeline.progress import Observer, Progress, Silent
from pipeline.publish import publish, published_tables, read_manifest, write_run_row
from pipeline.reading import Reading, choose_reading
from pipeline.runfile import check_same_settings, write_run_file
from pipeline.source import Listing, check_inputs, list_sources
from pipeline.spec import RunSpec, make_spec
from pipeline.storage import Storage
from pipeline.versions import versions
from pipeline.watch import Watch
from schemas.errors import CATEGORY_OF_CODE, ConfigError, TransientError
from schemas.ids import digest
from schemas.vocabulary import QUIET_STATUSES

MOST_ATTEMPTS = 3
"""Attempts in a row without a new commit after which a run gives up, incomplete."""

PLAN_TASKS_PER_WORKER = 4
SOURCES_PER_PLAN_PART = 256
MOST_BLOCKS = 20_000
"""Tasks of the first step: each costs the driver about 10 ms (measured), so units are grouped beyond this."""


@dataclass
class RunSummary:
    """What a run says at its end; counts are of the whole run folder, rates of this call.

    Attributes:
        complete: every planned record has exactly one row, and the tables agree with each other.
        statuses: committed pages and segments of the run, by status.
        errors: error rows of the run, by category.
        seconds: `list`, `plan`, `start`, `run`, `publish`, `total` of this call.
        steps: rows and busy seconds of each step in this call.
    """

    run_id: str
    output: str
    task: str
    engine: str
    engine_reason: str
    model_id: str | None
    weights_kind: str | None
    complete: bool = False
    problems: list[str] = field(default_factory=list)
    sources: int = 0
    failed_sources: int = 0
    planned: int = 0
    resumed: int = 0
    computed: int = 0
    pages: int = 0
    segments: int = 0
    frames: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    routes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    image_tokens: int = 0
    output_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    gpu_seconds: float = 0.0
    cost: float | None = None
    cost_per_million_pages: float | None = None
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def error_rate(self) -> float:
        """Share of pages, segments and unopened sources that ended without a usable answer."""
        failed = (
            sum(self.statuses.get(name, 0) for name in ("failure", "truncated", "repetition")) + self.failed_sources
        )
        everything = sum(self.statuses.values()) + self.failed_sources
        return failed / everything if everything else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return every value, as JSON can hold it."""
        return dict(vars(self)) | {"error_rate": self.error_rate}


def run(spec: RunSpec | None = None, observer: Observer | None = None, **options: Any) -> RunSummary:
    """Run `spec` to its end, or as far as it goes; the same call resumes it.

    Args:
        spec: what to do; or give its fields as `options`, for example `run(task="ocr", inputs=["a.pdf"], output="r")`.
        observer: told how far the run is.
        options: fields of `RunSpec`.

    Raises:
        ConfigError: the spec cannot run as written; nothing was started.
        TransientError: the run stopped early; the same call resumes it.
    """
    wanted = spec or make_spec(options)
    return _Run(wanted, observer or Silent()).go()


def status_of(run_uri: str, *, verify: bool = False) -> Accounting:
    """Return the accounting of a run, which may be going on.

    Raises:
        ConfigError: there is no run at `run_uri`.
    """
    storage = Storage(run_uri)
    if not storage.exists("run.json"):
        raise ConfigError(f"{run_uri!r} is no run folder: it holds no run.json")
    return account(storage, check_parts=verify)


@dataclass
class PlanReport:
    """What a run would do.

    Attributes:
        counts: sources, units and records.
        errors: sources that cannot be opened, by error code.
        passed_over: files of named folders that are no documents or videos by their name.
        steps: for each head and the trunk, the steps with their workers.
    """

    counts: PlanCounts
    errors: Counter[str]
    passed_over: int
    steps: dict[str, list[dict[str, Any]]]
    reading: Reading


def plan(spec: RunSpec) -> PlanReport:
    """Return what `spec` would do, by listing and probing its sources; writes nothing.

    Raises:
        ConfigError: the spec cannot run as written.
    """
    check_request(spec)
    reading = choose_reading(spec)
    config = compose(spec, reading, run_uri="-", run_id="plan", worker_count=1, gpu_count=1)
    listing, counts, errors = Listing(), PlanCounts(), Counter[str]()
    executor = LocalExecutor()
    flow = plan_flow(config, run_uri=None)
    tables = rebatch(_listed(spec, listing), SOURCES_PER_PLAN_PART)
    for planned in executor.run(flow, {"sources": [executor.hold(table) for table in tables]}):
        for row in planned.to_pylist():
            counts.sources += 1
            counts.units += row["unit_count"]
            counts.records += row["record_count"]
            if row["error_code"]:
                counts.failed_sources += 1
                errors[row["error_code"]] += 1
            else:
                counts.records_by_kind[row["kind"]] += row["record_count"]
    records = record_flow(config)
    steps = {name: [_step_facts(step) for step in head] for name, head in records.heads.items()}
    steps["trunk"] = [_step_facts(step) for step in records.trunk]
    return PlanReport(counts, errors, listing.passed_over, steps, reading)


def check_request(spec: RunSpec) -> None:
    """Refuse what can be refused by looking at the spec and the local inputs alone.

    Raises:
        ConfigError: an input or a cluster is not there, or the page ranges cannot be read.
    """
    check_inputs(spec.inputs)
    if spec.pages:
        parse_page_ranges(spec.pages)
    if spec.address:
        check_address(spec.address)


def _step_facts(step: Any) -> dict[str, Any]:
    return {
        "step": step.name,
        "reads": len(step.operator.reads),
        "adds": len(step.operator.adds),
        "workers": step.workers,
        "cpus": step.cpus,
        "gpus": step.gpus,
        "rows_per_batch": step.rows_per_batch,
        "same_worker": step.same_worker,
    }


def _listed(spec: RunSpec, counts: Listing) -> Iterator[pa.Table]:
    options = {
        "page_ranges": spec.pages,
        "password": spec.password.get_secret_value() if spec.password else None,
    }
    left = spec.limit
    for table in list_sources(spec.inputs, options, counts):
        taken = table if left is None else table.slice(0, left)
        yield taken
        if left is not None:
            left -= taken.num_rows
            if left <= 0:
                return


class _Run:
    """One call of `run`: its state while it goes through the phases."""

    def __init__(self, spec: RunSpec, observer: Observer) -> None:
        self.spec = spec
        self.observer = observer
        self.run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{digest(time.perf_counter_ns())[:6]}"
        self.progress = Progress()
        self.seconds: dict[str, float] = {}
        self.started_at = utc_now()
        self.frames = 0
        self.counts = PlanCounts()

    def go(self) -> RunSummary:
        started = time.perf_counter()
        check_request(self.spec)
        self.reading = choose_reading(self.spec)
        self.storage = Storage(self.spec.output)
        self.storage.probe_writable()
        self.settings = planning_settings(self.spec, self.reading)
        self.executor: Executor = LocalExecutor() if self.spec.local else RayExecutor(self.spec)
        check_same_settings(self.storage, self.spec, self.settings)
        self.observer.note(self.reading.sentence(self.spec.task))
        with Lease(self.storage, utc_now) as lease, Watch(self.progress, self.executor, self.observer):
            self.lease = lease
            write_run_file(self.storage, self.spec, self.reading, self.settings, self.run_id)
            try:
                self._list_and_plan()
                self._run_owed()
            finally:
                self.executor.close()
            self._phase("publish")
            began = time.perf_counter()
            publish(self.storage, self.run_id)
            accounting = account(self.storage)
            self.seconds["publish"] = time.perf_counter() - began
            self.seconds["total"] = time.perf_counter() - started
            summary = self._summary(accounting)
            write_run_row(self.storage, self._run_row(summary))
            publish(self.storage, self.run_id)
            write_run_file(self.storage, self.spec, self.reading, self.settings, self.run_id, summary.as_dict())
            self._phase("done")
        return summary

    def _phase(self, name: str) -> None:
        self.progress.phase = name
        self.lease.check()

    def _list_and_plan(self) -> None:
        """List the inputs, and probe the sources that the plan does not know."""
        began = time.perf_counter()
        self._phase("list")
        cache = ListingCache(self.storage, self.settings.digest)
        listing = Listing()
        self.passwords: dict[int, str] = {}
        fresh: list[pa.Table] = []
        for table in _listed(self.spec, listing):
            fresh.append(cache.to_probe(table))
            self.passwords |= cache.passwords(table)
        self.seconds["list"] = time.perf_counter() - began
        if listing.passed_over:
            self.observer.note(
                f"{listing.passed_over} files that are no documents or videos by their names passed over"
            )
        count = sum(table.num_rows for table in fresh)
        self.progress.sources = listing.sources
        if count:
            self._probe(fresh, count)

    def _probe(self, fresh: list[pa.Table], count: int) -> None:
        self._phase("start")
        began = time.perf_counter()
        self.executor.start()
        self.seconds["start"] = time.perf_counter() - began
        self._phase("plan")
        began = time.perf_counter()
        config = self._config()
        wanted = max(1, count // (PLAN_TASKS_PER_WORKER * self.executor.worker_count))
        rows = min(SOURCES_PER_PLAN_PART, wanted)
        held = [self.executor.hold(table) for table in rebatch(iter(fresh), rows) if table.num_rows]
        for planned in self.executor.run(plan_flow(config, run_uri=self.spec.output), {"sources": held}):
            self.progress.planned += sum(planned["record_count"].to_pylist())
            self.progress.failed_sources += planned.num_rows - planned["error_code"].null_count
        self.seconds["plan"] = time.perf_counter() - began

    def _config(self) -> FlowConfig:
        if self.reading.uses_gpu and not self.executor.gpu_count():
            raise ConfigError(f"no GPU is in the cluster at {self.spec.address}: use --device cpu or --engine cpu")
        return compose(
            self.spec,
            self.reading,
            run_uri=self.spec.output,
            run_id=self.run_id,
            worker_count=self.executor.worker_count,
            gpu_count=self.executor.gpu_count() if self.reading.uses_gpu else 0,
            has_videos=bool(self.counts.records_by_kind["video"]),
            pass_index=self.again.pass_index if self.again else 0,
        )

    again: Again | None = None

    def _run_owed(self) -> None:
        """Run the flow over what is owed, again after a failed attempt, until nothing is owed."""
        ledger = Ledger(self.storage)
        committed = ledger.committed_records()
        self.counts = count_plan(PlanReader(self.storage))
        if self.spec.retry_failed:
            self.again = Again(pass_index=committed.last_pass() + 1)
        self.progress.planned = self.counts.records
        self.progress.failed_sources = self.counts.failed_sources
        attempts, before = 0, -1
        while True:
            units, owed = self._owed(committed)
            self.progress.resumed = self.counts.records - owed - self.progress.done
            if not owed:
                return
            attempts = attempts + 1 if len(committed) == before else 1
            before = len(committed)
            try:
                self._attempt(units)
                failure = None
            except TransientError as error:
                failure = error
            ledger.refresh()
            if failure is None:
                if len(committed) == before:
                    raise TransientError("the flow ended, but records that were owed did not come out of it")
                continue
            if attempts >= MOST_ATTEMPTS:
                raise TransientError(f"{MOST_ATTEMPTS} attempts ended without a new row: {failure}") from failure
            self.observer.note(f"the flow broke off and is started again over what is owed: {failure}")

    def _owed(self, committed: CommittedRecords) -> tuple[dict[str, list[Any]], int]:
        """Return the owed units of each head, held by the executor, and the number of owed records."""
        per_block = max(1, -(-self.counts.units // MOST_BLOCKS))
        owed = 0
        units: dict[str, list[Any]] = {}
        for table in owed_units(PlanReader(self.storage), committed, self.again):
            ready = as_units(table, self.passwords)
            owed += sum(len(keys) for keys in ready["record_keys"].to_pylist())
            if not units:
                self._start()
            for name in record_flow_heads():
                mine = ready.filter(pa.array([head_of(kind) == name for kind in ready["kind"].to_pylist()]))
                blocks = rebatch(iter([mine]), per_block)
                units.setdefault(name, []).extend(self.executor.hold(block) for block in blocks if block.num_rows)
        return units, owed

    def _start(self) -> None:
        self._phase("start")
        began = time.perf_counter()
        self.executor.start()
        self.seconds["start"] = self.seconds.get("start", 0.0) + time.perf_counter() - began

    def _attempt(self, units: dict[str, list[Any]]) -> None:
        self._phase("run")
        began = time.perf_counter()
        done_before = self.progress.run_seconds
        try:
            for table in self.executor.run(record_flow(self._config()), units):
                self.lease.check()
                self._count(table)
                self.progress.run_seconds = done_before + time.perf_counter() - began
        finally:
            self.progress.run_seconds = done_before + time.perf_counter() - began
            self.seconds["run"] = self.progress.run_seconds
            self.progress.steps = self.executor.steps()

    def _count(self, table: pa.Table) -> None:
        for row in table.to_pylist():
            self.progress.statuses[row["status"]] += 1
            self.progress.segments += row["kind"] == "video"
            self.progress.pages += row["kind"] != "video"
            self.frames += row["frame_count_sampled"] or 0
            if row["error_code"]:
                self.progress.errors[CATEGORY_OF_CODE[row["error_code"]]] += 1
            for name in ("prompt_tokens", "image_tokens", "output_tokens"):
                setattr(self.progress, name, getattr(self.progress, name) + (row[name] or 0))

    def _summary(self, accounting: Accounting) -> RunSummary:
        progress, reading = self.progress, self.reading
        gpu_workers = 1 if reading.uses_gpu else 0
        gpu_seconds = progress.run_seconds * gpu_workers
        price = self.spec.price_per_gpu_hour
        cost = gpu_seconds / 3600 * price if price is not None else None
        counted = {name: round(self.seconds.get(name, 0.0), 3) for name in _PHASES}
        return RunSummary(
            run_id=self.run_id,
            output=self.spec.output,
            task=self.spec.task,
            engine=reading.engine,
            engine_reason=reading.reason,
            model_id=reading.model_id,
            weights_kind=reading.weights_kind,
            complete=accounting.complete,
            problems=list(accounting.problems),
            sources=self.counts.sources,
            failed_sources=self.counts.failed_sources,
            planned=self.counts.records,
            resumed=progress.resumed,
            computed=progress.done,
            pages=progress.pages,
            segments=progress.segments,
            frames=self.frames,
            statuses=dict(accounting.statuses),
            routes=self._published_counts("pages", "route"),
            errors=self._published_counts("errors", "error_category"),
            prompt_tokens=progress.prompt_tokens,
            image_tokens=progress.image_tokens,
            output_tokens=progress.output_tokens,
            seconds=counted,
            gpu_seconds=round(gpu_seconds, 3),
            cost=cost,
            cost_per_million_pages=cost / progress.pages * 1e6 if cost is not None and progress.pages else None,
            steps=progress.steps,
        )

    def _published_counts(self, table_name: str, column: str) -> dict[str, int]:
        counts: Counter[str] = Counter()
        manifest = read_manifest(self.storage)
        if manifest is not None:
            for table in published_tables(self.storage, manifest, table_name, [column]):
                counts.update(value for value in table[column].to_pylist() if value is not None)
        return dict(counts)

    def _run_row(self, summary: RunSummary) -> dict[str, Any]:
        found = versions()
        total, warm = summary.seconds["total"], summary.seconds["run"]
        good = sum(summary.statuses.get(name, 0) for name in QUIET_STATUSES)
        return {
            "run_id": self.run_id,
            "command": f"pagereel {self.spec.task}",
            "task": self.spec.task,
            "config": self.settings.text,
            "config_sha256": self.settings.digest,
            "package_version": found["pagereel"],
            "python_version": platform.python_version(),
            "ray_version": found["ray"],
            "torch_version": found["torch"],
            "transformers_version": found["transformers"],
            "engine": summary.engine,
            "model_id": summary.model_id,
            "model_revision": self.reading.model_revision,
            "weights_kind": summary.weights_kind,
            "started_at": self.started_at,
            "ended_at": utc_now(),
            "source_count": summary.sources,
            "record_count": summary.planned,
            "page_count": summary.pages,
            "segment_count": summary.segments,
            "success_count": good,
            "failed_count": sum(summary.statuses.values()) - good,
            "error_count": sum(summary.errors.values()),
            "prompt_tokens": summary.prompt_tokens,
            "image_tokens": summary.image_tokens,
            "output_tokens": summary.output_tokens,
            "gpu_seconds": summary.gpu_seconds,
            "pages_per_second_cold": summary.pages / total if total else None,
            "pages_per_second_warm": summary.pages / warm if warm else None,
            "price_per_gpu_hour": self.spec.price_per_gpu_hour,
            "cost_per_million_pages": summary.cost_per_million_pages,
            "ledger_hits": 0,
        }


_PHASES = ("list", "start", "plan", "run", "publish", "total")


def record_flow_heads() -> tuple[str, ...]:
    """Return the names of the heads, in the order in which units are handed out."""
    return ("documents", VIDEO_HEAD)
