"""RECORD rows to rows of the output tables: pure functions, no storage."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from pipeline.addresses import named_input
from pipeline.shell import shell_word
from pipeline.strikes import MOST_DEATHS
from schemas.errors import ContractError
from schemas.ids import block_id, digest, page_id, segment_id
from schemas.tables import ERRORS, PAGES, VIDEO_SEGMENTS
from schemas.vocabulary import FURNITURE_LABELS, QUIET_STATUSES

FAILED_STATUSES: Final = ("failure", "truncated", "repetition")
"""Statuses that an `error` may end a row with; any other becomes `failure`."""

WORKER_DIED: Final = "worker_died"

REPRO_TEMPLATE: Final = "pagereel ocr {source} {part} -o repro"

OUT_OF_PAGE_TOLERANCE_PT: Final = 1.0
TITLE_LEVEL: Final = 0
HEADER_LEVEL: Final = 1


@dataclass(frozen=True)
class RowContext:
    """What every row of one sink call shares.

    Attributes:
        repro_template: one line with `{source}` and `{part}`, such as `pagereel ocr {source} {part} -o repro`.
        max_slice_nums: most slices a page.
        clip_max_slice_nums: most slices a frame of a segment.
        max_attempts: answers that a model may try to give to a record.
    """

    run_id: str
    created_at: datetime
    repro_template: str
    downsample_mode: str | None = None
    max_slice_nums: int | None = None
    clip_max_slice_nums: int | None = None
    max_attempts: int | None = None


def final_status(record: Mapping[str, Any]) -> str:
    """Return the status of a record.

    Raises:
        ContractError: there is neither status nor error, or a status that owes an error row comes without a failure.
    """
    status: str | None = record["status"]
    if record["error"] is not None:
        return status if status in FAILED_STATUSES else "failure"
    if status is None:
        raise ContractError(f"record {record['record_key']} has neither a status nor an error")
    if status not in QUIET_STATUSES and not record["recovered"]:
        raise ContractError(f"record {record['record_key']} is {status!r}, but no failure is recorded in it")
    return status


def is_video(record: Mapping[str, Any]) -> bool:
    """Return whether a record is a segment of a video, not a page."""
    return bool(record["kind"] == "video")


def owner_ids(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of the page or segment of a record, null on the other side.

    Raises:
        ContractError: the record says neither which page nor which segment it is.
    """
    names = ("segment_index", "start_seconds", "stop_seconds") if is_video(record) else ("page_number",)
    place = [record[name] for name in names]
    if None in (record["doc_id"], *place):
        raise ContractError(f"record {record['record_key']} ({record['kind']}) has no document id or no place in it")
    if is_video(record):
        index, start_seconds, stop_seconds = place
        own_id = segment_id(record["doc_id"], start_seconds, stop_seconds)
        return {"video_id": record["doc_id"], "segment_id": own_id, "segment_index": index}
    [number] = place
    return {"doc_id": record["doc_id"], "page_id": page_id(record["doc_id"], number), "page_number": number}


def page_row(record: Mapping[str, Any], context: RowContext) -> dict[str, Any]:
    """Return the row of `pages`."""
    blocks = record["blocks"]
    row = _matching(record, PAGES.names) | _outcome(record, context) | owner_ids(record) | _answer(record)
    outside = [block for block in blocks or () if _is_outside(block["bbox"], record)]
    row["block_count"] = None if blocks is None else len(blocks)
    row["blocks_out_of_page_count"] = None if blocks is None else len(outside)
    return row


def segment_row(record: Mapping[str, Any], context: RowContext) -> dict[str, Any]:
    """Return the row of `video_segments`; facts of the whole video are joined in at publication."""
    row = _matching(record, VIDEO_SEGMENTS.names) | _outcome(record, context) | owner_ids(record)
    answer = _answer(record)
    row["raw_output"] = answer["raw_output"]
    row["ocr_text" if record["task"] in ("ocr", "parse") else "caption"] = answer["text"]
    row["frame_count"] = record["frame_count_sampled"]
    row["failure_reason"] = record["error"]["error_code"] if record["error"] else None
    return row


def block_rows(record: Mapping[str, Any], context: RowContext) -> Iterator[dict[str, Any]]:
    """Yield the rows of `blocks`, in reading order.

    Raises:
        ContractError: a parent is not a block of the page.
    """
    blocks: Sequence[Mapping[str, Any]] = record["blocks"] or ()
    owner = owner_ids(record)
    ids = [block_id(owner["page_id"], order) for order in range(len(blocks))]
    paths = section_paths(blocks, ids)
    for order, block in enumerate(blocks):
        parent = block["parent"]
        if parent is not None and not 0 <= parent < len(blocks):
            raise ContractError(f"{ids[order]}: parent {parent} is none of {len(blocks)} blocks")
        yield {
            **{name: value for name, value in block.items() if name != "parent"},
            **owner,
            "run_id": context.run_id,
            "record_key": record["record_key"],
            "block_id": ids[order],
            "parent_id": None if parent is None else ids[parent],
            "reading_order": order,
            "bbox_norm1000": norm1000(block["bbox"], record["page_width_pt"], record["page_height_pt"]),
            "is_derived": False,
            "is_furniture": block["label"] in FURNITURE_LABELS,
            "section_path": paths[order],
        }


