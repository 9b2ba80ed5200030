"""The CPU engine: pages are read by RapidOCR (PP-OCRv4) on ONNX Runtime.

It reads Chinese and Latin print. What it cannot read it must not return as text: lines are judged (see text_lines),
and a page of which too much cannot be read becomes an error with code `abstained`; what was read goes to `raw_output`.
"""

import math
import re
import statistics
import time
from collections.abc import Sequence
from typing import Annotated, Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from operators.base import Operator, OperatorConfig, with_columns
from operators.orientation import has_text_lines, hull_size
from operators.reading_order import Box, Group, group_lines
from operators.text_lines import LineReader, TextLine
from schemas.errors import GenerationError, error_struct
from schemas.generation import RECORD

MODEL_ID: Final = "rapidocr-onnxruntime/1.4.4 PP-OCRv4"

READS: Final = pa.schema(
    [
        RECORD.field(name)
        for name in (
            "record_key", "task", "route", "page_width_pt", "page_height_pt", "rotation", "skew_degrees",
            "pixels", "pixel_encoding", "slice_shapes", "slice_grids", "status", "raw_output", "error", "recovered",
        )
    ]
)  # fmt: skip
ADDS: Final = pa.schema(
    [
        RECORD.field(name)
        for name in (
            "status", "text", "plain_text", "raw_output", "blocks", "parse_status", "confidence", "finish_reason",
            "engine", "weights_kind", "model_id", "generate_ms", "error", "recovered",
        )
    ]
)  # fmt: skip

_BULLET = re.compile(r"^\s*[•·●▪■◦‣∙○]\s*(?=\S)")
_CJK = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\u3000-\u303f]")


class ReadPagesConfig(OperatorConfig):
    """Options of the CPU engine. Thresholds were measured on the pages that tests/operators/test_read*.py name."""

    threads: Annotated[int, Field(ge=1, description="Threads of each ONNX Runtime session; one worker uses them.")] = 1
    detect_side_px: Annotated[
        int, Field(ge=320, le=4000, description="Longer side at which lines are searched; more finds smaller print.")
    ] = 1600
    min_quality: Annotated[
        float, Field(ge=0, le=1, description="Lines judged below this count as unread; more abstains more.")
    ] = 0.75
    max_unread_share: Annotated[
        float, Field(ge=0, le=1, description="Share of text area that may be unread before the page is given up.")
    ] = 0.25


class ReadPages(Operator[ReadPagesConfig]):
    """Read the pages of the `cpu` route; other rows, failed rows and rows with a status pass through.

    The page image is put together from its slices: the whole page where the grid is 0 x 0, else the grid's cells
    row by row, without the overview.

    Blocks (task `parse`) carry `bbox` in PDF points of the page as a viewer displays it, after `/Rotate`, origin
    top-left. The image that was read may have been turned by `rotation` and then by `skew_degrees`
    (see `orientation.upright`); boxes are mapped back through both, and are the upright hull of what comes out.

    A page whose unread lines are few loses those lines: status `partial_success`, and a failure is added to
    `recovered`. A row that comes after a failed model attempt, with `raw_output` or `recovered` set, ends as
    `fallback`, and keeps its `raw_output`.
    """

    reads = READS
    adds = ADDS

    def __init__(self, config: ReadPagesConfig) -> None:
        super().__init__(config)
        self._reader = LineReader(config.threads, config.detect_side_px)

    def process(self, table: pa.Table) -> pa.Table:
        """Return `table` with the results of the rows that were read."""
        rows = table.to_pylist()
        results = [{**row, **self._read(row)} if _is_due(row) else row for row in rows]
        return with_columns(table, {name: [row.get(name) for row in results] for name in ADDS.names}, ADDS)

    def _read(self, row: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        made: dict[str, Any] = {"engine": "cpu", "weights_kind": "released", "model_id": MODEL_ID, "finish_reason": None}
        try:
            image = page_image(row)
            made |= self._result(row, image)
        except GenerationError as error:
            failure = error_struct(error, type(self).__name__)
            made |= {"status": "failure", "text": None, "plain_text": None, "blocks": None, "error": failure}
        return made | {"generate_ms": (time.perf_counter() - start) * 1000}

    def _result(self, row: dict[str, Any], image: NDArray[np.uint8]) -> dict[str, Any]:
        if row["task"] == "caption":
            raise GenerationError(f"{row['record_key']}: the CPU engine reads text, it writes no captions", code="abstained")
        lines = self._reader.read(image)
        kept = [line for line in lines if line.quality >= self.config.min_quality]
        unread_share = _unread_share(lines, kept)
        if not kept and not (has_text_lines(image) or unread_share):
            return _blank(row)
