"""What a run would do, found out without doing it."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from pipeline.config import compose
from pipeline.executor import LocalExecutor
from pipeline.flow import plan_flow, record_flow
from pipeline.local import rebatch
from pipeline.plan import PlanCounts
from pipeline.reading import Reading, choose_reading
from pipeline.request import check_request, listed
from pipeline.source import Listing
from pipeline.spec import RunSpec
from pipeline.step import Step

SOURCES_AT_ONCE = 64


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
    tables = rebatch(listed(spec, listing), SOURCES_AT_ONCE)
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


def _step_facts(step: Step) -> dict[str, Any]:
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
