"""`python -m jobs bench NAME`: one table, and one JSON line last."""

import json
from pathlib import Path
from typing import Annotated

import typer

from jobs.bench import end_to_end

app = typer.Typer(help="Benchmarks: both sides in one run, one table, one JSON line.", add_completion=False)

Result = Annotated[Path | None, typer.Option("--save", help="Also write the JSON to this file.")]


@app.callback()
def benchmarks() -> None:
    """Benchmarks: both sides in one run, one table, one JSON line."""


@app.command("end_to_end")
def run_end_to_end(
    inputs: Annotated[list[str] | None, typer.Argument(help="Inputs; the shipped samples by default.")] = None,
    task: Annotated[str, typer.Option(help="ocr, parse or caption.")] = "parse",
    model: Annotated[str | None, typer.Option(help="A model; none reads with the CPU engine.")] = "demo",
    repeat: Annotated[int, typer.Option(min=1, help="Runs a side.")] = 3,
    option: Annotated[list[str] | None, typer.Option(help="More options of the run, e.g. --option=--fps=2.")] = None,
    save: Result = None,
) -> None:
    """The whole road on Ray Data against the same operators in a plain loop."""
    given = inputs or [str(end_to_end.SAMPLES)]
    options = [*(option or []), *(["--model", model] if model else ["--engine", "cpu"])]
    result = end_to_end.measure(task, given, options, repeat)
    result["inputs"] = [Path(name).name for name in given]
    result["model"] = model
    end_to_end.print_result(result)
    if save:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Run one benchmark."""
    app(arguments, prog_name="python -m jobs bench")
