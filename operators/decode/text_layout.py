"""Blocks of a page that has text: boxes and labels from PyMuPDF's layout model, words from the text layer.

`pymupdf4llm` is not used: with RapidOCR installed it rewrites the text layer of the open document, and the layout
model is reached through `Page.get_layout` without it.
"""

import bisect
import html
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pymupdf
import pymupdf.layout  # its import gives `Page.get_layout` its model
from numpy.typing import NDArray

from operators.decode.reading_order import reading_order
from operators.decode.text_flow import join_lines, rows_of, without_bullet
from operators.decode.text_lines import Box, Line, PageText, Word, frame_to_display, runs_right_to_left, union_box
from schemas.errors import DecodeError
from schemas.vocabulary import BLOCK_LABELS

MAX_LAYOUT_LINES: Final = 4000
"""The model's graph grows with the lines: 1100 of them take 2 to 4 s (measured); noise must not take hours."""
_CELL_GAP_SIZES: Final = 0.9
_HEADING_LEVELS: Final = (2, 3, 4)


@dataclass
class _Region:
    """One box of the layout model, in the frame, and the lines (parts of lines) whose words lie in it."""

    label: str
    label_raw: str
    box: Box
    members: list[Box] = field(default_factory=list)
    grid: Any = None
    lines: list[Line] = field(default_factory=list)


def layout_blocks(page: pymupdf.Page, page_text: PageText) -> list[dict[str, Any]]:
    """Return the blocks of `page` in reading order, as values of the `BLOCK` struct.

    Every word of the text layer is in exactly one block; words outside all boxes make text blocks of their own.

    Args:
        page: the page.
        page_text: its lines, with words.

    Raises:
        DecodeError: the layout model failed on this page, or the page has too many lines for it.
    """
    if len(page_text.lines) > MAX_LAYOUT_LINES:
        raise DecodeError(f"{len(page_text.lines)} lines, at most {MAX_LAYOUT_LINES}", code="too_large", stage="render")
    regions = _regions(page, page_text)
    leftovers = _assign(page_text.lines, regions)
    regions += [_Region("text", "", union_box([line.box for line in lines]), lines=lines) for lines in leftovers]
    regions = [region for region in regions if region.lines or region.label == "picture"]
    return _to_blocks(_ordered(regions, page_text.lines), page, page_text)


def plain_blocks(page: pymupdf.Page, page_text: PageText) -> list[dict[str, Any]]:
    """Return one text block for each paragraph-like group of lines, without the layout model."""
    groups: dict[int, list[Line]] = {}
    for line in page_text.lines:
        groups.setdefault(line.block_index, []).append(line)
    regions = [_Region("text", "", union_box([line.box for line in lines]), lines=lines) for lines in groups.values()]
    right_to_left = runs_right_to_left(page_text.lines)
    order = reading_order([region.box for region in regions], right_to_left=right_to_left)
    return _to_blocks([regions[index] for index in order], page, page_text)


def _regions(page: pymupdf.Page, page_text: PageText) -> list[_Region]:
    upright, owner = page, None
    if page.rotation or page_text.turn:
        # The model mixes the displayed picture with boxes of the page before /Rotate: it needs a page without one.
        owner = pymupdf.open()
        owner.insert_pdf(page.parent, from_page=page.number, to_page=page.number, links=False)
        upright = owner[0]
        upright.set_rotation(page_text.turn)
        if page_text.turn:
            upright.remove_rotation()
    try:
        upright.get_layout(return_raw=True)
        groups = upright.layout_information or []
    except Exception as error:
        raise DecodeError(f"layout model: {type(error).__name__}: {error}", code="render", stage="render") from error
    finally:
        upright.layout_information = None
        if owner is not None:
            owner.close()
    return [_region(group) for group in groups]


def _region(group: dict[str, Any]) -> _Region:
    raw = str(group["class_name"])
    label = raw.replace("-", "_")
    left, top, right, bottom = (float(side) for side in group["group_bbox"][:4])
    members = [(float(b[0]), float(b[1]), float(b[2]), float(b[3])) for b in group.get("bboxes") or []]
    known = label if label in BLOCK_LABELS else "text"
    return _Region(known, raw, (left, top, right, bottom), members, group.get("table_grid"))


