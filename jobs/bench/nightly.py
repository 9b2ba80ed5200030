"""Nights: the same corpus a second time, with the ledger of the first; and a manifest of a million entries, planned.

The second night must answer nothing and open no file. What bounds it is to look at every file and to read the rows and
write them anew, which is measured beside it with bare Arrow.
"""

import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pymupdf
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from jobs.bench.end_to_end import run_once
from jobs.bench.machine import machine_facts

WORDS = "Pack my box with five dozen liquor jugs. The quick brown fox jumps over the lazy dog. " * 3
PAGES_A_FILE = 1000
TABLES = ("pages", "blocks", "video_segments", "errors", "documents")


def write_corpus(folder: Path, sources: int, scans: int) -> None:
    """Write one-page PDFs, the last `scans` of them pictures that a model must read."""
    folder.mkdir()
    for index in range(sources):
        document = pymupdf.open()
        page = document.new_page(width=300, height=200)
        if index < sources - scans:
            page.insert_textbox((20, 20, 280, 180), f"Page {index}. {WORDS}", fontsize=9)
        else:
            picture = Image.new("L", (300, 200), 255)
            ImageDraw.Draw(picture).text((20, 80), f"Scan {index}", fill=0, font_size=24)
            page.insert_image(page.rect, stream=_png(picture))
        document.save(folder / f"{index:06d}.pdf")
        document.close()


def measure_nights(sources: int, scans: int) -> dict[str, Any]:
    """Run two nights over one corpus and return their seconds, and those of the bare work of the second.

    Raises:
        RuntimeError: the second night computed something, or wrote other rows than the first.
    """
    with tempfile.TemporaryDirectory(prefix="pagereel-bench-") as name:
        root = Path(name)
        write_corpus(root / "in", sources, scans)
        options = ["--model", "demo", "--max-new-tokens", "4", "--attempts", "1", "--no-second-look"]
        options += ["--ledger", str(root / "ledger")]
        nights = [run_once("ocr", [str(root / "in")], options, root / night, local=False) for night in ("1", "2")]
        again = run_once("ocr", [str(root / "in")], options, root / "2", local=False)
        bare_seconds = _bare_seconds(root / "in", root / "1", root / "bare")
        if nights[1]["computed"] or nights[1]["prompt_tokens"] or nights[1]["steps"]:
            raise RuntimeError(f"the second night computed {nights[1]['computed']} records")
        if _rows(root / "1") != _rows(root / "2"):
            raise RuntimeError("the nights gave different rows: no time is worth printing")
    first, second = nights
    return {
        "bench": "nightly",
        "ratio": round(first["seconds"]["total"] / second["seconds"]["total"], 2),
        "of_limit": round(bare_seconds / second["seconds"]["total"], 3),
        "ratio_means": "seconds of the first night over those of the second, which takes all rows from the ledger",
        "of_limit_means": "seconds to look at every file and to copy the rows with bare Arrow, over the second night's",
        "sources": sources,
        "scans": scans,
        "first_night": _figures(first),
        "second_night": _figures(second),
        "same_folder_again": _figures(again),
        "bare_seconds": round(bare_seconds, 3),
        "machine": machine_facts(),
    }


def measure_manifest(entries: int) -> dict[str, Any]:
    """Plan a manifest of `entries` pages, once by opening the files and once from a ledger that knows them.

    Returns:
        Seconds and the peak memory of the process that plans, workers left out.
    """
    with tempfile.TemporaryDirectory(prefix="pagereel-bench-") as name:
        root = Path(name)
        manifest = write_manifest(root, entries)
        first = plan_once(manifest, root / "1", None)
        second = plan_once(manifest, root / "1", None)
    return {
        "bench": "manifest",
        "ratio": round(first["seconds"]["total"] / second["seconds"]["total"], 2),
        "ratio_means": "seconds to plan by opening files over seconds to plan again what is planned",
        "entries": entries,
        "first": first,
        "again": second,
        "entries_per_second": round(entries / first["seconds"]["total"], 1),
        "machine": machine_facts(),
    }


