"""The whole road: the same run on Ray Data and in a plain loop, stage by stage.

Both sides run in processes of their own, alternating, and do the same work on the same inputs; the result is compared
row by row before any rate is printed.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from jobs.bench.machine import MemoryWatch, machine_facts

SAMPLES = Path(__file__).parent.parent / "samples"
RUN_TIMEOUT_SECONDS = 3000


def run_once(task: str, inputs: list[str], options: list[str], output: Path, local: bool) -> dict[str, Any]:
    """Run the command line once and return its summary, with the peak memory of its processes.

    Raises:
        RuntimeError: the run did not end with status 0.
    """
    arguments = [sys.executable, "-m", "jobs", task, *inputs, "-o", str(output), "--json", *options]
    if local:
        arguments.append("--local")
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | {"RAY_DEDUP_LOGS": "0"}
        )
        with MemoryWatch(process.pid) as memory:
            stdout, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
        errors.seek(0)
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}: {errors.read()[-2000:]}")
    events = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    summary: dict[str, Any] = next(event for event in events if event["event"] == "summary")
    summary["peak_memory_mb"] = round(memory.peak_bytes / 2**20)
    summary["peak_process_mb"] = round(memory.peak_single_bytes / 2**20)
    return summary


def results_of(output: Path, task: str) -> list[tuple[Any, ...]]:
    """Return what a run answered, in order: what must be equal on both sides."""
    rows: list[tuple[Any, ...]] = []
    for name, part, text in (("pages", "page_id", "text"), ("video_segments", "segment_id", "caption")):
        files = sorted((output / name).glob("*.parquet"))
        for file in files:
            table = pq.read_table(file, columns=[part, "task", "status", text, "raw_output"])
            rows += [tuple(row.values()) for row in table.to_pylist() if row["task"] == task]
    return sorted(rows, key=repr)


def measure(task: str, inputs: list[str], options: list[str], repeat: int) -> dict[str, Any]:
    """Run both sides `repeat` times, alternating, and return medians, shares and ratios."""
    sides: dict[str, list[dict[str, Any]]] = {"ray": [], "loop": []}
    answers: dict[str, list[tuple[Any, ...]]] = {}
    with tempfile.TemporaryDirectory(prefix="pagereel-bench-") as folder:
        for attempt in range(repeat):
            for side in sides:
                output = Path(folder) / f"{side}-{attempt}"
                sides[side].append(run_once(task, inputs, options, output, local=side == "loop"))
                answers[side] = results_of(output, task)
    if answers["ray"] != answers["loop"]:
        raise RuntimeError("the two sides gave different rows: no rate is worth printing")
    ray, loop = (_median_side(sides[side]) for side in ("ray", "loop"))
    cores = os.cpu_count() or 1
    return {
        "bench": "end_to_end",
        "task": task,
        "ratio": round(loop["run_seconds"] / ray["run_seconds"], 3),
        "of_limit": round(loop["busy_seconds"] / cores / ray["run_seconds"], 3),
        "ratio_means": "rows per second of the flow on Ray Data over the same operators in a plain loop",
        "of_limit_means": "the plain loop's busy seconds spread over all cores without loss, over the flow's seconds",
        "rows_equal": len(answers["ray"]),
        "ray": ray,
        "loop": loop,
        "stage_share": _shares(sides["loop"][-1]["steps"]),
        "repeat": repeat,
        "machine": machine_facts(),
    }


def _median_side(runs: list[dict[str, Any]]) -> dict[str, Any]:
    def median(pick: Any) -> float:
        return round(float(statistics.median(pick(run) for run in runs)), 3)

    first = runs[0]
    run_seconds = median(lambda run: run["seconds"]["run"])
    return {
        "pages": first["pages"],
        "segments": first["segments"],
        "frames": first["frames"],
        "output_tokens": first["output_tokens"],
        "run_seconds": run_seconds,
        "start_seconds": median(lambda run: run["seconds"]["start"]),
        "plan_seconds": median(lambda run: run["seconds"]["plan"]),
        "publish_seconds": median(lambda run: run["seconds"]["publish"]),
        "total_seconds": median(lambda run: run["seconds"]["total"]),
        "busy_seconds": median(lambda run: sum(step["seconds"] for step in run["steps"].values())),
        "pages_per_second": round(first["pages"] / run_seconds, 3),
        "frames_per_second": round(first["frames"] / run_seconds, 3),
        "tokens_per_second": round(first["output_tokens"] / run_seconds, 3),
        "peak_memory_mb": median(lambda run: run["peak_memory_mb"]),
        "peak_process_mb": median(lambda run: run["peak_process_mb"]),
    }


def _shares(steps: dict[str, dict[str, Any]]) -> dict[str, float]:
    total = sum(step["seconds"] for step in steps.values()) or 1.0
    return {name: round(step["seconds"] / total, 4) for name, step in steps.items()}


def print_result(result: dict[str, Any]) -> None:
    """Print one table, and the JSON line last."""
    table = Table(
        title=f"end to end, task {result['task']}, {result['rows_equal']} equal rows, {result['repeat']} runs a side"
    )
    for column in ("", "on Ray Data", "plain loop"):
        table.add_column(column, justify="left" if not column else "right")
    for name in result["ray"]:
        table.add_row(name.replace("_", " "), f"{result['ray'][name]:g}", f"{result['loop'][name]:g}")
    for name, share in result["stage_share"].items():
        table.add_row(f"share of {name}", "", f"{share:.1%}")
    table.add_row("ratio (Ray over loop)", f"{result['ratio']:g}", "")
    table.add_row("of limit", f"{result['of_limit']:g}", "")
    Console().print(table)
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