def _assign(lines: list[Line], regions: list[_Region]) -> list[list[Line]]:
    """Put each word into one region; return the lines that no region holds, grouped by block."""
    left_over: dict[int, list[Line]] = {}
    owners = iter(_owners([word.box for line in lines for word in line.words], regions))
    for line in lines:
        parts: dict[int, list[Word]] = {}
        for word in line.words:
            parts.setdefault(next(owners), []).append(word)
        for owner, words in parts.items():
            part = line if len(words) == len(line.words) else _part(line, words)
            if owner >= 0:
                regions[owner].lines.append(part)
            else:
                left_over.setdefault(line.block_index, []).append(part)
    return list(left_over.values())


def _owners(words: list[Box], regions: list[_Region]) -> list[int]:
    """Return the region of each word: by the lines that the model took into it, else by its box, else -1."""
    if not words:
        return []
    boxes = np.asarray(words, np.float64)
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    owners = np.full(len(boxes), -1)
    # The smallest region is written last, so that it wins; membership wins over the mere box.
    largest_first = sorted(range(len(regions)), key=lambda index: -_area(regions[index].box))
    for index in largest_first:
        owners[_inside(x, y, [regions[index].box], 1.0)] = index
    for index in largest_first:
        owners[_inside(x, y, regions[index].members, 0.5)] = index
    return [int(owner) for owner in owners]


def _inside(x: NDArray[np.float64], y: NDArray[np.float64], boxes: list[Box], margin: float) -> NDArray[np.bool_]:
    if not boxes:
        return np.zeros(len(x), np.bool_)
    left, top, right, bottom = np.asarray(boxes, np.float64).T
    holds = (x[:, None] >= left - margin) & (x[:, None] <= right + margin)
    holds &= (y[:, None] >= top - margin) & (y[:, None] <= bottom + margin)
    return np.asarray(holds.any(axis=1))


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _part(line: Line, words: list[Word]) -> Line:
    return Line(
        text=" ".join(word.text for word in words),
        box=union_box([word.box for word in words]),
        block_index=line.block_index,
        size_pt=line.size_pt,
        is_bold=line.is_bold,
        is_vertical=line.is_vertical,
        words=tuple(words),
    )


def _ordered(regions: list[_Region], lines: list[Line]) -> list[_Region]:
    """Return regions in reading order: headers, content, footnotes, footers; pictures where they stand."""
    place = {id(word): index for index, line in enumerate(lines) for word in line.words}
    ranks = {"page_header": 0, "footnote": 2, "page_footer": 3}
    right_to_left = runs_right_to_left(lines)
    ordered: list[_Region] = []
    for rank in range(4):
        chosen = [region for region in regions if region.lines and ranks.get(region.label, 1) == rank]
        chosen.sort(key=lambda region: min(place[id(line.words[0])] for line in region.lines))
        ordered += [chosen[index] for index in reading_order([r.box for r in chosen], right_to_left=right_to_left)]
    for picture in sorted((region for region in regions if not region.lines), key=lambda region: -region.box[1]):
        ordered.insert(_place_of(picture.box, ordered), picture)
    return ordered


def _place_of(box: Box, ordered: list[_Region]) -> int:
    """Return where a region without text belongs: before the first that lies below it in its column."""
    for index, region in enumerate(ordered):
        is_below = region.box[1] >= (box[1] + box[3]) / 2
        if is_below and min(box[2], region.box[2]) > max(box[0], region.box[0]) and region.label != "page_header":
            return index
    return sum(region.label not in ("footnote", "page_footer") for region in ordered)


def _to_blocks(regions: list[_Region], page: pymupdf.Page, page_text: PageText) -> list[dict[str, Any]]:
    sizes = sorted({round(_size(r.lines), 1) for r in regions if r.label == "section_header"}, reverse=True)
    return [_block(region, sizes, frame_to_display(region.box, page_text, page)) for region in regions]


def _block(region: _Region, heading_sizes: list[float], bbox: list[float] | None) -> dict[str, Any]:
    markup, level = None, None
    if region.label == "table":
        markup = _table_html(region)
        text = "\n".join("\t".join(line.text for line in row) for row in rows_of(region.lines))
    else:
        text = join_lines([line.text for line in _downward(region.lines)])
    if region.label == "list_item":
        text = without_bullet(text)
    elif region.label == "title":
        level = 1
    elif region.label == "section_header":
        rank = heading_sizes.index(round(_size(region.lines), 1))
        level = _HEADING_LEVELS[min(rank, len(_HEADING_LEVELS) - 1)]
    return {
        "label": region.label,
        "label_raw": region.label_raw,
        "level": level,
        "bbox": bbox,
        "text": text,
        "markdown": None,
        "html": markup,
        "latex": None,
        "score": None,
        "parent": None,
    }


