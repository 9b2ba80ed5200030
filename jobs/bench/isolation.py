"""Decoding in a process of its own against the same decoders called in process, which is the ceiling.

Both sides run in one process, in turns, on the same units with the options of a run: pages as `ocr` decodes them (the
text layer is judged, and a page is rendered where it cannot be trusted), the same pages all rendered, as `caption`
wants them, and segments of videos. What comes out is compared before any rate is printed, and both sides look at every
byte of it, as whoever uses the pixels does.

Two costs are measured. Seconds are what a caller waits; there a box may win, because the next page is decoded while the
last one is looked at. Processor seconds, of both processes together, are what isolation adds to the work.
"""

import json
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.bench.machine import machine_facts
from operators.decode.box import DecoderBox
from operators.decode.child import load_function
from operators.decode.pages import PageOptions
from operators.decode.sniff import sniff
from operators.decode.video_options import SegmentOptions

SAMPLES = Path(__file__).parent.parent / "samples"
UNIT_PAGES = 10
SEGMENT_SECONDS = 30.0
UNIT_SEGMENTS = 2
TIMEOUT_SECONDS = 300.0
PRODUCTION_GROUPS = ("pages", "images", "segments")


@dataclass
class Unit:
    """One call of a decoder, as a run makes it, and how long it took.

    Attributes:
        group: what it counts to.
        name: of its file.
        function: the decoder.
        arguments: what the decoder is called with.
        seconds: of each timed call, by side.
        cpu_seconds: of this process and the decoder's, for the same calls.
        outcome: parts, bytes of pixels and their checksum; the same on both sides.
    """

    group: str
    name: str
    function: str
    arguments: dict[str, Any]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)
    outcome: tuple[int, int, int] | None = None


Side = Callable[[Unit], Iterator[Any]]


def measure(paths: list[Path], repeat: int) -> dict[str, Any]:
    """Decode every unit of `paths` on both sides `repeat` times, in turns, and return medians and ratios.

    Raises:
        RuntimeError: the two sides gave different pixels.
    """
    box = DecoderBox()
    sides: dict[str, Side] = {"boxed": lambda unit: boxed(box, unit), "in_process": in_process}
    try:
        units = [unit for path in paths for unit in units_of(path, box)]
        for unit in units:
            # This round imports decoders and fills caches, too.
            compare(unit, sides)
            for _ in range(repeat):
                sides = dict(reversed(sides.items()))
                time_both(unit, sides, box)
    finally:
        box.close()
    groups = {group: group_report(group, units) for group in dict.fromkeys(unit.group for unit in units)}
    production = [groups[group] for group in PRODUCTION_GROUPS if group in groups]
    ratio = sum(found["in_process_seconds"] for found in production) / sum(
        found["boxed_seconds"] for found in production
    )
    cpu_ratio = sum(found["boxed_cpu_seconds"] for found in production) / sum(
        found["in_process_cpu_seconds"] for found in production
    )
    return {
        "bench": "isolation",
        "ratio": round(ratio, 4),
        "of_limit": round(ratio, 4),
        "ratio_means": "seconds of the decoders called in process over their seconds in a box, over what a run decodes",
        "of_limit_means": "the same: decoders called in process are the ceiling",
        "overhead": round(1 / ratio - 1, 4),
        "cpu_overhead": round(cpu_ratio - 1, 4),
        "groups": groups,
        "files": [path.name for path in paths],
        "repeat": repeat,
        "machine": machine_facts(),
    }


def units_of(path: Path, box: DecoderBox) -> list[Unit]:
    """Return the units of one file; a PDF has them twice, once with every page rendered."""
    kind = sniff(path).kind
    if kind == "video":
        return segment_units(path, box)
    facts = box.call(f"operators.decode.{kind}:probe", page_arguments(path, max_pages=20_000), timeout_seconds=60)
    found = []
    for group, render in (("images", "untrusted"),) if kind == "image" else (("pages", "untrusted"), ("all", "always")):
        for first in range(1, facts["page_count"] + 1, UNIT_PAGES):
            numbers = list(range(first, min(first + UNIT_PAGES, facts["page_count"] + 1)))
            options = PageOptions.model_validate({"render": render})
            arguments = page_arguments(path, page_numbers=numbers, options=options)
            name = "pages, all rendered" if group == "all" else group
            found.append(Unit(name, path.name, f"operators.decode.{kind}:decode_pages", arguments))
    return found


def page_arguments(path: Path, **more: Any) -> dict[str, Any]:
    """Return the arguments of a decoder of documents."""
    return {"path": str(path), "password": None, **more}


def segment_units(path: Path, box: DecoderBox) -> list[Unit]:
    """Return the units of a video."""
    arguments = {"path": str(path), "limits": {"max_duration_seconds": 100_000.0}}
    duration_seconds = box.call("operators.decode.video:probe", arguments, timeout_seconds=60)["duration_seconds"]
    segments: list[dict[str, Any]] = []
    while not segments or segments[-1]["stop_seconds"] < duration_seconds:
        start_seconds = len(segments) * SEGMENT_SECONDS
        stop_seconds = min(start_seconds + SEGMENT_SECONDS, duration_seconds)
        segments.append({"segment_index": len(segments), "start_seconds": start_seconds, "stop_seconds": stop_seconds})
    shares = [segments[first : first + UNIT_SEGMENTS] for first in range(0, len(segments), UNIT_SEGMENTS)]
    function = "operators.decode.segments:decode_segments"
    return [
        Unit("segments", path.name, function, {"path": str(path), "segments": share, "options": SegmentOptions()})
        for share in shares
    ]


