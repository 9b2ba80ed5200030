"""A run from beginning to end: list, plan, run what is owed, publish, prove by counting."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from pipeline.accounting import Accounting, account
from pipeline.addresses import stored_uri
from pipeline.answers import AnswerIndex, FindAnswersConfig
from pipeline.commits import utc_now
from pipeline.committed import Again, CommittedRecords
from pipeline.compact import compact_if_needed
from pipeline.config import FlowConfig, compose, planning_settings, probe_config, probe_digest
from pipeline.executor import Executor, LocalExecutor, RayExecutor
from pipeline.flow import DOCUMENT_HEAD, HEADS, VIDEO_HEAD, head_of, plan_flow, record_flow
from pipeline.known_archives import KnownArchives
from pipeline.known_sources import Listed
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.listing_cache import ListingCache
from pipeline.local import rebatch
from pipeline.plan import (
    PlanCounts,
    PlanReader,
    as_units,
    count_owed,
    count_plan,
    owed_units,
    retire_sources,
    unit_blocks,
    unit_keys,
)
from pipeline.progress import Observer, Progress, Silent
from pipeline.publish import publish, write_run_row
from pipeline.reading import choose_reading
from pipeline.request import check_request, listed
from pipeline.runfile import check_same_settings, write_run_file
from pipeline.second_look import FirstLooks, in_words, second_look
from pipeline.shared import Shared
from pipeline.shared_ledger import shared_ledger
from pipeline.sink import TOKEN_COLUMNS
from pipeline.source import Listing
from pipeline.spec import RunSpec, make_spec
from pipeline.storage import Storage
from pipeline.strikes import Strikes
from pipeline.summary import RunSummary, run_row, summarise
from pipeline.take_over import KnownPlanner
from pipeline.watch import Watch
from schemas.errors import CATEGORY_OF_CODE, ConfigError, ServiceLostError, TransientError, WorkersBrokenError
from schemas.ids import digest

MOST_ATTEMPTS = 3
"""Attempts in a row without a new commit after which a run gives up, incomplete."""

PLAN_TASKS_PER_WORKER = 4
SOURCES_PER_PLAN_PART = 256
MOST_PLAN_PARTS = 2_000
WHAT_IS_LISTED = ("inputs", "pages", "start_seconds", "stop_seconds")
MOST_BLOCKS = 20_000
"""Tasks of the first step: each costs the driver about 10 ms (measured), so units are grouped beyond this."""

RECORDS_PER_BLOCK = {DOCUMENT_HEAD: 10, VIDEO_HEAD: 2}
"""Records of small sources that go through the first step together: as many as a unit of a large one has."""

BLOCKS_PER_WORKER = 8


def run(
    spec: RunSpec | None = None, observer: Observer | None = None, *, leaves_ray: bool = True, **options: Any
) -> RunSummary:
    """Run `spec` to its end, or as far as it goes; the same call resumes it.

    Args:
        spec: what to do; or give its fields as `options`, for example `run(task="ocr", inputs=["a.pdf"], output="r")`.
        observer: told how far the run is.
        leaves_ray: False for a process that ends after it, by `pipeline.cluster.leave_and_exit`.
        options: fields of `RunSpec`.

    Raises:
        ConfigError: the spec cannot run as written; nothing was started.
        TransientError: the run stopped early; the same call resumes it.
    """
    wanted = spec or make_spec(options)
    return _Run(wanted, observer or Silent(), leaves_ray=leaves_ray).go()


def _drained(tables: list[pa.Table]) -> Iterator[pa.Table]:
    """Yield the tables and let go of them: a million listed sources need not lie in the driver twice."""
    tables.reverse()
    while tables:
        yield tables.pop()


@dataclass
class Planned:
    """What a run owes, planned and not begun.

    Attributes:
        owed: distinct records without a row.
        seconds: of each phase.
    """

    counts: PlanCounts
    owed: int
    seconds: dict[str, float]


def plan_run(spec: RunSpec, observer: Observer | None = None) -> Planned:
    """Plan a run in its folder and leave it at that; `run` of the same spec goes on from there.

    Raises:
        ConfigError: the spec cannot run as written; nothing was started.
        TransientError: planning stopped early; the same call resumes it.
    """
    return _Run(spec, observer or Silent()).plan_only()


def status_of(run_uri: str, *, verify: bool = False) -> Accounting:
    """Return the accounting of a run, which may be going on.

    Raises:
        ConfigError: there is no run at `run_uri`.
    """
    storage = Storage(run_uri)
    if not storage.exists("run.json"):
        raise ConfigError(f"{run_uri!r} is no run folder: it holds no run.json")
    return account(storage, check_parts=verify)


class _Run:
    """One call of `run`: its state while it goes through the phases."""

    def __init__(self, spec: RunSpec, observer: Observer, *, leaves_ray: bool = True) -> None:
        self.spec = spec
        self.leaves_ray = leaves_ray
        self.observer = observer
        self.run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{digest(time.perf_counter_ns())[:6]}"
        self.progress = Progress()
        self.seconds: dict[str, float] = {}
        self.started_at = utc_now()
        self.listed = Listed([*spec.stored()["inputs"], spec.pages or ""])
        self.again: Again | None = None
        self.second_pass: int | None = None
        self.strikes: Shared | None = None
        self.gpus_held = 0.0
        self.counts = PlanCounts()
        self.owed = 0

    def go(self) -> RunSummary:
        started = time.perf_counter()
        self._set_up()
        with Lease(self.storage, utc_now) as lease, Watch(self.progress, self.executor, self.observer):
            self.lease = lease
            write_run_file(self.storage, self.spec, self.reading, self.settings, self.run_id)
            try:
                self._read()
                # First: a node that was lost may keep Ray from leaving, and then Ray ends this process.
                return self._finish(started)
            finally:
                if self.leaves_ray:
                    self.executor.close()

    def _read(self) -> None:
        """Bring everything that is owed to a row."""
        try:
            self._list_and_plan()
            self._run_owed()
        except TransientError:
            self._give()
            raise

    def plan_only(self) -> "Planned":
        """List and plan as a run does, count what it would owe, and leave it at that: the same command goes on."""
        started = time.perf_counter()
        self._set_up()
        with Lease(self.storage, utc_now) as lease:
            self.lease = lease
            write_run_file(self.storage, self.spec, self.reading, self.settings, self.run_id)
            try:
                self._list_and_plan()
            finally:
                self.executor.close()
            committed = Ledger(self.storage).committed_records()
            owed = sum(len(unit_keys(table)) for table in owed_units(PlanReader(self.storage), committed))
            counts = count_plan(PlanReader(self.storage))
        self.seconds["total"] = time.perf_counter() - started
        return Planned(counts, owed, self.seconds)

    def _set_up(self) -> None:
        """Refuse what cannot run, before anything is written or started."""
        check_request(self.spec)
        self.reading = choose_reading(self.spec)
        self.storage = Storage(self.spec.output)
        self.storage.probe_writable()
        self.shared = shared_ledger(self.spec)
        self.settings = planning_settings(self.spec, self.reading)
        self.executor: Executor = LocalExecutor(self.spec.output) if self.spec.local else RayExecutor(self.spec)
        before = check_same_settings(self.storage, self.spec, self.settings)
        now = self.spec.stored()
        self.lists_the_same = before is not None and all(
            before["spec"].get(name) == now[name] for name in WHAT_IS_LISTED
        )
        self.observer.note(self.reading.sentence(self.spec.task))

    def _finish(self, started: float) -> RunSummary:
        """Publish what is committed, prove it by counting, and give it to the shared ledger."""
        self._phase("publish")
        began = time.perf_counter()
        template = self.spec.repro_template()
        compact_if_needed(Ledger(self.storage), self.run_id)
        publish(self.storage, self.run_id, repro_template=template, confirm=self.lease.confirm)
        accounting = account(self.storage)
        self.seconds["publish"] = time.perf_counter() - began
        self.seconds["total"] = time.perf_counter() - started
        summary = summarise(
            self.spec,
            self.reading,
            run_id=self.run_id,
            storage=self.storage,
            accounting=accounting,
            counts=self.counts,
            progress=self.progress,
            seconds=self.seconds,
            gpus_held=self.gpus_held,
        )
        row = run_row(self.spec, self.reading, self.settings, summary, self.started_at, utc_now())
        write_run_row(self.storage, row)
        publish(self.storage, self.run_id, repro_template=template, confirm=self.lease.confirm)
        write_run_file(self.storage, self.spec, self.reading, self.settings, self.run_id, summary.as_dict())
        self._give()
        self._phase("done")
        return summary

    def _phase(self, name: str) -> None:
        self.progress.phase = name
        self.lease.check()

    def _list_and_plan(self) -> None:
        """List the inputs, and probe the sources that the plan does not know."""
        began = time.perf_counter()
        self._phase("list")
        cache = ListingCache(self.storage, self.settings.digest, retry_failed=self.spec.retry_failed)
        listing = Listing()
        self.passwords: dict[int, str] = {}
        self.addresses: dict[int, str] = {}
        fresh: list[pa.Table] = []
        planner = self._known_planner(cache.part_number)
        archives = KnownArchives(Ledger(self.storage), self.run_id, [self.shared.ledger] if self.shared else [])
        for table in listed(self.spec, listing, archives):
            if self.shared:
                self.listed.add(table)
            wanted = cache.to_probe(table)
            fresh.append(planner.plan(wanted) if planner else wanted)
            self.passwords |= cache.passwords(table)
            self.addresses |= cache.addresses(table)
            self.progress.sources = listing.sources
        if planner:
            planner.flush()
        archives.flush()
        if self.lists_the_same and self.spec.limit is None:
            retire_sources(self.storage, cache.to_retire(), cache.part_number)
        self.seconds["list"] = time.perf_counter() - began
        if listing.passed_over:
            self.observer.note(
                f"{listing.passed_over} files that are no documents or videos by their names passed over"
            )
        count = sum(table.num_rows for table in fresh)
        self.progress.sources = listing.sources
        if count:
            self._probe(fresh, count, cache.part_number)

    def _known_planner(self, part_number: int) -> KnownPlanner | None:
        """Return what plans the sources that the shared ledger knows; None without one."""
        if self.shared is None:
            return None
        config = probe_config(self.spec, self.settings)
        known = self.shared.known_sources(probe_digest(config), retry_failed=self.spec.retry_failed)
        return KnownPlanner(known, self.storage, config, self.settings.digest, part_number, self.progress)

    def _take_over(self, ledger: Ledger, committed: CommittedRecords) -> None:
        """Copy what is owed and lies in the shared ledger."""
        if self.shared is None:
            return
        began = time.perf_counter()
        self.progress.ledger_hits = self.shared.take_over(
            self.storage,
            lambda: owed_units(PlanReader(self.storage), committed, self.again),
            self.run_id,
            repro_template=self.spec.repro_template(),
            retry_failed=self.spec.retry_failed,
            pass_index=self.again.pass_index if self.again else 0,
        )
        ledger.refresh()
        self.seconds["take_over"] = time.perf_counter() - began

    def _give(self) -> None:
        """Give to the shared ledger what this run computed."""
        if self.shared is None:
            return
        uri, digest_of_probe = stored_uri(self.spec.output), probe_digest(probe_config(self.spec, self.settings))
        listed = None if self.spec.limit is not None or self.progress.phase != "publish" else self.listed
        try:
            given = self.shared.give(self.storage, uri, self.run_id, digest_of_probe, listed)
        except TransientError as error:
            self.observer.note(f"nothing was given to the ledger, the same command does: {error}")
            return
        if given.records or given.sources:
            self.observer.note(f"given to the ledger: {given.records} records, {given.sources} sources")

    def _probe(self, fresh: list[pa.Table], count: int, part_number: int) -> None:
        self._phase("start")
        began = time.perf_counter()
        self._tell(self.executor.start())
        self.seconds["start"] = time.perf_counter() - began
        self._phase("plan")
        began = time.perf_counter()
        config = self._config()
        wanted = max(1, count // (PLAN_TASKS_PER_WORKER * self.executor.worker_count))
        rows = min(max(SOURCES_PER_PLAN_PART, count // MOST_PLAN_PARTS), wanted)
        held = [self.executor.hold(table) for table in rebatch(_drained(fresh), rows) if table.num_rows]
        for planned in self.executor.run(
            plan_flow(config, run_uri=self.spec.output, part_number=part_number), {"sources": held}
        ):
            self.progress.planned += sum(planned["record_count"].to_pylist())
            self.progress.failed_sources += planned.num_rows - planned["error_code"].null_count
        self.seconds["plan"] = time.perf_counter() - began

    def _config(self, find: FindAnswersConfig | None = None) -> FlowConfig:
        gpus = self.executor.gpu_count() if self.reading.uses_gpu else 0
        if self.reading.uses_gpu and not gpus:
            raise ConfigError(f"no GPU is in the cluster at {self.spec.address}: use --device cpu or --engine cpu")
        config = compose(
            self.spec,
            self.reading,
            run_uri=self.spec.output,
            run_id=self.run_id,
            worker_count=self.executor.worker_count,
            gpu_count=gpus,
            has_videos=bool(self.counts.records_by_kind["video"]),
            pass_index=self.second_pass or (self.again.pass_index if self.again else 0),
            is_second_look=self.second_pass is not None,
            find=find,
        )
        self.gpus_held = config.gpu_workers * config.gpus_per_worker
        return config

    def _run_owed(self) -> None:
        """Look at everything that is owed a first look, then once more at what that has left to a second.

        Raises:
            TransientError: attempts end and nothing that is owed comes out of them.
        """
        ledger = Ledger(self.storage)
        committed = ledger.committed_records()
        self.counts = count_plan(PlanReader(self.storage))
        self.progress.planned = self.counts.records
        self.progress.failed_sources = self.counts.failed_sources
        if self.spec.retry_failed or committed.retryable_count():
            # What failed for a passing reason is owed again on every call, once; the rest only when asked for.
            self.again = Again(only_retryable=not self.spec.retry_failed, pass_index=committed.last_pass() + 1)
        owed = count_owed(PlanReader(self.storage), committed, self.again)
        self.progress.resumed = self.counts.records - owed
        if owed:
            self._take_over(ledger, committed)
            owed -= self.progress.ledger_hits
        if not owed:
            return
        self.owed = owed
        self._look(ledger, committed)
        due = owed_units(PlanReader(self.storage), committed, second_look=True)
        waiting = sum(len(unit_keys(table)) for table in due)
        looks = second_look(self.spec, self.reading)
        if waiting and looks:
            self.observer.note(f"shown to the model once more, with {in_words(looks)}: {waiting} on which it failed")
            self.second_pass = committed.last_pass() + 1
            self._look(ledger, committed)

    def _look(self, ledger: Ledger, committed: CommittedRecords) -> None:
        """Run the flow over what is owed this look, again after a failed attempt, until nothing is.

        Raises:
            TransientError: attempts end and nothing that is owed comes out of them.
        """
        stalled, owed_before, failure, waits = 0, math.inf, None, True
        while True:
            units, owed = self._owed(committed)
            if not owed:
                return
            stalled = 0 if owed < owed_before else stalled + 1
            if stalled and failure is None:
                raise TransientError(f"the flow ended, and {owed} records that were owed did not come out of it")
            if stalled >= MOST_ATTEMPTS:
                raise TransientError(f"{MOST_ATTEMPTS} attempts ended without a new row: {failure}") from failure
            if failure is not None:
                self.observer.note(f"the flow broke off and is started again over what is owed: {failure}")
            owed_before = owed
            try:
                self._attempt(units, waits=waits)
                # What waited for another's answer has it now, or asks itself.
                failure, waits = None, False
            except (ServiceLostError, WorkersBrokenError):
                # Waited for long enough, and tried often enough, where the work is done.
                raise
            except TransientError as error:
                failure = error
            ledger.refresh()

    def _owed(self, committed: CommittedRecords) -> tuple[dict[str, list[Any]], int]:
        """Return the owed units of each head, held by the executor, and the number of owed records."""
        per_block = max(1, -(-self.counts.units // MOST_BLOCKS))
        owed = 0
        units: dict[str, list[Any]] = {}
        is_second = self.second_pass is not None
        first_looks = FirstLooks(self.storage, committed) if is_second else None
        for table in owed_units(PlanReader(self.storage), committed, self.again, second_look=is_second):
            keys = unit_keys(table)
            survived = first_looks.failures(keys) if first_looks else None
            ready = as_units(table, self.passwords, self.addresses, survived)
            owed += len(keys)
            if not units:
                self._start()
            # Small sources go together, as long as every worker has some.
            share = self.owed // (BLOCKS_PER_WORKER * self.executor.worker_count)
            for name in HEADS:
                mine = ready.filter(pa.array([head_of(kind) == name for kind in ready["kind"].to_pylist()]))
                blocks = unit_blocks(mine, per_block, min(share, RECORDS_PER_BLOCK[name]))
                units.setdefault(name, []).extend(self.executor.hold(block) for block in blocks)
        return units, owed

    def _start(self) -> None:
        self._phase("start")
        began = time.perf_counter()
        self._tell(self.executor.start())
        self.seconds["start"] = self.seconds.get("start", 0.0) + time.perf_counter() - began

    def _tell(self, notes: list[str]) -> None:
        for note in notes:
            self.observer.note(note)

    def _attempt(self, units: dict[str, list[Any]], *, waits: bool) -> None:
        self._phase("run")
        began = time.perf_counter()
        done_before = self.progress.run_seconds
        uris = (self.spec.output, *([self.shared.uri] if self.shared else []))
        # What is to be tried again must not meet its own earlier answer.
        since = self.started_at if self.spec.retry_failed else None
        answers = self.executor.share(AnswerIndex, uris, since)
        config = self._config(FindAnswersConfig(uris=uris, index=answers, waits=waits))
        try:
            for table in self.executor.run(record_flow(config), units, self._counted_deaths()):
                self.lease.check()
                self._count(table)
                self.progress.run_seconds = done_before + time.perf_counter() - began
        finally:
            answers.close()
            self.progress.run_seconds = done_before + time.perf_counter() - began
            self.seconds["run"] = self.progress.run_seconds
            self.progress.steps = self.executor.steps()

    def _counted_deaths(self) -> Shared:
        """Return what counts the deaths of workers, one for all attempts of this call."""
        if self.strikes is None:
            self.strikes = self.executor.share(Strikes, self.spec.output)
            if self.spec.retry_failed:
                self.strikes.call("pardon")
        return self.strikes

    def _count(self, table: pa.Table) -> None:
        for row in table.to_pylist():
            for name in TOKEN_COLUMNS:
                setattr(self.progress, name, getattr(self.progress, name) + (row[name] or 0))
            if row["needs_second_look"]:
                continue
            self.progress.known_answers += bool(row["ledger_hit"])
            self.progress.statuses[row["status"]] += 1
            self.progress.segments += row["kind"] == "video"
            self.progress.pages += row["kind"] != "video"
            self.progress.frames += row["frame_count_sampled"] or 0
            if row["error_code"]:
                self.progress.errors[CATEGORY_OF_CODE[row["error_code"]]] += 1
