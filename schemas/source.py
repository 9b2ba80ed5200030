"""Sources and units: what a run was given, and what one decode task opens."""

from typing import Final

import pyarrow as pa

from schemas.errors import ERROR

SOURCE_REF: Final = pa.struct(
    [
        pa.field("path", pa.string()),
        pa.field("member", pa.string()),
        pa.field("byte_offset", pa.int64()),
        pa.field("byte_size", pa.int64()),
    ]
)

SOURCE: Final = pa.schema(
    [
        pa.field("source_index", pa.int64()),
        pa.field("source_uri", pa.string()),
        pa.field("source_ref", SOURCE_REF),
        pa.field("size_bytes", pa.int64()),
        pa.field("version_tag", pa.string()),
        pa.field("page_ranges", pa.string()),
        pa.field("password", pa.string()),
        pa.field("start_seconds", pa.float64()),
        pa.field("stop_seconds", pa.float64()),
        pa.field("error", ERROR),
    ]
)
"""One listed input object. `version_tag` is its mtime or etag: with uri and size it tells an unchanged file.
`source_index` is its place in the listing and orders the tables. `page_ranges` as in `--pages`: "1-5,8"."""

SOURCE_FACTS: Final = pa.schema(
    [
        pa.field("doc_id", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("mime_type", pa.string()),
        pa.field("page_count", pa.int32()),
        pa.field("is_encrypted", pa.bool_()),
        pa.field("title", pa.string()),
        pa.field("pdf_producer", pa.string()),
        pa.field("duration_seconds", pa.float64()),
        pa.field("fps", pa.float64()),
        pa.field("frame_count", pa.int64()),
        pa.field("codec", pa.string()),
        pa.field("width_px", pa.int32()),
        pa.field("height_px", pa.int32()),
        pa.field("stream_note", pa.string()),
    ]
)
"""What a probe finds; null where it does not apply. Sizes of videos are after rotation; `stream_note` says which
of several video streams was taken."""

SEGMENT_RANGE: Final = pa.struct(
    [
        pa.field("segment_index", pa.int32()),
        pa.field("start_seconds", pa.float64()),
        pa.field("stop_seconds", pa.float64()),
    ]
)
"""A half-open time range of a video."""

UNIT: Final = pa.schema(
    [
        pa.field("unit_id", pa.string()),
        pa.field("source_index", pa.int64()),
        pa.field("source_uri", pa.string()),
        pa.field("source_ref", SOURCE_REF),
        pa.field("password", pa.string()),
        pa.field("task", pa.string()),
        *SOURCE_FACTS,
        pa.field("page_numbers", pa.list_(pa.int32())),
        pa.field("segments", pa.list_(SEGMENT_RANGE)),
        pa.field("record_keys", pa.list_(pa.string())),
        pa.field("survived", pa.list_(pa.list_(ERROR))),
        pa.field("error", ERROR),
    ]
)
"""What one decode task opens. `page_numbers` (documents) or `segments` (videos) lie parallel to `record_keys`;
the other list is null. `survived`, parallel to them too, holds what the model's earlier attempts at each record failed
on; null at the first look. A source that cannot be opened is one unit with an error and no records."""