def write_manifest(root: Path, entries: int) -> Path:
    """Write documents of a thousand pages, and a manifest that names every page of them as an entry of its own."""
    uris: list[str] = []
    pages: list[str] = []
    for start in range(0, entries, PAGES_A_FILE):
        path = root / f"{start:08d}.pdf"
        document = pymupdf.open()
        for number in range(min(PAGES_A_FILE, entries - start)):
            document.new_page(width=200, height=100)
            uris.append(path.name)
            pages.append(str(number + 1))
        # Equal bytes would be one document.
        document.set_metadata({"title": path.name})
        document.save(path)
        document.close()
    manifest = root / "manifest.parquet"
    pq.write_table(pa.table({"uri": uris, "pages": pages}), manifest, row_group_size=50_000)
    return manifest


def plan_once(manifest: Path, output: Path, ledger: Path | None) -> dict[str, Any]:
    """Plan in a process of its own and return its figures."""
    code = "import sys; from jobs.bench.nightly import plan_here; plan_here(*sys.argv[1:])"
    arguments = [sys.executable, "-c", code, str(manifest), str(output), str(ledger or "")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def plan_here(manifest: str, output: str, ledger: str) -> None:
    """Plan in this process, and print seconds and its own peak memory as JSON."""
    from pipeline.runner import plan_run
    from pipeline.spec import make_spec

    spec = make_spec({"task": "ocr", "inputs": [manifest], "output": output, "engine": "cpu", "ledger": ledger or None})
    planned = plan_run(spec)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {
        "sources": planned.counts.sources,
        "records": planned.counts.records,
        "owed": planned.owed,
        "seconds": {name: round(value, 2) for name, value in planned.seconds.items()},
        "driver_peak_mb": round(peak / 2**20),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


def print_nights(result: dict[str, Any]) -> None:
    """Print one table, and the JSON line last."""
    table = Table(title=f"two nights over {result['sources']} sources, {result['scans']} of them scans")
    sides = ("first_night", "second_night", "same_folder_again")
    for column in ("", *(side.replace("_", " ") for side in sides)):
        table.add_column(column, justify="left" if not column else "right")
    for name in result["first_night"]:
        table.add_row(name.replace("_", " "), *(f"{result[side][name]:g}" for side in sides))
    table.add_row("ratio", "", f"{result['ratio']:g}", "")
    table.add_row("of limit", "", f"{result['of_limit']:g}", "")
    Console().print(table)
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")


def print_manifest(result: dict[str, Any]) -> None:
    """Print one table, and the JSON line last."""
    table = Table(title=f"a manifest of {result['entries']} entries, planned")
    for column in ("", "first", "again"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("sources", "records", "owed", "driver_peak_mb"):
        table.add_row(name.replace("_", " "), f"{result['first'][name]:g}", f"{result['again'][name]:g}")
    for name in result["first"]["seconds"]:
        cells = [f"{result[side]['seconds'].get(name, 0):g}" for side in ("first", "again")]
        table.add_row(f"seconds: {name}", *cells)
    Console().print(table)
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")


def _figures(summary: dict[str, Any]) -> dict[str, Any]:
    names = ("planned", "computed", "ledger_hits", "prompt_tokens", "peak_memory_mb")
    seconds = {f"{name}_seconds": round(value, 2) for name, value in summary["seconds"].items()}
    return {name: summary[name] for name in names} | seconds


def _bare_seconds(inputs: Path, run: Path, copy: Path) -> float:
    began = time.perf_counter()
    for path in sorted(inputs.iterdir()):
        path.stat()
    copy.mkdir()
    for name in TABLES:
        pq.write_table(pq.read_table(run / name), copy / f"{name}.parquet", compression="zstd")
    return time.perf_counter() - began


def _rows(run: Path) -> list[tuple[Any, ...]]:
    table = pq.read_table(run / "pages", columns=["record_key", "status", "text", "raw_output", "output_tokens"])
    return [tuple(row.values()) for row in table.to_pylist()]


def _png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()
