"""Output tables: the exact columns of every Parquet table that a run writes."""

from collections.abc import Mapping
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import CATEGORY_OF_CODE, STAGES, ContractError
from schemas.source import SOURCE_REF
from schemas.vocabulary import (
    BLOCK_LABELS,
    ENGINES,
    FINISH_REASONS,
    KINDS,
    PACKINGS,
    PARSE_STATUSES,
    ROUTES,
    RUNGS,
    SCHEMA_VERSION,
    SEGMENTATIONS,
    STATUSES,
    WEIGHTS_KINDS,
)

VERSION_KEY: Final = b"pagereel.schema_version"
TABLE_KEY: Final = b"pagereel.table"

CREATED_AT: Final = pa.timestamp("us", tz="UTC")

_OUTCOME = [
    pa.field("route", pa.string()),
    pa.field("route_reason", pa.string()),
    pa.field("rung", pa.string()),
    pa.field("engine", pa.string()),
    pa.field("weights_kind", pa.string()),
    pa.field("model_id", pa.string()),
    pa.field("model_revision", pa.string()),
    pa.field("prompt_id", pa.string()),
    pa.field("prompt_sha256", pa.string()),
    pa.field("decode_params", pa.string()),
    pa.field("downsample_mode", pa.string()),
    pa.field("max_slice_nums", pa.int16()),
    pa.field("slice_count", pa.int16()),
    pa.field("attempt", pa.int16()),
    pa.field("temperature", pa.float32()),
    pa.field("finish_reason", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("image_tokens", pa.int32()),
    pa.field("output_tokens", pa.int32()),
    pa.field("tokens_saved", pa.int32()),
    pa.field("tokens_wasted", pa.int32()),
    pa.field("thought", pa.large_string()),
    pa.field("queue_ms", pa.float32()),
    pa.field("generate_ms", pa.float32()),
    pa.field("confidence", pa.float32()),
    pa.field("content_key", pa.string()),
    pa.field("ledger_hit", pa.bool_()),
    pa.field("created_at", CREATED_AT),
]
"""How an answer came about; the same columns for pages and segments. `rung` says what answered where a model was asked,
null where nothing did; `attempt` and `temperature` are those of the model's last attempt, which counts on over other
pixels."""


def _table(name: str, fields: list[pa.Field]) -> pa.Schema:
    return pa.schema(fields, metadata={VERSION_KEY: SCHEMA_VERSION.encode(), TABLE_KEY: name.encode()})


PAGES: Final = _table(
    "pages",
    [
        pa.field("run_id", pa.string()),
        pa.field("doc_id", pa.string()),
        pa.field("page_id", pa.string()),
        pa.field("record_key", pa.string()),
        pa.field("source_uri", pa.string()),
        pa.field("source_ref", SOURCE_REF),
        pa.field("page_number", pa.int32()),
        pa.field("page_count", pa.int32()),
        pa.field("task", pa.string()),
        pa.field("status", pa.string()),
        pa.field("text", pa.large_string()),
        pa.field("plain_text", pa.large_string()),
        pa.field("raw_output", pa.large_string()),
        pa.field("page_width_pt", pa.float32()),
        pa.field("page_height_pt", pa.float32()),
        pa.field("image_width_px", pa.int32()),
        pa.field("image_height_px", pa.int32()),
        pa.field("dpi", pa.float32()),
        pa.field("rotation", pa.int16()),
        pa.field("skew_degrees", pa.float32()),
        pa.field("has_text_layer", pa.bool_()),
        pa.field("text_layer_chars", pa.int32()),
        pa.field("text_layer_agreement", pa.float32()),
        pa.field("primary_language", pa.string()),
        pa.field("is_table", pa.bool_()),
        pa.field("is_diagram", pa.bool_()),
        pa.field("parse_status", pa.string()),
        pa.field("block_count", pa.int32()),
        pa.field("blocks_out_of_page_count", pa.int32()),
        pa.field("render_ms", pa.float32()),
        pa.field("image_ref", pa.string()),
        *_OUTCOME,
    ],
)
"""One row a page and task. `slice_count` leaves the overview out; `block_count` is null where the task gives no
blocks."""

BLOCKS: Final = _table(
    "blocks",
    [
        pa.field("run_id", pa.string()),
        pa.field("doc_id", pa.string()),
        pa.field("page_id", pa.string()),
        pa.field("page_number", pa.int32()),
        pa.field("record_key", pa.string()),
        pa.field("block_id", pa.string()),
        pa.field("parent_id", pa.string()),
        pa.field("reading_order", pa.int32()),
        pa.field("label", pa.string()),
        pa.field("label_raw", pa.string()),
        pa.field("level", pa.int8()),
        pa.field("bbox", pa.list_(pa.float32())),
        pa.field("bbox_norm1000", pa.list_(pa.int16())),
        pa.field("polygon", pa.list_(pa.float32())),
        pa.field("text", pa.large_string()),
        pa.field("markdown", pa.large_string()),
        pa.field("html", pa.large_string()),
        pa.field("latex", pa.large_string()),
        pa.field("score", pa.float32()),
        pa.field("image_ref", pa.string()),
        pa.field("continues_from", pa.string()),
        pa.field("merged_from", pa.list_(pa.string())),
        pa.field("is_derived", pa.bool_()),
        pa.field("is_furniture", pa.bool_()),
        pa.field("section_path", pa.list_(pa.string())),
    ],
)
"""One row a layout block. `bbox` is left, top, right, bottom in PDF points, origin top-left, after page rotation; on
scans that were turned or deskewed the page is the corrected one (`rotation`, `skew_degrees` in `pages`)."""

EVENT: Final = pa.struct(
    [
        pa.field("start_seconds", pa.float64()),
        pa.field("stop_seconds", pa.float64()),
        pa.field("text", pa.large_string()),
    ]
)

VIDEO_SEGMENTS: Final = _table(
    "video_segments",
    [
        pa.field("run_id", pa.string()),
        pa.field("video_id", pa.string()),
        pa.field("segment_id", pa.string()),
        pa.field("record_key", pa.string()),
        pa.field("source_uri", pa.string()),
        pa.field("source_ref", SOURCE_REF),
        pa.field("segment_index", pa.int32()),
        pa.field("start_seconds", pa.float64()),
        pa.field("stop_seconds", pa.float64()),
        pa.field("start_frame", pa.int64()),
        pa.field("stop_frame", pa.int64()),
        pa.field("segmentation", pa.string()),
        pa.field("scene_score", pa.float32()),
        pa.field("video_duration_seconds", pa.float64()),
        pa.field("video_fps", pa.float64()),
        pa.field("video_width_px", pa.int32()),
        pa.field("video_height_px", pa.int32()),
        pa.field("video_codec", pa.string()),
        pa.field("sampling_policy", pa.string()),
        pa.field("target_fps", pa.float32()),
        pa.field("sampled_fps", pa.float32()),
        pa.field("frame_count", pa.int32()),
        pa.field("frame_timestamps_seconds", pa.list_(pa.float64())),
        pa.field("packing", pa.string()),
        pa.field("temporal_ids", pa.list_(pa.list_(pa.int32()))),
        pa.field("pack_count", pa.int32()),
        pa.field("decoder", pa.string()),
        pa.field("task", pa.string()),
        pa.field("status", pa.string()),
        pa.field("failure_reason", pa.string()),
        pa.field("caption", pa.large_string()),
        pa.field("caption_short", pa.large_string()),
        pa.field("ocr_text", pa.large_string()),
        pa.field("tags", pa.list_(pa.string())),
        pa.field("events", pa.list_(EVENT)),
        pa.field("raw_output", pa.large_string()),
        pa.field("primary_language", pa.string()),
        pa.field("motion_score", pa.float32()),
        pa.field("thumbnail_ref", pa.string()),
        pa.field("clip_ref", pa.string()),
        *_OUTCOME,
    ],
)
"""One row a video segment and task; times are half-open. `frame_count` is the number of sampled frames;
`failure_reason` is the error code of a segment that failed."""

ERRORS: Final = _table(
    "errors",
    [
        pa.field("run_id", pa.string()),
        pa.field("error_id", pa.string()),
        pa.field("created_at", CREATED_AT),
        pa.field("record_key", pa.string()),
        pa.field("doc_id", pa.string()),
        pa.field("page_id", pa.string()),
        pa.field("page_number", pa.int32()),
        pa.field("video_id", pa.string()),
        pa.field("segment_id", pa.string()),
        pa.field("source_uri", pa.string()),
        pa.field("source_ref", SOURCE_REF),
        pa.field("task", pa.string()),
        pa.field("stage", pa.string()),
        pa.field("component", pa.string()),
        pa.field("module_name", pa.string()),
        pa.field("error_code", pa.string()),
        pa.field("error_category", pa.string()),
        pa.field("exception_type", pa.string()),
        pa.field("message", pa.string()),
        pa.field("traceback", pa.string()),
        pa.field("exit_signal", pa.int16()),
        pa.field("retryable", pa.bool_()),
        pa.field("recovered", pa.bool_()),
        pa.field("attempt", pa.int16()),
        pa.field("max_attempts", pa.int16()),
        pa.field("quarantined", pa.bool_()),
        pa.field("batch_id", pa.string()),
        pa.field("batch_size", pa.int32()),
        pa.field("bisect_depth", pa.int16()),
        pa.field("node_id", pa.string()),
        pa.field("actor_id", pa.string()),
        pa.field("gpu_name", pa.string()),
        pa.field("gpu_mem_used", pa.int64()),
        pa.field("repro_command", pa.string()),
    ],
)
"""One row a failure event. `record_key` is null where a source could not be opened; `attempt` is the model's attempt
that failed, of `max_attempts` that one record may have; `gpu_mem_used` is in bytes."""

PAGE_SPAN: Final = pa.struct(
    [pa.field("start", pa.int64()), pa.field("end", pa.int64()), pa.field("page_number", pa.int32())]
)

DOCUMENTS: Final = _table(
    "documents",
    [
        pa.field("run_id", pa.string()),
        pa.field("doc_id", pa.string()),
        pa.field("source_uri", pa.string()),
        pa.field("source_ref", SOURCE_REF),
        pa.field("kind", pa.string()),
        pa.field("mime_type", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("page_count", pa.int32()),
        pa.field("pages_requested", pa.int32()),
        pa.field("segment_count", pa.int32()),
        pa.field("success_count", pa.int32()),
        pa.field("partial_count", pa.int32()),
        pa.field("fallback_count", pa.int32()),
        pa.field("failed_count", pa.int32()),
        pa.field("skipped_count", pa.int32()),
        pa.field("owed_count", pa.int32()),
        pa.field("status", pa.string()),
        pa.field("route", pa.string()),
        pa.field("title", pa.string()),
        pa.field("pdf_producer", pa.string()),
        pa.field("is_encrypted", pa.bool_()),
        pa.field("duration_seconds", pa.float64()),
        pa.field("fps", pa.float64()),
        pa.field("codec", pa.string()),
        pa.field("width_px", pa.int32()),
        pa.field("height_px", pa.int32()),
        pa.field("frame_count", pa.int64()),
        pa.field("stream_note", pa.string()),
        pa.field("text", pa.large_string()),
        pa.field("page_spans", pa.list_(PAGE_SPAN)),
    ],
)
"""One row a source, files that could not be opened included.

The counts add up to the planned records of the source: `success_count` holds success and blank, `partial_count`
partial_success, `failed_count` failure, truncated and repetition, `owed_count` those without a row yet. `status` is
null while any is owed. `start` and `end` of a span count characters of `text`."""

RUNS: Final = _table(
    "runs",
    [
        pa.field("run_id", pa.string()),
        pa.field("command", pa.string()),
        pa.field("task", pa.string()),
        pa.field("config", pa.string()),
        pa.field("config_sha256", pa.string()),
        pa.field("package_version", pa.string()),
        pa.field("python_version", pa.string()),
        pa.field("ray_version", pa.string()),
        pa.field("torch_version", pa.string()),
        pa.field("transformers_version", pa.string()),
        pa.field("driver_version", pa.string()),
        pa.field("gpu_name", pa.string()),
        pa.field("gpu_count", pa.int32()),
        pa.field("engine", pa.string()),
        pa.field("model_id", pa.string()),
        pa.field("model_revision", pa.string()),
        pa.field("weights_kind", pa.string()),
        pa.field("started_at", CREATED_AT),
        pa.field("ended_at", CREATED_AT),
        pa.field("source_count", pa.int64()),
        pa.field("record_count", pa.int64()),
        pa.field("page_count", pa.int64()),
        pa.field("segment_count", pa.int64()),
        pa.field("success_count", pa.int64()),
        pa.field("failed_count", pa.int64()),
        pa.field("error_count", pa.int64()),
        pa.field("prompt_tokens", pa.int64()),
        pa.field("image_tokens", pa.int64()),
        pa.field("output_tokens", pa.int64()),
        pa.field("tokens_saved", pa.int64()),
        pa.field("tokens_wasted", pa.int64()),
        pa.field("gpu_seconds", pa.float64()),
        pa.field("pages_per_second_cold", pa.float64()),
        pa.field("pages_per_second_warm", pa.float64()),
        pa.field("price_per_gpu_hour", pa.float64()),
        pa.field("cost_per_million_pages", pa.float64()),
        pa.field("ledger_hits", pa.int64()),
    ],
)
"""One row each time a driver worked on the run; counts are of that invocation. `config` is JSON without secrets."""

TABLES: Final[Mapping[str, pa.Schema]] = {
    "pages": PAGES,
    "blocks": BLOCKS,
    "video_segments": VIDEO_SEGMENTS,
    "documents": DOCUMENTS,
    "errors": ERRORS,
    "runs": RUNS,
}
"""Every table, by the name of its folder."""

PART_TABLES: Final = ("pages", "blocks", "video_segments", "errors")
"""Tables that the sink writes in parts; the others are made at publication."""

DOCUMENT_ROUTES: Final = (*ROUTES, "mixed")
DOCUMENT_KINDS: Final = (*KINDS, None)

_OUTCOME_WORDS: Final[Mapping[str, tuple[str | None, ...]]] = {
    "status": STATUSES,
    "route": (*ROUTES, None),
    "rung": (*RUNGS, None),
    "engine": (*ENGINES, None),
    "weights_kind": (*WEIGHTS_KINDS, None),
    "finish_reason": (*FINISH_REASONS, None),
}

VOCABULARY: Final[Mapping[str, Mapping[str, tuple[str | None, ...]]]] = {
    "pages": {**_OUTCOME_WORDS, "parse_status": (*PARSE_STATUSES, None)},
    "blocks": {"label": BLOCK_LABELS},
    "video_segments": {
        **_OUTCOME_WORDS,
        "segmentation": (*SEGMENTATIONS, None),
        "packing": (*PACKINGS, None),
    },
    "documents": {"status": (*STATUSES, None), "kind": DOCUMENT_KINDS, "route": (*DOCUMENT_ROUTES, None)},
    "errors": {
        "stage": STAGES,
        "error_code": tuple(CATEGORY_OF_CODE),
        "error_category": tuple(dict.fromkeys(CATEGORY_OF_CODE.values())),
    },
    "runs": {"engine": (*ENGINES, None), "weights_kind": (*WEIGHTS_KINDS, None)},
}
"""Closed columns of each table; None among the words means that the column may be null."""


def check_vocabulary(table_name: str, table: pa.Table) -> None:
    """Raise unless every closed column of `table` holds only its words.

    Args:
        table_name: a key of `TABLES`.
        table: rows of that table; more columns are fine.

    Raises:
        ContractError: a value is outside its vocabulary; the message names column and value.
    """
    for column, words in VOCABULARY[table_name].items():
        for value in pc.unique(table.column(column)).to_pylist():
            if value not in words:
                raise ContractError(f"{table_name}.{column} is {value!r}, wanted one of {list(words)}")
