"""The CPU engine: pages are read by RapidOCR (PP-OCRv4) on ONNX Runtime.

It reads Chinese and Latin print. What it cannot read it must not return as text: lines are judged (see text_lines),
and a page of which too much cannot be read becomes an error with code `abstained`; what was read goes to `raw_output`.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from operators.base import Operator, OperatorConfig, with_columns
from operators.orientation import has_text_lines
from operators.picture_files import MEDIA_TYPES, read_picture, split_files
from operators.reading_order import Box, Group, group_lines
from operators.text_lines import LineReader, TextLine
from schemas.errors import GenerationError, PrepareError, error_struct
from schemas.generation import RECORD

MODEL_ID: Final = "rapidocr-onnxruntime/1.4.4 PP-OCRv4"

READS: Final = pa.schema(
    [
        RECORD.field(name)
        for name in (
            "record_key", "task", "route", "page_width_pt", "page_height_pt", "pixels", "pixel_encoding",
            "slice_shapes", "slice_grids", "status", "raw_output", "error", "recovered",
        )
    ]
)  # fmt: skip
ADDS: Final = pa.schema(
    [
        RECORD.field(name)
        for name in (
            "status", "text", "plain_text", "raw_output", "blocks", "parse_status", "confidence", "finish_reason",
            "engine", "weights_kind", "model_id", "generate_ms", "pixels", "error", "recovered",
        )
    ]
)  # fmt: skip

Place = Callable[[NDArray[np.float32]], Box | None]

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

    min_partial_share: Annotated[
        float, Field(ge=0, le=1, description="Unread share that makes a page partial; specks and dashes stay below.")
    ] = 0.005


class ReadPages(Operator[ReadPagesConfig]):
    """Read the pages of the `cpu` route; other rows, failed rows and rows with a status pass through.

    The page image is put together from its slices: the whole page where the grid is 0 x 0, else the grid's cells
    row by row, without the overview.

    Blocks (task `parse`) carry `bbox` in PDF points of the page that was read, origin top-left: a scan that was turned
    or deskewed is read upright, and `page_width_pt` x `page_height_pt` is the size of the upright page.

    A page whose unread lines are few loses those lines: status `partial_success`, and a failure is added to
    `recovered`. A row that comes after a failed model attempt, with `raw_output` or `recovered` set, ends as
    `fallback`, and keeps its `raw_output`. The pixels of a row end here: they are null once it was read.
    """

    reads = READS
    adds = ADDS
    stage: ClassVar[str] = "generate"

    def __init__(self, config: ReadPagesConfig) -> None:
        super().__init__(config)
        self._reader = LineReader(config.threads, config.detect_side_px)

    def process(self, table: pa.Table) -> pa.Table:
        """Return `table` with the results of the rows that were read."""
        rows = table.drop_columns(["pixels"]).to_pylist()
        pixels = table.column("pixels")
        due = [_is_due(row) for row in rows]
        for index, row in enumerate(rows):
            if due[index]:
                row |= self._read({**row, "pixels": pixels[index].as_py()})
        left = pc.if_else(pa.array(due), pa.scalar(None, pa.large_binary()), pixels)
        table = table.set_column(table.schema.get_field_index("pixels"), RECORD.field("pixels"), left)
        columns = {name: [row.get(name) for row in rows] for name in ADDS.names if name != "pixels"}
        return with_columns(table, columns, ADDS)

    def at_risk(self, table: pa.Table) -> list[bool]:
        """Return for each row whether it is read here."""
        return [_is_due(row) for row in table.select(["route", "error", "status"]).to_pylist()]

    def _read(self, row: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            outcome = self._outcome(row)
        except GenerationError as error:
            outcome = _failed(row, error, None)
        engine = {"engine": "cpu", "weights_kind": "released", "model_id": MODEL_ID, "finish_reason": None}
        return {**engine, **outcome, "generate_ms": (time.perf_counter() - start) * 1000}

    def _outcome(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["task"] == "caption":
            raise _abstained(row, "this engine reads text and writes no captions")
        image = page_image(row)
        lines = self._reader.read(image)
        kept = [line for line in lines if line.quality >= self.config.min_quality]
        if not lines:
            if has_text_lines(image):
                raise _abstained(row, "text stands in lines but none was found by the detector")
            return _blank(row)
        share = unread_share(lines, kept)
        if share > self.config.max_unread_share:
            cause = _abstained(
                row, f"{share:.0%} of the text area was not read ({len(kept)} of {len(lines)} lines were)"
            )
            return _failed(row, cause, _layout(lines, None)[1])
        outcome = _succeeded(row, kept, image)
        return (
            outcome if share < self.config.min_partial_share else _partial(row, outcome, len(lines) - len(kept), share)
        )


def _is_due(row: dict[str, Any]) -> bool:
    return row["route"] == "cpu" and row["error"] is None and row["status"] is None


def page_image(row: dict[str, Any]) -> NDArray[np.uint8]:
    """Return the image of a page from a row's `PIXELS` columns: (H, W, 3) uint8 RGB.

    Raises:
        GenerationError: there are no pixels, not exactly one image, or their size is not what the shapes say.
    """
    shapes = [(shape["height_px"], shape["width_px"], 3) for shape in row["slice_shapes"] or []]
    if row["pixel_encoding"] in MEDIA_TYPES:
        return _page_of_files(row, shapes)
    grids = row["slice_grids"] or []
    if row["pixels"] is None or len(grids) != 1 or len(shapes) != 1 + grids[0]["rows"] * grids[0]["cols"]:
        found = f"{len(shapes)} slices of {len(grids)} images"
        raise GenerationError(f"{row['record_key']}: wanted the slices of one page, found {found}", code="internal")
    sizes = [math.prod(shape) for shape in shapes]
    data = row["pixels"]
    if row["pixel_encoding"] == "zstd":
        data = pa.Codec("zstd").decompress(data, decompressed_size=sum(sizes))
    flat = np.frombuffer(data, np.uint8)
    if len(flat) != sum(sizes):
        raise GenerationError(f"{row['record_key']}: {len(flat)} bytes for {sum(sizes)} of pixels", code="internal")
    slices = [part.reshape(shape) for part, shape in zip(np.split(flat, np.cumsum(sizes)[:-1]), shapes, strict=True)]
    cols = grids[0]["cols"]
    if not cols:
        return slices[0]
    cells = slices[1:]
    return np.concatenate([np.concatenate(cells[n : n + cols], axis=1) for n in range(0, len(cells), cols)])


def _page_of_files(row: dict[str, Any], shapes: Sequence[tuple[int, int, int]]) -> NDArray[np.uint8]:
    """Return the image of a page that was kept as one file for a server."""
    try:
        images = [read_picture(file) for file in split_files(row["pixels"] or b"")]
    except PrepareError as error:
        raise GenerationError(f"{row['record_key']}: {error}", code="internal") from error
    if [image.shape for image in images] != list(shapes) or len(images) != 1:
        found = [image.shape for image in images]
        raise GenerationError(f"{row['record_key']}: pictures of {found}, the shapes say {shapes}", code="internal")
    return images[0]


def unread_share(lines: Sequence[TextLine], kept: Sequence[TextLine]) -> float:
    """Return the share of the area of `lines` that is not in `kept`."""
    area = sum(line.area_px for line in lines)
    return 1 - sum(line.area_px for line in kept) / area if area else 0.0


def page_box(
    polygon: NDArray[np.float32], image_height_px: int, image_width_px: int, row: dict[str, Any]
) -> Box | None:
    """Return the hull of `polygon` in PDF points of the page that was read, origin top-left; None without a page size.

    Args:
        polygon: (N, 2), x and y in pixels of the image.
        image_height_px: height of the image, all of the page.
        image_width_px: its width.
        row: `page_width_pt` and `page_height_pt`, the size of the same page.
    """
    width, height = row["page_width_pt"], row["page_height_pt"]
    if not width or not height:
        return None
    xs = np.clip(polygon[:, 0] * width / image_width_px, 0, width)
    ys = np.clip(polygon[:, 1] * height / image_height_px, 0, height)
    return Box(float(xs.min()), float(ys.min()), float(xs.max()), float(ys.max()))


def join_lines(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows of a paragraph as running text; where most rows have several cells, they stay rows."""
    if 2 * sum(len(row) > 1 for row in rows) > len(rows):
        return "\n".join(" ".join(row) for row in rows)
    text = ""
    for line in (" ".join(row) for row in rows):
        if not text or (_CJK.match(text[-1]) or _CJK.match(line[:1])):
            text += line
        elif re.search(r"[a-z]-$", text) and line[:1].islower():
            text = text[:-1] + line
        else:
            text += " " + line
    return text


