"""What a run says at its end, and the row it leaves in `runs`."""

import platform
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pipeline.accounting import Accounting
from pipeline.config import Settings
from pipeline.plan import PlanCounts
from pipeline.progress import Progress
from pipeline.publish import published_tables, read_manifest
from pipeline.reading import Reading
from pipeline.spec import RunSpec
from pipeline.storage import Storage
from pipeline.versions import versions
from schemas.vocabulary import QUIET_STATUSES

PHASES = ("list", "start", "plan", "take_over", "run", "publish", "total")


@dataclass
class RunSummary:
    """What a run says at its end; counts are of the whole run folder, rates of this call.

    Attributes:
        ledger_hits: records whose rows this call took over from a shared ledger.
        known_answers: other records whose answer was given before to what they show.
        complete: every planned record has exactly one row, and the tables agree with each other.
        statuses: committed pages and segments of the run, by status.
        errors: error rows of the run, by category.
        seconds: `list`, `plan`, `start`, `take_over`, `run`, `publish`, `total` of this call.
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
    ledger_hits: int = 0
    known_answers: int = 0
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
    tokens_saved: int = 0
    tokens_wasted: int = 0
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


def summarise(
    spec: RunSpec,
    reading: Reading,
    *,
    run_id: str,
    storage: Storage,
    accounting: Accounting,
    counts: PlanCounts,
    progress: Progress,
    seconds: dict[str, float],
    gpus_held: float,
) -> RunSummary:
    """Return the summary of one call.

    Args:
        spec: what was asked for.
        reading: who read.
        run_id: this call.
        storage: the run folder, published.
        accounting: proof by counting.
        counts: of the plan.
        progress: what this call did.
        seconds: of each phase.
        gpus_held: GPUs that its workers held.
    """
    gpu_seconds = progress.run_seconds * gpus_held
    price = spec.price_per_gpu_hour
    cost = gpu_seconds / 3600 * price if price is not None else None
    return RunSummary(
        run_id=run_id,
        output=spec.output,
        task=spec.task,
        engine=reading.engine,
        engine_reason=reading.reason,
        model_id=reading.model_id,
        weights_kind=reading.weights_kind,
        complete=accounting.complete,
        problems=list(accounting.problems),
        sources=counts.sources,
        failed_sources=counts.failed_sources,
        planned=counts.records,
        resumed=progress.resumed,
        ledger_hits=progress.ledger_hits,
        known_answers=progress.known_answers,
        computed=progress.done,
        pages=progress.pages,
        segments=progress.segments,
        frames=progress.frames,
        statuses=dict(accounting.statuses),
        routes=_published_counts(storage, "pages", "route"),
        errors=_published_counts(storage, "errors", "error_category"),
        prompt_tokens=progress.prompt_tokens,
        image_tokens=progress.image_tokens,
        output_tokens=progress.output_tokens,
        tokens_saved=progress.tokens_saved,
        tokens_wasted=progress.tokens_wasted,
        seconds={name: round(seconds.get(name, 0.0), 3) for name in PHASES},
        gpu_seconds=round(gpu_seconds, 3),
        cost=cost,
        cost_per_million_pages=cost / progress.pages * 1e6 if cost is not None and progress.pages else None,
        steps=progress.steps,
    )


def _published_counts(storage: Storage, table_name: str, column: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    manifest = read_manifest(storage)
    if manifest is not None:
        for table in published_tables(storage, manifest, table_name, [column]):
            counts.update(value for value in table[column].to_pylist() if value is not None)
    return dict(counts)


def run_row(
    spec: RunSpec, reading: Reading, settings: Settings, summary: RunSummary, began: datetime, ended: datetime
) -> dict[str, Any]:
    """Return the row of `runs` that `summary` makes."""
    found = versions()
    total, warm = summary.seconds["total"], summary.seconds["run"]
    good = sum(summary.statuses.get(name, 0) for name in QUIET_STATUSES)
    return {
        "run_id": summary.run_id,
        "command": f"pagereel {spec.task}",
        "task": spec.task,
        "config": settings.text,
        "config_sha256": settings.digest,
        "package_version": found["pagereel"],
        "python_version": platform.python_version(),
        "ray_version": found["ray"],
        "torch_version": found["torch"],
        "transformers_version": found["transformers"],
        "engine": summary.engine,
        "model_id": summary.model_id,
        "model_revision": reading.model_revision,
        "weights_kind": summary.weights_kind,
        "started_at": began,
        "ended_at": ended,
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
        "tokens_saved": summary.tokens_saved,
        "tokens_wasted": summary.tokens_wasted,
        "gpu_seconds": summary.gpu_seconds,
        "pages_per_second_cold": summary.pages / total if total else None,
        "pages_per_second_warm": summary.pages / warm if warm else None,
        "price_per_gpu_hour": spec.price_per_gpu_hour,
        "cost_per_million_pages": summary.cost_per_million_pages,
        "ledger_hits": summary.ledger_hits,
    }
