"""Rows for tests: plans and finished records, made through the public schemas."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from operators.base import rows_to_table
from schemas.errors import DecodeError, GenerationError, error_struct
from schemas.generation import RECORD
from schemas.ids import digest, record_key
from schemas.source import SOURCE, UNIT

SETTINGS = {"task": "ocr", "model": "none"}


class SteppingClock:
    """A clock that moves one second a look, so that earlier and later are never equal."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


def failure(code: str = "damaged", retryable: bool = False) -> dict[str, Any]:
    return error_struct(DecodeError(f"found {code}", code=code, retryable=retryable), "Test")


def loop_failure() -> dict[str, Any]:
    return error_struct(GenerationError("the answer loops", code="repetition"), "Test")


def source(index: int, **changes: Any) -> dict[str, Any]:
    row = {"source_index": index, "source_uri": f"/in/{index}.pdf", "size_bytes": 100 + index, "version_tag": "v1"}
    return row | changes


def sources_table(rows: list[dict[str, Any]]) -> pa.Table:
    return rows_to_table(rows, SOURCE)


def document_unit(index: int, page_numbers: list[int], doc: str | None = None, **changes: Any) -> dict[str, Any]:
    doc_id = digest(doc or f"bytes of {index}")
    row = {
        "unit_id": digest(index, *page_numbers)[:24],
        "source_index": index,
        "source_uri": f"/in/{index}.pdf",
        "task": "ocr",
        "doc_id": doc_id,
        "kind": "pdf",
        "mime_type": "application/pdf",
        "page_count": 99,
        "page_numbers": page_numbers,
        "record_keys": [record_key(doc_id, number, SETTINGS) for number in page_numbers],
    }
    return row | changes


def video_unit(index: int, segment_indexes: list[int], **changes: Any) -> dict[str, Any]:
    doc_id = digest(f"video {index}")
    segments = [
        {"segment_index": i, "start_seconds": 30.0 * i, "stop_seconds": 30.0 * (i + 1)} for i in segment_indexes
    ]
    row = {
        "unit_id": digest(index, "v", *segment_indexes)[:24],
        "source_index": index,
        "source_uri": f"/in/{index}.mp4",
        "task": "caption",
        "doc_id": doc_id,
        "kind": "video",
        "duration_seconds": 300.0,
        "fps": 25.0,
        "width_px": 640,
        "height_px": 360,
        "codec": "h264",
        "segments": segments,
        "record_keys": [record_key(doc_id, (s["start_seconds"], s["stop_seconds"]), SETTINGS) for s in segments],
    }
    return row | changes


def failed_unit(index: int, code: str = "encrypted", retryable: bool = False) -> dict[str, Any]:
    return {
        "unit_id": digest(index, "failed")[:24],
        "source_index": index,
        "source_uri": f"/in/{index}.pdf",
        "task": "ocr",
        "kind": "pdf",
        "error": failure(code, retryable),
    }


def units_table(rows: list[dict[str, Any]]) -> pa.Table:
    return rows_to_table(rows, UNIT)


def records_of(unit: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    """Return one finished record for each record key of `unit`; a page's text names its document and page."""
    places = unit.get("segments") or unit.get("page_numbers") or []
    rows = []
    for place, key in zip(places, unit["record_keys"], strict=True):
        row = {
            "unit_id": unit["unit_id"],
            "record_key": key,
            "source_index": unit["source_index"],
            "source_uri": unit["source_uri"],
            "doc_id": unit["doc_id"],
            "kind": unit["kind"],
            "task": unit["task"],
            "route": "model",
            "status": "success",
            "text": f"{unit['doc_id'][:6]} {place}",
            "prompt_tokens": 10,
            "output_tokens": 5,
            "finish_reason": "stop",
            "engine": "torch",
        }
        if unit["kind"] == "video":
            row |= {**place, "segmentation": "fixed_stride", "frame_timestamps_seconds": [place["start_seconds"]]}
        else:
            row |= {"page_number": place, "page_count": 99, "page_width_pt": 612.0, "page_height_pt": 792.0}
        rows.append(row | changes)
    return rows


def records_table(rows: list[dict[str, Any]]) -> pa.Table:
    return rows_to_table(rows, RECORD)
