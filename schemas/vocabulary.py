"""Closed vocabularies of the output tables, and the schema version."""

from typing import Final

SCHEMA_VERSION: Final = "2"
"""Raised by every change to a table; kept in each Parquet footer as `pagereel.schema_version`."""

STATUSES: Final = (
    "success", "partial_success", "fallback", "truncated", "repetition", "blank", "skipped", "failure",
)  # fmt: skip
QUIET_STATUSES: Final = ("success", "blank", "skipped")
"""Statuses that owe no error row."""

TASKS: Final = ("ocr", "parse", "caption")
KINDS: Final = ("pdf", "image", "video")
ROUTES: Final = ("text_layer", "model", "cpu", "none")
RUNGS: Final = ("first", "same_pixels", "text_layer", "other_pixels", "cpu")
"""Of the ladder that a failed answer of a model goes down, in its order: another attempt at the same pixels, the page's
own text, the model once more at other pixels, the CPU engine."""

ENGINES: Final = ("torch", "endpoint", "cpu", "none")
WEIGHTS_KINDS: Final = ("released", "local", "demo_random", "demo_trained")
FINISH_REASONS: Final = ("stop", "length", "repetition", "abort")
SEGMENTATIONS: Final = ("fixed_stride", "scene_cut", "whole")
PACKINGS: Final = ("none", "stack", "3d_resampler")
PARSE_STATUSES: Final = ("ok", "salvaged", "invalid")

BLOCK_LABELS: Final = (
    "title", "section_header", "text", "list_item", "table", "picture", "caption", "formula", "code", "footnote",
    "page_header", "page_footer", "form", "handwritten_text", "document_index",
)  # fmt: skip
FURNITURE_LABELS: Final = ("page_header", "page_footer")
