"""`pagereel show RUN`: a look at what a run wrote, without leaving the terminal."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from rich.console import Console
from rich.text import Text

from jobs.terminal import visible
from pipeline.publish import Manifest, published_tables, read_manifest
from pipeline.storage import Storage
from schemas.errors import ConfigError

PAGE_COLUMNS = [
    "source_uri", "page_id", "page_number", "page_count", "task", "status", "route", "route_reason", "engine",
    "weights_kind", "rotation", "skew_degrees", "text", "raw_output",
]  # fmt: skip
SEGMENT_COLUMNS = [
    "source_uri", "segment_id", "start_seconds", "stop_seconds", "task", "status", "frame_count", "weights_kind",
    "caption", "ocr_text", "raw_output",
]  # fmt: skip
ERROR_COLUMNS = ["source_uri", "page_number", "error_code", "error_category", "recovered", "message", "repro_command"]
STATUS_STYLES = {
    "success": "green",
    "blank": "green",
    "skipped": "dim",
    "partial_success": "yellow",
    "fallback": "yellow",
}


def show(run: str, *, chars: int, limit: int) -> None:
    """Print the first rows of the published tables of a run.

    Args:
        run: the run folder.
        chars: characters of each text.
        limit: rows of each table.

    Raises:
        ConfigError: nothing is published there.
    """
    storage = Storage(run)
    manifest = read_manifest(storage)
    if manifest is None:
        raise ConfigError(f"{run!r} holds no published tables")
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    blocks = _block_labels(storage, manifest)
    for row in _first(storage, manifest, "pages", PAGE_COLUMNS, limit):
        _show_page(console, row, blocks.get(row.get("page_id", "")), chars)
    for row in _first(storage, manifest, "video_segments", SEGMENT_COLUMNS, limit):
        _show_segment(console, row, chars)
    for row in _first(storage, manifest, "errors", ERROR_COLUMNS, limit):
        _show_error(console, row)


def _first(
    storage: Storage, manifest: Manifest, table_name: str, columns: list[str], limit: int
) -> Iterator[dict[str, Any]]:
    left = limit
    for table in published_tables(storage, manifest, table_name, columns):
        yield from table.slice(0, left).to_pylist()
        left -= table.num_rows
        if left <= 0:
            more = sum(file.rows for file in manifest.tables[table_name]) - limit
            if more > 0:
                yield {"more": more}
            return


def name_of(row: dict[str, Any]) -> str:
    """Return the name of a row's file, as a terminal may show it."""
    return visible(PurePosixPath(row["source_uri"] or "?").name)


def _block_labels(storage: Storage, manifest: Manifest) -> dict[str, Counter[str]]:
    labels: dict[str, Counter[str]] = {}
    for table in published_tables(storage, manifest, "blocks", ["page_id", "label"]):
        for page_id, label in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
            labels.setdefault(page_id, Counter())[label] += 1
    return labels


def _show_page(console: Console, row: dict[str, Any], blocks: Counter[str] | None, chars: int) -> None:
    if "more" in row:
        console.print(Text(f"... and {row['more']} more pages", style="dim"))
        return
    head = Text(f"{name_of(row)} page {row['page_number']}/{row['page_count']}  ", style="bold")
    head.append(row["status"], style=STATUS_STYLES.get(row["status"], "red"))
    head.append(visible(f"  {row['route']}: {row['route_reason']}") if row["route"] else "", style="dim")
    if row["rotation"] or row["skew_degrees"]:
        head.append(f"  turned {row['rotation']}, skew {row['skew_degrees'] or 0:.1f}", style="dim")
    console.print(head)
    if blocks:
        console.print(
            Text("  blocks: " + ", ".join(f"{label} {count}" for label, count in blocks.most_common()), "dim")
        )
    _show_text(console, row, row["text"], chars)


def _show_segment(console: Console, row: dict[str, Any], chars: int) -> None:
    if "more" in row:
        console.print(Text(f"... and {row['more']} more segments", style="dim"))
        return
    head = Text(f"{name_of(row)} ", style="bold")
    head.append(f"{row['start_seconds']:.1f}-{row['stop_seconds']:.1f} s, {row['frame_count'] or 0} frames  ")
    head.append(row["status"], style=STATUS_STYLES.get(row["status"], "red"))
    console.print(head)
    _show_text(console, row, row["caption"] if row["task"] == "caption" else row["ocr_text"], chars)


def _show_text(console: Console, row: dict[str, Any], text: str | None, chars: int) -> None:
    shown, mark = text or "", ""
    if row["weights_kind"] == "demo_random" and row.get("route", "model") == "model":
        mark = "[random weights, no meaning] "
    if text is None and row["raw_output"]:
        shown, mark = row["raw_output"], mark + "[not accepted] "
    words = " ".join(shown.split())
    if words or mark:
        console.print(Text(f"  {mark}{visible(words[:chars])}{'...' if len(words) > chars else ''}"))


def _show_error(console: Console, row: dict[str, Any]) -> None:
    if "more" in row:
        console.print(Text(f"... and {row['more']} more errors", style="dim"))
        return
    page = f" page {row['page_number']}" if row["page_number"] else ""
    kind = "survived" if row["recovered"] else "error"
    head = Text(f"{kind}: {name_of(row)}{page}  ", style="yellow" if row["recovered"] else "red")
    message = visible(" ".join(row["message"].split())[:200])
    head.append(f"{row['error_category']}/{row['error_code']}: {message}")
    console.print(head)