def _layout(lines: Sequence[TextLine], place: Place | None) -> tuple[list[dict[str, Any]], str]:
    """Return the blocks of `lines` in reading order, boxes given by `place(polygon)`, and their plain text."""
    boxes = [Box(*line.polygon.min(axis=0).tolist(), *line.polygon.max(axis=0).tolist()) for line in lines]
    items = {index for index, line in enumerate(lines) if _BULLET.match(line.text)}
    blocks = [_block(group, lines, place) for group in group_lines(boxes, items)]
    return blocks, "\n\n".join(block["text"] for block in blocks)


def _block(group: Group, lines: Sequence[TextLine], place: Place | None) -> dict[str, Any]:
    members = [lines[n] for row in group.rows for n in row]
    text = join_lines([[lines[n].text.strip() for n in row] for row in group.rows])
    bullet = _BULLET.match(text)
    body = text[bullet.end() :] if bullet else text
    label = "list_item" if bullet else "section_header" if group.is_header else "text"
    box = place(np.concatenate([line.polygon for line in members])) if place else None
    return {
        "label": label,
        "label_raw": "rapidocr",
        "level": None,
        "bbox": list(box) if box else None,
        "text": f"• {body}" if bullet else body,
        "markdown": {"list_item": "- ", "section_header": "## "}.get(label, "") + body,
        "html": None,
        "latex": None,
        "score": _mean_score(members),
        "parent": None,
    }


