"""A run from beginning to end: list, plan, run what is owed, publish, prove by counting."""

import time
from dataclasses import dataclass
from typing import Any

from pipeline.accounting import Accounting, account
from pipeline.addresses import stored_uri
from pipeline.call import Call
from pipeline.commits import utc_now
from pipeline.compact import compact_if_needed
from pipeline.config import probe_config, probe_digest
from pipeline.intake import Intake
from pipeline.known_sources import Listed
from pipeline.ledger import Ledger
from pipeline.owed import Owed
from pipeline.plan import PlanCounts, PlanReader, count_owed, count_plan
from pipeline.progress import Observer, Silent
from pipeline.publish import publish, write_run_row
from pipeline.spec import RunSpec, make_spec
from pipeline.storage import Storage
from pipeline.summary import RunSummary, run_row, summarise
from pipeline.watch import Watch
from schemas.errors import ConfigError, TransientError


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
    call = Call(spec or make_spec(options), observer or Silent())
    intake = Intake(call)
    with call.lease, Watch(call.progress, call.executor, call.observer):
        call.write_run_file()
        try:
            counts = _read(call, intake)
            # First: a node that was lost may keep Ray from leaving, and then Ray ends this process.
            return _finish(call, intake, counts)
        finally:
            if leaves_ray:
                call.executor.close()


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
    call = Call(spec, observer or Silent())
    with call.lease:
        call.write_run_file()
        try:
            Intake(call).run()
        finally:
            call.executor.close()
        owed = count_owed(PlanReader(call.storage), Ledger(call.storage).committed_records())
        counts = count_plan(PlanReader(call.storage))
    call.seconds["total"] = time.perf_counter() - call.began
    return Planned(counts, owed, call.seconds)


def status_of(run_uri: str, *, verify: bool = False) -> Accounting:
    """Return the accounting of a run, which may be going on.

    Raises:
        ConfigError: there is no run at `run_uri`.
    """
    storage = Storage(run_uri)
    if not storage.exists("run.json"):
        raise ConfigError(f"{run_uri!r} is no run folder: it holds no run.json")
    return account(storage, check_parts=verify)


def _read(call: Call, intake: Intake) -> PlanCounts:
    """Bring everything that is owed to a row."""
    try:
        intake.run()
        owed = Owed(call, intake)
        owed.run()
    except TransientError:
        _give(call)
        raise
    return owed.counts


def _finish(call: Call, intake: Intake, counts: PlanCounts) -> RunSummary:
    """Publish what is committed, prove it by counting, and give it to the shared ledger."""
    call.phase("publish")
    began = time.perf_counter()
    template = call.spec.repro_template()
    compact_if_needed(Ledger(call.storage), call.run_id)
    publish(call.storage, call.run_id, repro_template=template, confirm=call.lease.confirm)
    accounting = account(call.storage)
    call.seconds["publish"] = time.perf_counter() - began
    call.seconds["total"] = time.perf_counter() - call.began
    summary = summarise(
        call.spec,
        call.reading,
        run_id=call.run_id,
        storage=call.storage,
        accounting=accounting,
        counts=counts,
        progress=call.progress,
        seconds=call.seconds,
        gpus_held=call.gpus_held,
    )
    write_run_row(call.storage, run_row(call.spec, call.reading, call.settings, summary, call.started_at, utc_now()))
    publish(call.storage, call.run_id, repro_template=template, confirm=call.lease.confirm)
    call.write_run_file(summary.as_dict())
    _give(call, None if call.spec.limit is not None else intake.listed)
    call.phase("done")
    return summary


def _give(call: Call, listed: Listed | None = None) -> None:
    """Give to the shared ledger what this run computed, and what was listed where that was everything."""
    if call.shared is None:
        return
    uri, digest_of_probe = stored_uri(call.spec.output), probe_digest(probe_config(call.spec, call.settings))
    try:
        given = call.shared.give(call.storage, uri, call.run_id, digest_of_probe, listed)
    except TransientError as error:
        call.observer.note(f"nothing was given to the ledger, the same command does: {error}")
        return
    if given.records or given.sources:
        call.observer.note(f"given to the ledger: {given.records} records, {given.sources} sources")
