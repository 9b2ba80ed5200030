"""Requests and completions."""

from typing import Final

import pyarrow as pa

from schemas.document import BLOCK, PAGE_FACTS, PAGE_IMAGE
from schemas.errors import ERROR
from schemas.image import PIXELS
from schemas.source import SOURCE_REF
from schemas.video import SEGMENT_FACTS

IDENTITY: Final = pa.schema(
    [
        pa.field("unit_id", pa.string()),
        pa.field("record_key", pa.string()),
        pa.field("source_index", pa.int64()),
        pa.field("source_uri", pa.string()),
        pa.field("source_ref", SOURCE_REF),
        pa.field("doc_id", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("task", pa.string()),
    ]
)

ROUTE: Final = pa.schema([pa.field("route", pa.string()), pa.field("route_reason", pa.string())])

REQUEST: Final = pa.schema(
    [
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("image_tokens", pa.int32()),
        pa.field("prompt_id", pa.string()),
        pa.field("prompt_sha256", pa.string()),
        pa.field("content_key", pa.string()),
    ]
)
"""`prompt_ids` holds one placeholder id for each visual token."""

GENERATION: Final = pa.schema(
    [
        pa.field("completion", pa.large_string()),
        pa.field("thought", pa.large_string()),
        pa.field("finish_reason", pa.string()),
        pa.field("attempt", pa.int16()),
        pa.field("temperature", pa.float32()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("output_tokens", pa.int32()),
        pa.field("tokens_saved", pa.int32()),
        pa.field("tokens_wasted", pa.int32()),
        pa.field("mean_logprob", pa.float32()),
        pa.field("queue_ms", pa.float32()),
        pa.field("generate_ms", pa.float32()),
        pa.field("engine", pa.string()),
        pa.field("weights_kind", pa.string()),
        pa.field("model_id", pa.string()),
        pa.field("model_revision", pa.string()),
        pa.field("decode_params", pa.string()),
    ]
)
"""`attempt` and `temperature` are those of the attempt that gave this completion; attempts at other pixels of the same
record count on. `tokens_wasted` were written by attempts before it in the same call, `tokens_saved` would have been
written by the loops of all of them."""

ANSWERED_BY: Final = pa.struct(
    [GENERATION.field(name) for name in ("finish_reason", "generate_ms", "engine", "weights_kind", "model_id")]
)
"""What a later rung of the ladder writes over, as it was when the model had answered."""

RESULT: Final = pa.schema(
    [
        pa.field("status", pa.string()),
        pa.field("rung", pa.string()),
        pa.field("needs_second_look", pa.bool_()),
        pa.field("text", pa.large_string()),
        pa.field("plain_text", pa.large_string()),
        pa.field("raw_output", pa.large_string()),
        pa.field("blocks", pa.list_(BLOCK)),
        pa.field("parse_status", pa.string()),
        pa.field("confidence", pa.float32()),
        pa.field("primary_language", pa.string()),
    ]
)
"""`text` is the page's Markdown, or a segment's caption or on-screen text according to the task. `rung` says what
answered where a model was asked; a row that `needs_second_look` failed, and is owed one with other pixels."""

FAILURES: Final = pa.schema([pa.field("error", ERROR), pa.field("recovered", pa.list_(ERROR))])

DECODED: Final = pa.schema([*IDENTITY, *PAGE_FACTS, *SEGMENT_FACTS, *ROUTE, *PAGE_IMAGE, *PIXELS, *FAILURES])
"""Rows after decode: a page carries `image`, a segment already carries its `pixels` (see operators/decode/video.py)."""

RECORD: Final = pa.schema(
    [
        *(*IDENTITY, *PAGE_FACTS, *SEGMENT_FACTS, *ROUTE, *PIXELS, *REQUEST, *GENERATION, *RESULT, *FAILURES),
        pa.field("answered_by", ANSWERED_BY),
        pa.field("ledger_hit", pa.bool_()),
    ]
)
"""Rows from prepare to sink: one record each, the same columns for pages and segments, null where not applicable or
not yet known. `ledger_hit` marks an answer that was given before, to the same pixels and prompt."""

KEPT_ANSWER: Final = pa.schema(
    [
        pa.field("content_key", pa.string()),
        pa.field("record_key", pa.string()),
        pa.field("doc_id", pa.string()),
        *GENERATION,
        *(field for field in RESULT if field.name != "needs_second_look"),
        pa.field("lost", pa.list_(ERROR)),
        pa.field("kept_at", pa.timestamp("us", tz="UTC")),
    ]
)
"""An answer as the ledger keeps it, for whatever record shows the same: of a model as it was written, before it was
judged, so without a result; of the CPU engine with one. `lost` holds the failures of attempts before it; of several
answers to one content the one that was kept last counts."""
