"""From lines to paragraphs, headings and lists: Markdown of embedded text without a layout model."""

import itertools
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Final

from operators.decode.reading_order import reading_order
from operators.decode.text_lines import Box, Line, runs_right_to_left, union_box

_BULLETS: Final = "•◦▪▫‣⁃∙●○■□◆◇►▸▶➢➤✓✔❖·"
_BULLET_ITEM: Final = re.compile(rf"(?:[{_BULLETS}\uf020-\uf0ff]\s*|[-–*—]\s+)(?=\S)")
_NUMBERED_ITEM: Final = re.compile(r"\(?(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{1,5})[.)]\s+(?=\S)")
_TERMINAL: Final = re.compile(r"[.!?:;。！？：؟।…][\"'”’»)\]]*$")
_HYPHENATED: Final = re.compile(r"(?<=[^\W\d_])[-\u00ad\u2010]$")
_ATTACHED: Final = re.compile(r"(?<=\w)[-\u2010–/]$|://$")
_HEADING_RATIO: Final = 1.15
_MAX_HEADING_CHARS: Final = 200
_MAX_HEADING_SHARE: Final = 0.4
"""A larger size with more of the page's characters is its body, and the smaller one its notes."""
_PROSE_END: Final = re.compile(r"[^\d.][.,;]$")
_MIN_PROSE_CHARS: Final = 40
_CELL_GAP_SIZES: Final = 1.5
_TABULAR_SHARE: Final = 0.5
_TABULAR_MEDIAN_CHARS: Final = 25
"""Lines of text columns share baselines too, but are longer: 38 to 45 characters in three columns (measured)."""


@dataclass(frozen=True)
class _Paragraph:
    text: str
    box: Box
    size_pt: float
    line_count: int
    is_list_item: bool


def lines_to_markdown(lines: list[Line]) -> str:
    """Return the Markdown of a page's lines: reading order, paragraphs, headings by font size, lists.

    No text is dropped; end-of-line hyphens are undone, and tables become one line a row.
    """
    if not lines:
        return ""
    if _is_tabular(lines):
        return "\n".join("  ".join(line.text for line in row) for row in rows_of(lines))
    blocks = _blocks(lines)
    boxes = [union_box([line.box for line in block]) for block in blocks]
    order = reading_order(boxes, right_to_left=runs_right_to_left(lines))
    paragraphs = [paragraph for index in order for paragraph in _paragraphs(blocks[index])]
    body, heading_sizes = _sizes(lines)
    return _assemble(_continued(paragraphs, body), heading_sizes)


def join_lines(texts: list[str]) -> str:
    """Return lines as one paragraph: hyphenation undone, no space where the script writes none."""
    joined = ""
    for text in texts:
        if not joined:
            joined = text
        elif _HYPHENATED.search(joined) and text[:1].islower():
            joined = joined[:-1] + text
        elif (_ATTACHED.search(joined) and text[:1].isalnum()) or (
            _writes_no_spaces(joined[-1]) and _writes_no_spaces(text[0])
        ):
            joined += text
        else:
            joined += " " + text
    return joined.replace("\u00ad", "")


def without_bullet(text: str) -> str:
    """Return a list item without the glyph that marks it."""
    return _BULLET_ITEM.sub("", text, count=1)