def error_rows(record: Mapping[str, Any], context: RowContext) -> Iterator[dict[str, Any]]:
    """Yield one row of `errors` for each failure the record survived, then for the one that ended it."""
    failures = [(True, failure) for failure in record["recovered"] or ()]
    if record["error"] is not None:
        failures.append((False, record["error"]))
    shared = _matching(record, ERRORS.names) | owner_ids(record)
    shared.pop("segment_index", None)
    if is_video(record):
        shared["doc_id"] = None
    named = named_input(record["source_uri"], record.get("source_ref"))
    for position, (recovered, failure) in enumerate(failures):
        yield {
            **shared,
            **failure,
            "run_id": context.run_id,
            "created_at": context.created_at,
            "error_id": digest(record["record_key"], position)[:32],
            "recovered": recovered,
            "max_attempts": most_attempts(failure, context),
            "quarantined": failure["error_code"] == WORKER_DIED,
            "repro_command": repro_command(context.repro_template, named, record["page_number"]),
        }


def most_attempts(failure: Mapping[str, Any], context: RowContext) -> int | None:
    """Return how often a record may be tried that failed so: deaths of its worker, or answers of the model."""
    if failure["attempt"] is None:
        return None
    return MOST_DEATHS if failure["error_code"] == WORKER_DIED else context.max_attempts


def section_paths(blocks: Sequence[Mapping[str, Any]], ids: Sequence[str]) -> list[list[str] | None]:
    """Return for each block the ids of the headings above it, outermost first; null for furniture.

    A heading without a level counts as level 0 (title) or 1 (section header).
    """
    open_headings: list[tuple[int, str]] = []
    paths: list[list[str] | None] = []
    for block, own_id in zip(blocks, ids, strict=True):
        if block["label"] in FURNITURE_LABELS:
            paths.append(None)
            continue
        level = _heading_level(block)
        if level is not None:
            while open_headings and open_headings[-1][0] >= level:
                open_headings.pop()
        paths.append([heading for _, heading in open_headings])
        if level is not None:
            open_headings.append((level, own_id))
    return paths


def norm1000(bbox: Sequence[float] | None, width_pt: float | None, height_pt: float | None) -> list[int] | None:
    """Return a box in thousandths of the page, clamped to it; null without a box or a page size."""
    if bbox is None or not width_pt or not height_pt or not all(math.isfinite(value) for value in bbox):
        return None
    sides = (width_pt, height_pt, width_pt, height_pt)
    return [min(1000, max(0, round(1000 * value / side))) for value, side in zip(bbox, sides, strict=True)]


def repro_command(template: str, source: str, page_number: int | None) -> str:
    """Return the command that shows one failure again, as one line for a shell; `source` as `named_input` names it."""
    if page_number is None:
        template = template.replace(" {part}", "")
    return template.format(source=shell_word(source), part=f"--pages {page_number}")


def _matching(record: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: record[name] for name in names if name in record}


def _outcome(record: Mapping[str, Any], context: RowContext) -> dict[str, Any]:
    return {
        "run_id": context.run_id,
        "created_at": context.created_at,
        "status": final_status(record),
        "rung": record["rung"] if record["error"] is None else None,
        "downsample_mode": context.downsample_mode,
        "max_slice_nums": context.clip_max_slice_nums if is_video(record) else context.max_slice_nums,
        "slice_count": _slice_count(record),
        "ledger_hit": bool(record.get("ledger_hit")),
    }


def _slice_count(record: Mapping[str, Any]) -> int | None:
    """Return the slices of all images but their overviews; in a pack each frame has them."""
    grids = record["slice_grids"]
    if grids is None:
        return None
    packed = record["packing"] == "3d_resampler"
    frames = [len(ids) for ids in record["temporal_ids"]] if packed else [1] * len(grids)
    return sum(int(grid["rows"] * grid["cols"]) * count for grid, count in zip(grids, frames, strict=True))


def _answer(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return text and raw output; a failed row's text moves to `raw_output`."""
    if record["error"] is None:
        return {name: record[name] for name in ("text", "plain_text", "raw_output")}
    raw = next((record[name] for name in ("raw_output", "text", "completion") if record[name] is not None), None)
    return {"text": None, "plain_text": None, "raw_output": raw}


def _heading_level(block: Mapping[str, Any]) -> int | None:
    if block["label"] not in ("title", "section_header"):
        return None
    if block["level"] is not None:
        return int(block["level"])
    return TITLE_LEVEL if block["label"] == "title" else HEADER_LEVEL


def _is_outside(bbox: Sequence[float] | None, record: Mapping[str, Any]) -> bool:
    width, height = record["page_width_pt"], record["page_height_pt"]
    if bbox is None or not width or not height:
        return False
    slack = OUT_OF_PAGE_TOLERANCE_PT
    left, top, right, bottom = bbox
    return not (-slack <= left <= right <= width + slack and -slack <= top <= bottom <= height + slack)