def boxed(box: DecoderBox, unit: Unit) -> Iterator[Any]:
    """Yield what the decoder gives in its own process."""
    return box.stream(
        unit.function, unit.arguments, first_timeout_seconds=TIMEOUT_SECONDS, next_timeout_seconds=TIMEOUT_SECONDS
    )


def in_process(unit: Unit) -> Iterator[Any]:
    """Yield what the decoder gives in this process."""
    return load_function(unit.function)(**unit.arguments)


def compare(unit: Unit, sides: dict[str, Side]) -> None:
    """Decode a unit once on each side, and keep what came out.

    Raises:
        RuntimeError: they gave different pixels.
    """
    found = {name: checksum_of(side(unit)) for name, side in sides.items()}
    if len(set(found.values())) > 1:
        raise RuntimeError(f"{unit.name}: the two sides differ, no rate is worth printing: {found}")
    [unit.outcome] = set(found.values())


def checksum_of(items: Iterator[Any]) -> tuple[int, int, int]:
    """Return how many pages or segments came, the bytes of their pixels, and a checksum."""
    parts = pixel_bytes = checksum = 0
    for item in items:
        parts += isinstance(item, dict) or getattr(item, "is_last", False)
        pixels = pixels_of(item)
        if pixels is not None:
            pixel_bytes += pixels.nbytes
            checksum = zlib.crc32(pixels, checksum)
    return parts, pixel_bytes, checksum


def time_both(unit: Unit, sides: dict[str, Side], box: DecoderBox) -> None:
    """Decode a unit once on each side, and note what it cost."""
    for name, side in sides.items():
        start, cpu_start = time.perf_counter(), cpu_seconds(box)
        look_at(side(unit))
        unit.seconds.setdefault(name, []).append(time.perf_counter() - start)
        unit.cpu_seconds.setdefault(name, []).append(cpu_seconds(box) - cpu_start)


def look_at(items: Iterator[Any]) -> None:
    """Read every byte of the pixels, and let go of each item before the next one comes, as a step of a flow does."""
    for item in items:
        pixels = pixels_of(item)
        if pixels is not None:
            pixels.max()
        del item, pixels


def pixels_of(item: Any) -> Any:
    """Return the pixels of a step of a page or of a segment; None where there are none."""
    return item.get("pixels") if isinstance(item, dict) else getattr(item, "image", None)


def cpu_seconds(box: DecoderBox) -> float:
    """Return the processor time so far of this process and of the decoder's."""
    if box.process_id is None:
        return time.process_time()
    # The kernel's number of another process's clock, as clock_getcpuclockid(3) gives it.
    decoder_seconds: float = time.clock_gettime((~box.process_id << 3) | 2)
    return decoder_seconds + time.process_time()


def group_report(group: str, units: list[Unit]) -> dict[str, Any]:
    """Return medians of one group, summed over its units."""
    chosen = [unit for unit in units if unit.group == group]
    boxed_seconds, own_seconds = (summed_medians(chosen, side, "seconds") for side in ("boxed", "in_process"))
    boxed_cpu, own_cpu = (summed_medians(chosen, side, "cpu_seconds") for side in ("boxed", "in_process"))
    parts, pixel_bytes = (sum(unit.outcome[place] for unit in chosen if unit.outcome) for place in (0, 1))
    return {
        "units": len(chosen),
        "parts": parts,
        "pixel_mb": round(pixel_bytes / 1e6, 1),
        "boxed_seconds": round(boxed_seconds, 4),
        "in_process_seconds": round(own_seconds, 4),
        "boxed_cpu_seconds": round(boxed_cpu, 4),
        "in_process_cpu_seconds": round(own_cpu, 4),
        "boxed_ms_a_part": round(boxed_seconds / parts * 1000, 2),
        "in_process_ms_a_part": round(own_seconds / parts * 1000, 2),
        "overhead": round(boxed_seconds / own_seconds - 1, 4),
        "cpu_overhead": round(boxed_cpu / own_cpu - 1, 4),
    }


def summed_medians(units: list[Unit], side: str, cost: str) -> float:
    """Return the medians of one cost on one side, summed over units."""
    medians: list[float] = [statistics.median(getattr(unit, cost)[side]) for unit in units]
    return sum(medians)


def overheads(found: dict[str, Any]) -> tuple[str, str]:
    """Return both overheads for people."""
    return f"{found['overhead']:.1%}", f"{found['cpu_overhead']:.1%}"


def print_result(result: dict[str, Any]) -> None:
    """Print one table, and the JSON line last."""
    files, repeat = len(result["files"]), result["repeat"]
    table = Table(title=f"decoder isolation, {files} files, medians of {repeat} calls a side")
    columns = ("parts", "pixel_mb", "boxed_ms_a_part", "in_process_ms_a_part")
    for column in ("", *columns, "overhead", "of processor time"):
        table.add_column(column.replace("_", " "), justify="right" if column else "left")
    for name, found in result["groups"].items():
        table.add_row(name, *(f"{found[column]:g}" for column in columns), *overheads(found))
    table.add_row("what a run decodes", *("" for _ in columns), *overheads(result))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