def rows_of(lines: list[Line]) -> list[list[Line]]:
    """Return lines grouped by shared baseline, from top to bottom, each row from left to right."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: (line.box[1] + line.box[3], line.box[0])):
        middle = (line.box[1] + line.box[3]) / 2
        if rows:
            top, bottom = rows[-1][0].box[1], rows[-1][0].box[3]
            if abs(middle - (top + bottom) / 2) < 0.35 * min(bottom - top, line.box[3] - line.box[1]):
                rows[-1].append(line)
                continue
        rows.append([line])
    return [sorted(row, key=lambda line: line.box[0]) for row in rows]


def _is_tabular(lines: list[Line]) -> bool:
    if len(lines) < 12 or any(line.is_vertical for line in lines):
        return False
    lengths = sorted(len(line.text) for line in lines)
    if lengths[len(lengths) // 2] > _TABULAR_MEDIAN_CHARS:
        return False
    return sum(len(row) for row in rows_of(lines) if len(row) >= 3) > _TABULAR_SHARE * len(lines)


def _blocks(lines: list[Line]) -> list[list[Line]]:
    blocks: dict[int, list[Line]] = {}
    for line in lines:
        blocks.setdefault(line.block_index, []).append(line)
    return list(blocks.values())


def _paragraphs(block: list[Line]) -> list[_Paragraph]:
    """Return the paragraphs of one block; where lines lie side by side, each row is one."""
    if block[0].is_vertical:
        return [_paragraph(block)]
    rows = _visual_rows(block)
    if 2 * sum(map(_has_cells, rows)) >= len(rows):
        return [_paragraph(row, cells=True) for row in rows]
    left = min(line.box[0] for line in block)
    right = max(line.box[2] for line in block)
    groups: list[list[Line]] = []
    for row in rows:
        if groups and not _begins_paragraph(groups[-1], row, left, right):
            groups[-1] += row
        else:
            groups.append(list(row))
    return [_paragraph(group) for group in groups]


def _visual_rows(block: list[Line]) -> list[list[Line]]:
    """Return consecutive lines that lie on one baseline together; the order of the file is kept."""
    rows: list[list[Line]] = []
    for line in block:
        if rows:
            first = rows[-1][-1].box
            shared = min(first[3], line.box[3]) - max(first[1], line.box[1])
            if shared > 0.5 * min(first[3] - first[1], line.box[3] - line.box[1]):
                rows[-1].append(line)
                continue
        rows.append([line])
    return rows


def _has_cells(row: list[Line]) -> bool:
    pairs = itertools.pairwise(row)
    return any(b.box[0] - a.box[2] > _CELL_GAP_SIZES * max(a.size_pt, 1.0) or b.box[2] < a.box[0] for a, b in pairs)


def _begins_paragraph(group: list[Line], row: list[Line], left: float, right: float) -> bool:
    previous, line = group[-1], row[0]
    if _BULLET_ITEM.match(line.text) or _NUMBERED_ITEM.match(line.text):
        return True
    if abs(previous.size_pt - line.size_pt) > 0.15 * max(previous.size_pt, 1.0) and len(line.text) > 2:
        return len(previous.text) > 2
    is_indented = line.box[0] > left + 0.8 * line.size_pt and previous.box[0] < left + 0.4 * line.size_pt
    if is_indented and _TERMINAL.search(previous.text):
        return True
    if line.text[0].islower() or _ATTACHED.search(previous.text):
        return False
    is_flush = previous.box[0] < left + line.size_pt
    return is_flush and right - previous.box[2] > _first_word_width(line) + line.size_pt


def _first_word_width(line: Line) -> float:
    """Return about how wide the first word of a line is: what would have fitted on the line before began anew."""
    first = line.text[:2] if _writes_no_spaces(line.text[0]) else line.text.split(" ", 1)[0]
    return (line.box[2] - line.box[0]) * len(first) / max(len(line.text), 1)


def _paragraph(lines: list[Line], *, cells: bool = False) -> _Paragraph:
    if cells:
        text = "  ".join(line.text for line in sorted(lines, key=lambda line: line.box[0]))
    else:
        text = join_lines([line.text for line in lines])
    is_list_item = _BULLET_ITEM.match(text) is not None and len(text) > 2
    if is_list_item:
        text = "- " + without_bullet(text)
    is_list_item = is_list_item or _NUMBERED_ITEM.match(text) is not None
    widest = max(lines, key=lambda line: len(line.text))
    return _Paragraph(text, union_box([line.box for line in lines]), widest.size_pt, len(lines), is_list_item)


def _continued(paragraphs: list[_Paragraph], body_pt: float) -> list[_Paragraph]:
    """Return paragraphs with those joined that a column break cuts in the middle of a sentence."""
    joined: list[_Paragraph] = []
    for paragraph in paragraphs:
        before = joined[-1] if joined else None
        if before is not None and _continues(before, paragraph, body_pt):
            text = join_lines([before.text, paragraph.text])
            joined[-1] = _Paragraph(text, paragraph.box, before.size_pt, before.line_count + 1, before.is_list_item)
        else:
            joined.append(paragraph)
    return joined


def _continues(before: _Paragraph, after: _Paragraph, body_pt: float) -> bool:
    if after.is_list_item or abs(before.size_pt - after.size_pt) > 0.3 or abs(after.size_pt - body_pt) > 0.6:
        return False
    # Only prose: a short line that ends without a stop is a label or a cell.
    if len(before.text) < _MIN_PROSE_CHARS or not after.text[:1].islower():
        return False
    return before.text[-1:].isalpha() or before.text[-1:] in ",-\u00ad"


def _sizes(lines: list[Line]) -> tuple[float, list[float]]:
    """Return the size of most characters, and the larger sizes that mark headings, largest first."""
    counts: Counter[float] = Counter()
    for line in lines:
        counts[round(line.size_pt, 1)] += len(line.text)
    body = max(counts, key=lambda size: (counts[size], -size))
    limit = _MAX_HEADING_SHARE * sum(counts.values())
    return body, sorted(
        (size for size in counts if size >= _HEADING_RATIO * body and counts[size] < limit), reverse=True
    )


def _assemble(paragraphs: list[_Paragraph], heading_sizes: list[float]) -> str:
    parts: list[str] = []
    was_list_item = False
    for paragraph in paragraphs:
        text = paragraph.text
        size = round(paragraph.size_pt, 1)
        is_heading = (
            size in heading_sizes
            and not paragraph.is_list_item
            and len(text) <= _MAX_HEADING_CHARS
            and any(map(str.isalpha, text))
            and not (text[:1].islower() or _PROSE_END.search(text))
        )
        if is_heading:
            text = "#" * min(heading_sizes.index(size) + 1, 4) + " " + text
        elif re.match(r"#{1,6}\s", text):
            text = "\\" + text
        parts.append(("\n" if paragraph.is_list_item and was_list_item else "\n\n") + text)
        was_list_item = paragraph.is_list_item
    return "".join(parts).strip()


def _writes_no_spaces(char: str) -> bool:
    """Return True for scripts whose words are not parted by spaces."""
    if char < "\u0e00":
        return False
    code = ord(char)
    if 0x0E00 <= code <= 0x0EFF or 0x1000 <= code <= 0x109F or 0x1780 <= code <= 0x17FF:
        return True
    return unicodedata.east_asian_width(char) in "WF" and not 0xAC00 <= code <= 0xD7A3