def _mean_score(lines: Sequence[TextLine]) -> float:
    characters = sum(len(line.text) for line in lines)
    return sum(line.score * len(line.text) for line in lines) / max(characters, 1)


def _succeeded(row: dict[str, Any], lines: Sequence[TextLine], image: NDArray[np.uint8]) -> dict[str, Any]:
    height, width = image.shape[:2]
    blocks, plain_text = _layout(lines, lambda polygon: page_box(polygon, height, width, row))
    is_parse = row["task"] == "parse"
    return {
        "status": "fallback" if row["raw_output"] is not None or row["recovered"] else "success",
        "text": "\n\n".join(block["markdown"] for block in blocks),
        "plain_text": plain_text,
        "blocks": blocks if is_parse else None,
        "parse_status": "ok" if is_parse else None,
        "confidence": _mean_score(lines),
    }


def _partial(row: dict[str, Any], outcome: dict[str, Any], dropped: int, share: float) -> dict[str, Any]:
    cause = _abstained(row, f"{dropped} lines were left out, {share:.0%} of the text area")
    recovered = [*(row["recovered"] or []), error_struct(cause, ReadPages.__name__)]
    status = "partial_success" if outcome["status"] == "success" else outcome["status"]
    return {**outcome, "status": status, "recovered": recovered}


def _blank(row: dict[str, Any]) -> dict[str, Any]:
    is_parse = row["task"] == "parse"
    blocks: list[dict[str, Any]] | None = [] if is_parse else None
    parse_status = "ok" if is_parse else None
    return {"status": "blank", "text": "", "plain_text": "", "blocks": blocks, "parse_status": parse_status}


def _failed(row: dict[str, Any], error: GenerationError, read: str | None) -> dict[str, Any]:
    raw_output = row["raw_output"] if row["raw_output"] is not None else read
    return {"status": "failure", "raw_output": raw_output, "error": error_struct(error, ReadPages.__name__)}


def _abstained(row: dict[str, Any], reason: str) -> GenerationError:
    return GenerationError(f"{row['record_key']}: the CPU engine abstains: {reason}", code="abstained")
