"""`python -m tests.long`: a long run over pages and one over clips, a table each, and one JSON line last.

Its status is 1 when anything grew or was left. Pages and clips have runs of their own: in one run the clips would come
last, and the workers would grow by a step that is no leak.

Run it from a copy of the tree that nobody edits: workers refuse code that changes under them.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.bench.machine import machine_facts
from tests.long.long_run import Work, long_run


def main() -> int:
    """Run, print, save."""
    parser = argparse.ArgumentParser(prog="python -m tests.long")
    parser.add_argument("--pages", type=int, default=50_000, help="pages with a text layer, 50 a file")
    parser.add_argument("--pictures", type=int, default=500, help="pages that the demo model reads")
    parser.add_argument("--clips", type=int, default=2_000, help="videos of one second")
    parser.add_argument("--object-store-mb", type=int, default=300, help="size of the object store")
    parser.add_argument("--folder", type=Path, help="where inputs and tables lie for the time of the run")
    parser.add_argument("--save", type=Path, help="also write the JSON to this file")
    given = parser.parse_args()
    options = [f"--object-store-mb={given.object_store_mb}", "--max-new-tokens=16", "--no-second-look"]
    works = (Work(pages=given.pages, pictures=given.pictures), Work(clips=given.clips))
    runs = [long_run(work, options, given.folder) for work in works if work.records]
    for run in runs:
        print_result(run)
    problems = [problem for run in runs for problem in run["problems"]]
    result = {"bench": "long_run", "runs": runs, "problems": problems, "machine": machine_facts()}
    if given.save:
        given.save.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
    return 1 if problems else 0


def print_result(result: dict[str, object]) -> None:
    """Print one table and the problems."""
    table = Table(title=f"long run: {result['rows']} rows in {result['seconds']} s, {result['samples']} samples")
    names = ("processes_most", "memory_median_mb", "memory_peak_mb", "memory_rise_mb", "descriptors_peak")
    for column in ("role", *names):
        table.add_column(column.replace("_", " "), justify="left" if column == "role" else "right")
    roles = result["roles"]
    assert isinstance(roles, dict)
    for role, found in roles.items():
        table.add_row(role, *(f"{found[name]:g}" for name in names))
    console = Console(soft_wrap=True, width=140)
    console.print(table)
    problems = result["problems"]
    assert isinstance(problems, list)
    for problem in problems or ["flat, and nothing left"]:
        console.print(problem, markup=False)


if __name__ == "__main__":
    sys.exit(main())