def _size(lines: list[Line]) -> float:
    return max(lines, key=lambda line: len(line.text)).size_pt if lines else 0.0


def _downward(lines: list[Line]) -> list[Line]:
    """Return lines block by block from top to bottom; inside a block the order of the file stands."""
    groups: dict[int, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.block_index, []).append(line)
    return [line for group in sorted(groups.values(), key=lambda group: group[0].box[1]) for line in group]


def _table_html(region: _Region) -> str | None:
    """Return the table as HTML from the grid lines that the model drew, or None where it drew none.

    Every word is in exactly one cell; a text that reaches over grid lines spans their columns where these are free.
    """
    left, top = region.box[0], region.box[1]
    columns = sorted(left + float(x) for x in getattr(region.grid, "v_lines", None) or [])
    borders = sorted(top + float(y) for y in getattr(region.grid, "h_lines", None) or [])
    if not region.lines or not (columns or borders):
        return None
    cells: dict[tuple[int, int], list[Line]] = {}
    spans: dict[tuple[int, int], int] = {}
    for line in region.lines:
        for chunk in _chunks(line):
            row = bisect.bisect(borders, (chunk.box[1] + chunk.box[3]) / 2)
            first, last = _columns_of(chunk, columns)
            cells.setdefault((row, first), []).append(chunk)
            spans[row, first] = max(spans.get((row, first), 1), last - first + 1)
    used_rows = sorted({row for row, _ in cells})
    used_columns = sorted({column for _, column in cells})
    rows = "".join(_row_html(row, used_columns, cells, spans) for row in used_rows)
    return f"<table>{rows}</table>"


def _chunks(line: Line) -> list[Line]:
    """Return the parts of a line that wide gaps separate: cells that the file wrote as one line."""
    chunks: list[list[Word]] = []
    for word in line.words:
        gap = word.box[0] - chunks[-1][-1].box[2] if chunks else 0.0
        if chunks and -line.size_pt < gap <= _CELL_GAP_SIZES * line.size_pt:
            chunks[-1].append(word)
        else:
            chunks.append([word])
    return [_part(line, words) for words in chunks]


def _columns_of(chunk: Line, columns: list[float]) -> tuple[int, int]:
    """Return the first and last column of a chunk; a column counts when a third of it, or of the chunk, is covered."""
    left, _, right, _ = chunk.box
    middle = bisect.bisect(columns, (left + right) / 2)
    first, last = bisect.bisect(columns, left), bisect.bisect(columns, right)
    edges = [left, *columns, right]
    covered = [
        column
        for column in range(first, last + 1)
        if _shared(left, right, edges[column], edges[column + 1] if column + 1 < len(edges) else right)
        > min(0.34 * (right - left), 0.5 * max(edges[min(column + 1, len(edges) - 1)] - edges[column], 1.0))
    ]
    return (min([*covered, middle]), max([*covered, middle]))


def _shared(left: float, right: float, start: float, stop: float) -> float:
    return min(right, stop) - max(left, start)


def _row_html(
    row: int, used: list[int], cells: dict[tuple[int, int], list[Line]], spans: dict[tuple[int, int], int]
) -> str:
    parts: list[str] = []
    free_from = used[0]
    for place, column in enumerate(used):
        if column < free_from:
            continue
        lines = cells.get((row, column))
        if lines is None:
            parts.append("<td></td>")
            continue
        stop = column + spans[row, column]
        taken = [other for other in used[place + 1 :] if other < stop and (row, other) in cells]
        stop = min([stop, *taken])
        width = sum(column <= other < stop for other in used)
        free_from = stop
        text = "<br>".join(html.escape(" ".join(line.text for line in each), quote=False) for each in rows_of(lines))
        parts.append(f'<td colspan="{width}">{text}</td>' if width > 1 else f"<td>{text}</td>")
    return f"<tr>{''.join(parts)}</tr>"
