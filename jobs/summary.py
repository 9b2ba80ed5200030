"""What a person reads at the end of a command."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.display import duration
from jobs.terminal import visible
from pipeline.accounting import Accounting
from pipeline.preview import PlanReport
from pipeline.summary import RunSummary


def _console() -> Console:
    # A pipe has no width: rich would break every line at 80 characters.
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    return table


def _counts(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(values.items(), key=lambda item: -item[1])) or "none"


def print_summary(summary: RunSummary) -> None:
    """Print what a run did, whether everything is accounted for, and where the tables are."""
    table = _grid()
    table.add_row("task", Text(f"{summary.task}, {_engine(summary)}"))
    table.add_row("sources", Text(f"{summary.sources} ({summary.failed_sources} could not be opened)"))
    table.add_row("rows", Text(_counts(summary.statuses)))
    if summary.routes:
        table.add_row("pages read by", Text(_counts(summary.routes)))
    table.add_row("errors", Text(_counts(summary.errors)))
    table.add_row("this call", Text(_work(summary)))
    table.add_row("time", Text(_times(summary.seconds)))
    if summary.output_tokens:
        wasted = f" and {summary.tokens_wasted} in vain" if summary.tokens_wasted else ""
        table.add_row("tokens", Text(f"{summary.output_tokens} written{wasted}, {summary.image_tokens} visual"))
    if summary.cost is not None:
        per_million = summary.cost_per_million_pages
        table.add_row(
            "cost", Text(f"{summary.cost:.4f}" + (f", {per_million:.2f} per million pages" if per_million else ""))
        )
    console = _console()
    console.print(table)
    console.print(Text(_identity(summary), style="green" if summary.complete else "bold red"))
    for problem in summary.problems:
        console.print(Text(f"problem: {visible(problem)}", style="red"))
    tables = "{pages,blocks,video_segments,documents,errors,runs}/*.parquet"
    console.print(Text(f"tables: {visible(summary.output)}/{tables}"))
    if summary.weights_kind == "demo_random":
        console.print(
            Text("The model of this run has random weights: what it wrote means nothing (raw_output, captions).")
        )


def _engine(summary: RunSummary) -> str:
    if summary.engine == "cpu":
        return f"CPU engine {summary.model_id} ({summary.engine_reason})"
    if summary.engine == "endpoint":
        return f"model {summary.model_id} on a server"
    return f"model {summary.model_id} ({summary.weights_kind})"


def _identity(summary: RunSummary) -> str:
    rows = sum(summary.statuses.values())
    sign = "=" if summary.complete else "!="
    return (
        f"accounted for: {summary.planned} pages and segments planned {sign} {rows} rows; "
        f"{summary.failed_sources} sources not opened, each with an error row"
        if summary.complete
        else f"incomplete: {summary.planned} pages and segments planned, {rows} rows; the same command resumes"
    )


def _work(summary: RunSummary) -> str:
    run_seconds = summary.seconds.get("run", 0.0)
    parts = [f"{summary.pages} pages", f"{summary.segments} segments"]
    if summary.frames:
        parts.append(f"{summary.frames} frames")
    if summary.resumed:
        parts.append(f"{summary.resumed} were done before")
    if summary.ledger_hits:
        parts.append(f"{summary.ledger_hits} taken over from the ledger")
    if summary.known_answers:
        parts.append(f"{summary.known_answers} took an answer that was given before to the same page")
    if summary.computed and run_seconds:
        parts.append(f"{summary.computed / run_seconds:.2f} a second")
    return ", ".join(parts)


def _times(seconds: dict[str, float]) -> str:
    named = [f"{name} {duration(value)}" for name, value in seconds.items() if name != "total" and value >= 0.5]
    return f"{duration(seconds.get('total'))}" + (f" ({', '.join(named)})" if named else "")


def print_status(accounting: Accounting, run: str, *, as_json: bool) -> None:
    """Print the accounting of a run."""
    if as_json:
        _write_json({"run": run, **accounting.as_dict()})
        return
    table = _grid()
    for name, value in accounting.table():
        table.add_row(name, Text(visible(value)))
    _console().print(table)


def print_plan(report: PlanReport, *, as_json: bool) -> None:
    """Print what a run would do."""
    counts = report.counts
    if as_json:
        _write_json(
            {
                "engine": report.reading.engine,
                "reason": report.reading.reason,
                "model_id": report.reading.model_id,
                "sources": counts.sources,
                "failed_sources": counts.failed_sources,
                "units": counts.units,
                "records": counts.records,
                "records_by_kind": dict(counts.records_by_kind),
                "errors": dict(report.errors),
                "passed_over": report.passed_over,
                "steps": report.steps,
            }
        )
        return
    table = _grid()
    table.add_row("engine", Text(f"{report.reading.engine}: {report.reading.reason}"))
    table.add_row(
        "sources", f"{counts.sources} ({counts.failed_sources} cannot be opened: {_counts(dict(report.errors))})"
    )
    table.add_row("units", Text(str(counts.units)))
    table.add_row("rows owed", Text(f"{counts.records} ({_counts(dict(counts.records_by_kind))})"))
    if report.passed_over:
        table.add_row("passed over", Text(f"{report.passed_over} files that are no documents or videos by their names"))
    console = _console()
    console.print(table)
    console.print(_steps_table(report.steps))


def _steps_table(steps: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table(title="flow", title_justify="left", box=None, padding=(0, 2), header_style="dim")
    for column in ("", "step", "reads columns", "adds columns", "workers", "CPUs", "GPUs", "rows a batch"):
        table.add_column(column)
    for part, rows in steps.items():
        for place, step in enumerate(rows):
            workers = "same worker" if step["same_worker"] else "-".join(str(n) for n in dict.fromkeys(step["workers"]))
            table.add_row(
                "" if place else part,
                step["step"],
                str(step["reads"]),
                str(step["adds"]),
                workers,
                "" if step["same_worker"] else f"{step['cpus']:g}",
                f"{step['gpus']:g}" if step["gpus"] else "",
                str(step["rows_per_batch"] or "as they come"),
            )
    return table


def _write_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=1, default=str) + "\n")
