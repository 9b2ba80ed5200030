"""`python -m jobs bench NAME`: one table, and one JSON line last."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

# Each benchmark is imported by its own command: some run where others' libraries are not installed.
app = typer.Typer(help="Benchmarks: both sides in one run, one table, one JSON line.", add_completion=False)

Result = Annotated[Path | None, typer.Option("--save", help="Also write the JSON to this file.")]
Sizes = Annotated[
    list[str] | None,
    typer.Option("--size", help="tiny, middle or full; tiny and middle by default, on a GPU full as well."),
]


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
    from jobs.bench import end_to_end

    given = inputs or [str(end_to_end.SAMPLES)]
    options = [*(option or []), *(["--model", model] if model else ["--engine", "cpu"])]
    result = end_to_end.measure(task, given, options, repeat)
    result["inputs"] = [Path(name).name for name in given]
    result["model"] = model
    end_to_end.print_result(result)
    save_result(result, save)


@app.command("vision")
def run_vision(
    size: Sizes = None,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs a side.")] = 7,
    device: Annotated[Literal["auto", "cuda", "cpu"], typer.Option(help="auto takes CUDA where it is.")] = "auto",
    dtype: Annotated[Literal["auto", "bf16", "fp32"], typer.Option(help="auto: bf16 on CUDA, fp32 on CPU.")] = "auto",
    crops: Annotated[int | None, typer.Option(min=1, help="Pictures; as many as each size has by default.")] = None,
    save: Result = None,
) -> None:
    """The vision pass: all crops at once, against transformers' pass and against one at a time."""
    from jobs.bench import vision
    from jobs.bench.vision_work import SCALES
    from operators.minicpmv.device import choose_device, choose_dtype

    chosen = choose_device(device)
    known = list(SCALES)
    if not set(size or ()) <= set(known):
        raise typer.BadParameter(f"there are {', '.join(known)}", param_hint="--size")
    result = vision.measure(
        size or known[: 3 if chosen.type == "cuda" else 2], chosen, choose_dtype(dtype, chosen), repeat, crops
    )
    vision.print_result(result)
    save_result(result, save)


@app.command("engine")
def run_engine(
    size: Annotated[Literal["middle", "full"], typer.Option(help="Of the network; full has the released numbers.")] = (
        "middle"
    ),
    requests: Annotated[int, typer.Option(min=2, help="Pages and clips that are asked for.")] = 48,
    longest: Annotated[int, typer.Option(min=16, help="Tokens of the longest answer.")] = 2000,
    slots: Annotated[int, typer.Option(min=1, help="Slots of the engine.")] = 8,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Sizes of static batches; the best counts. By default 1, 2 and 4 times the slots."),
    ] = None,
    max_slices: Annotated[int, typer.Option(min=1, help="Most slices a page.")] = 9,
    plain: Annotated[bool, typer.Option(help="Also transformers with its own recurrence, which is slower.")] = True,
    device: Annotated[Literal["auto", "cuda", "cpu"], typer.Option(help="auto takes CUDA where it is.")] = "auto",
    dtype: Annotated[Literal["auto", "bf16", "fp32"], typer.Option(help="auto: bf16 on CUDA, fp32 on CPU.")] = "auto",
    save: Result = None,
) -> None:
    """The engine on mixed requests, against `generate` of transformers in static batches."""
    from jobs.bench import engine
    from operators.minicpmv.device import choose_device, choose_dtype

    chosen = choose_device(device)
    result = engine.measure(
        size,
        chosen,
        choose_dtype(dtype, chosen),
        requests=requests,
        longest=longest,
        slots=slots,
        batches=batch or [slots, 2 * slots, 4 * slots],
        max_slices=max_slices,
        plain=plain,
    )
    engine.print_result(result)
    save_result(result, save)


@app.command("structured")
def run_structured(
    size: Annotated[Literal["middle", "full"], typer.Option(help="Of the network.")] = "middle",
    vocabulary: Annotated[int, typer.Option(min=1000, help="Tokens of the vocabulary; 151748 for 4.5.")] = 248094,
    slots: Annotated[int, typer.Option(min=1, help="Answers that are written together.")] = 8,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each answer.")] = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Runs a side.")] = 3,
    device: Annotated[Literal["auto", "cuda", "cpu"], typer.Option(help="auto takes CUDA where it is.")] = "auto",
    dtype: Annotated[Literal["auto", "bf16", "fp32"], typer.Option(help="auto: bf16 on CUDA, fp32 on CPU.")] = "auto",
    save: Result = None,
) -> None:
    """Answers that follow a JSON schema against free ones."""
    from jobs.bench import structured
    from operators.minicpmv.device import choose_device, choose_dtype

    chosen = choose_device(device)
    work = structured.Work(size, vocabulary, slots, tokens, repeat)
    result = structured.measure(work, chosen, choose_dtype(dtype, chosen))
    structured.print_result(result)
    save_result(result, save)


@app.command("isolation")
def run_isolation(
    files: Annotated[list[Path] | None, typer.Argument(help="Files; the shipped samples by default.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Timed calls a side and unit.")] = 9,
    save: Result = None,
) -> None:
    """Decoders in a process of their own against the same decoders called in process."""
    from jobs.bench import isolation

    result = isolation.measure(files or sorted(isolation.SAMPLES.glob("*/*.*")), repeat)
    isolation.print_result(result)
    save_result(result, save)


@app.command("nightly")
def run_nightly(
    sources: Annotated[int, typer.Option(min=1, help="Documents of one page.")] = 10_000,
    scans: Annotated[int, typer.Option(min=0, help="How many of them a model must read.")] = 8,
    save: Result = None,
) -> None:
    """The same corpus a second night, with the ledger of the first."""
    from jobs.bench import nightly

    result = nightly.measure_nights(sources, scans)
    nightly.print_nights(result)
    save_result(result, save)


@app.command("manifest")
def run_manifest(
    entries: Annotated[int, typer.Option(min=1, help="Entries of the manifest.")] = 1_000_000, save: Result = None
) -> None:
    """A manifest of a million entries, planned: seconds, and the memory of the driver."""
    from jobs.bench import nightly

    result = nightly.measure_manifest(entries)
    nightly.print_manifest(result)
    save_result(result, save)


def save_result(result: dict[str, Any], path: Path | None) -> None:
    """Write a result where it is asked for."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Run one benchmark."""
    app(arguments, prog_name="python -m jobs bench")
