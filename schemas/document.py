"""Pages and blocks, as they travel between steps."""

from typing import Final

import pyarrow as pa

BLOCK: Final = pa.struct(
    [
        pa.field("label", pa.string()),
        pa.field("label_raw", pa.string()),
        pa.field("level", pa.int8()),
        pa.field("bbox", pa.list_(pa.float32())),
        pa.field("text", pa.large_string()),
        pa.field("markdown", pa.large_string()),
        pa.field("html", pa.large_string()),
        pa.field("latex", pa.large_string()),
        pa.field("score", pa.float32()),
        pa.field("parent", pa.int32()),
    ]
)
"""A typed region of a page, in reading order. `bbox` is left, top, right, bottom in PDF points, origin top-left,
after page rotation; null when the engine gave none. On scans that were turned or deskewed the page is the corrected
one, and `rotation` and `skew_degrees` tell how it was corrected. `parent` is the list position of the parent block."""

PAGE_FACTS: Final = pa.schema(
    [
        pa.field("page_number", pa.int32()),
        pa.field("page_count", pa.int32()),
        pa.field("page_width_pt", pa.float32()),
        pa.field("page_height_pt", pa.float32()),
        pa.field("image_width_px", pa.int32()),
        pa.field("image_height_px", pa.int32()),
        pa.field("dpi", pa.float32()),
        pa.field("rotation", pa.int16()),
        pa.field("skew_degrees", pa.float32()),
        pa.field("has_text_layer", pa.bool_()),
        pa.field("text_layer_chars", pa.int32()),
        pa.field("text_layer_text", pa.large_string()),
        pa.field("text_layer_blocks", pa.list_(BLOCK)),
        pa.field("render_ms", pa.float32()),
    ]
)
"""`text_layer_text` is the page's Markdown from its embedded text, present when that text is trustworthy, also on
pages routed to a model, whose last rung it is. `rotation` is the clockwise turn applied to the rendered image, one of
0, 90, 180, 270; `skew_degrees` the counter-clockwise turn applied after it. `page_width_pt` and `page_height_pt`, like
`image_width_px` and `image_height_px`, are those of the page after both."""

PAGE_IMAGE: Final = pa.schema([pa.field("image", pa.large_binary())])
"""The rendered page: `image_height_px` x `image_width_px` x 3 uint8 RGB, rows first; null on the text-layer route."""
