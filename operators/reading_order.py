"""The order in which the lines of a page are read, and the paragraphs that they form.

Boxes are `Box(left, top, right, bottom)` in pixels of the upright page, origin top-left.
"""

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

MIN_COLUMN_LINES: Final = 3
MIN_COLUMN_ASPECT: Final = 6.0
"""Width of a column of text, in line heights; the columns of a table are mostly narrower, and are read row by row."""
GUTTER_REACH: Final = 0.7
"""How far a line may reach over a gutter without crossing it, in line heights."""
MIN_FILLED_SHARE: Final = 0.55
"""Share of a column's lines that are nearly as wide as its widest."""
HEADER_SIZE_RATIO: Final = 1.35
"""Height of a heading's lines in heights of the page's median line."""
TIGHT_GAP: Final = 0.5
LOOSE_GAP: Final = 1.3
"""Gaps between lines of one paragraph, in line heights: always at the first, never beyond the second, and between the
two where the region's lines are commonly that far apart."""


class Box(NamedTuple):
    """A rectangle in pixels, origin top-left."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def height(self) -> float:
        """Height in pixels."""
        return self.bottom - self.top

    @property
    def width(self) -> float:
        """Width in pixels."""
        return self.right - self.left


@dataclass(frozen=True)
class Group:
    """Lines that belong together, as indices into the boxes that were given.

    Attributes:
        rows: lines side by side, left to right; rows from top to bottom.
        is_header: True for a heading, set in clearly larger type than the page.
    """

    rows: tuple[tuple[int, ...], ...]
    is_header: bool


def group_lines(boxes: Sequence[Box], item_lines: Collection[int] = ()) -> list[Group]:
    """Return the paragraphs and headings of a page in reading order; every box is in exactly one.

    A region is split at the gutter that has most text on both of its sides; lines that cross the gutter divide the
    columns into bands. A region without a gutter is read row by row. Vertical Chinese or Japanese is one paragraph of
    lines from right to left.

    Args:
        boxes: one for each line of text.
        item_lines: indices of lines that begin a list item, and so a paragraph.
    """
    if not boxes:
        return []
    if _is_vertical(boxes):
        order = sorted(range(len(boxes)), key=lambda n: -boxes[n].right)
        return [Group(tuple((line,) for line in order), False)]
    page_height = statistics.median(box.height for box in boxes)
    groups: list[Group] = []
    for region in _regions(boxes, list(range(len(boxes)))):
        groups += _paragraphs(boxes, region, page_height, item_lines)
    return groups


def _is_vertical(boxes: Sequence[Box]) -> bool:
    tall = sum(box.width * box.height for box in boxes if box.height > 2 * box.width)
    return tall > 0.5 * sum(box.width * box.height for box in boxes)


def reading_order(boxes: Sequence[Box]) -> list[int]:
    """Return the indices of `boxes` in the order in which they are read."""
    return [index for group in group_lines(boxes) for row in group.rows for index in row]


def _regions(boxes: Sequence[Box], lines: list[int]) -> list[list[int]]:
    """Return the single-column regions of `lines`, in reading order."""
    bands = _best_bands(boxes, lines)
    if bands is None:
        return [lines] if lines else []
    regions: list[list[int]] = []
    loose: list[int] = []
    for band in bands:
        if isinstance(band, _Columns):
            regions += _regions(boxes, loose) + _regions(boxes, band.left) + _regions(boxes, band.right)
            loose = []
        else:
            loose += band
    return regions + _regions(boxes, loose)


@dataclass
class _Columns:
    left: list[int]
    right: list[int]


Band = _Columns | list[int]


def _best_bands(boxes: Sequence[Box], lines: list[int]) -> list[Band] | None:
    """Return the bands of the best gutter, top to bottom, or None when there is no gutter."""
    if len(lines) < 2 * MIN_COLUMN_LINES:
        return None
    height = statistics.median(boxes[line].height for line in lines)
    best: tuple[float, list[Band]] | None = None
    for gutter in _gutters(boxes, lines, height):
        bands = _bands(boxes, lines, gutter)
        score = sum(_shared_height(boxes, band) for band in bands if isinstance(band, _Columns))
        if score > 2 * height and (best is None or score > best[0]):
            best = score, bands
    return best[1] if best else None


def _gutters(boxes: Sequence[Box], lines: list[int], height: float) -> list[float]:
    """Return x positions that might be gutters: just left of where several lines begin."""
    starts = sorted(boxes[line].left for line in lines)
    first = starts[0] + MIN_COLUMN_ASPECT * height
    found: list[float] = []
    for index, start in enumerate(starts):
        position = start - 0.3 * height
        together = index + MIN_COLUMN_LINES - 1 < len(starts) and starts[index + MIN_COLUMN_LINES - 1] - start < height
        if start > first and together and (not found or position - found[-1] > 0.5 * height):
            found.append(position)
    return found


def _bands(boxes: Sequence[Box], lines: list[int], gutter: float) -> list[Band]:
    """Return the lines in bands, top to bottom: between the lines that cross the gutter there may be columns."""
    crossing = sorted((n for n in lines if _crosses(boxes[n], gutter)), key=lambda n: boxes[n].top)
    rest = [line for line in lines if not _crosses(boxes[line], gutter)]
    edges = [_middle(boxes[line]) for line in crossing]
    bands: list[Band] = []
    for index in range(len(crossing) + 1):
        above = edges[index - 1] if index else float("-inf")
        below = edges[index] if index < len(edges) else float("inf")
        between = [line for line in rest if above <= _middle(boxes[line]) < below]
        bands += _split_band(boxes, between, gutter, above, below)
        if index < len(crossing):
            bands.append([crossing[index]])
    return bands


def _crosses(box: Box, gutter: float) -> bool:
    # Detected boxes are a little larger than the text, and reach into narrow gutters from both sides.
    reach = GUTTER_REACH * box.height
    return box.left < gutter - reach and box.right > gutter + reach


def _split_band(boxes: Sequence[Box], lines: list[int], gutter: float, above: float, below: float) -> list[Band]:
    """Return the columns between two crossing lines, with what belongs to the lines above and below them apart."""
    left = sorted((n for n in lines if boxes[n].left + boxes[n].right <= 2 * gutter), key=lambda n: boxes[n].top)
    right = sorted((n for n in lines if boxes[n].left + boxes[n].right > 2 * gutter), key=lambda n: boxes[n].top)
    head: list[int] = []
    tail: list[int] = []
    if left and right:
        head = _leading(boxes, left, right, above)
        tail = _trailing(boxes, left, right, below)
        left = [line for line in left if line not in head and line not in tail]
        right = [line for line in right if line not in head and line not in tail]
    if not (_is_column(boxes, left) and _is_column(boxes, right)):
        return [lines] if lines else []
    bands: list[Band] = [head, _Columns(left, right), tail]
    return [band for band in bands if band]


def _leading(boxes: Sequence[Box], left: list[int], right: list[int], above: float) -> list[int]:
    """Return the lines at the top of one column, above the other's top, that lie nearer to the line above."""
    longer, other = (left, right) if boxes[left[0]].top < boxes[right[0]].top else (right, left)
    start = boxes[other[0]].top
    early = [line for line in longer if boxes[line].bottom <= start + 0.3 * boxes[line].height]
    if not early or above == float("-inf") or len(early) == len(longer):
        return []
    return _up_to_widest_gap(boxes, [*early, longer[len(early)]], above)


def _up_to_widest_gap(boxes: Sequence[Box], lines: list[int], above: float) -> list[int]:
    """Return the lines before the widest gap in a run that begins under the position `above`."""
    # `above` is the middle of a line: half of the first line's height brings it to about that line's bottom.
    bottoms = [above + boxes[lines[0]].height / 2, *(boxes[line].bottom for line in lines[:-1])]
    gaps = [boxes[line].top - bottom for line, bottom in zip(lines, bottoms, strict=True)]
    return lines[: gaps.index(max(gaps))]


def _trailing(boxes: Sequence[Box], left: list[int], right: list[int], below: float) -> list[int]:
    """Return the lines at the foot of one column, below the other's foot, that lie nearer to the line below."""
    flipped = [Box(box.left, -box.bottom, box.right, -box.top) for box in boxes]
    return _leading(flipped, left[::-1], right[::-1], -below)


def _is_column(boxes: Sequence[Box], lines: list[int]) -> bool:
    """Return whether `lines` look like running text, and not like the cells of a table."""
    if len(lines) < MIN_COLUMN_LINES:
        return False
    widths = sorted(boxes[line].width for line in lines)
    wide = widths[int(0.8 * (len(widths) - 1))]
    height = statistics.median(boxes[line].height for line in lines)
    filled = sum(width >= 0.6 * wide for width in widths) / len(widths)
    return wide >= MIN_COLUMN_ASPECT * height and filled >= MIN_FILLED_SHARE


def _shared_height(boxes: Sequence[Box], columns: _Columns) -> float:
    tops = [min(boxes[line].top for line in side) for side in (columns.left, columns.right)]
    bottoms = [max(boxes[line].bottom for line in side) for side in (columns.left, columns.right)]
    return max(0.0, min(bottoms) - max(tops))


def _middle(box: Box) -> float:
    return (box.top + box.bottom) / 2


def _rows(boxes: Sequence[Box], lines: list[int]) -> list[list[int]]:
    """Return `lines` in rows, top to bottom, each from left to right."""
    rows: list[list[int]] = []
    for line in sorted(lines, key=lambda n: _middle(boxes[n])):
        last = boxes[rows[-1][0]] if rows else None
        if last and abs(_middle(boxes[line]) - _middle(last)) < 0.5 * min(boxes[line].height, last.height):
            rows[-1].append(line)
        else:
            rows.append([line])
    return [sorted(row, key=lambda n: boxes[n].left) for row in rows]


def _paragraphs(
    boxes: Sequence[Box], region: list[int], page_height: float, item_lines: Collection[int]
) -> list[Group]:
    """Return the rows of a single-column region as paragraphs and headings."""
    rows = _rows(boxes, region)
    left = min(boxes[line].left for line in region)
    right = max(boxes[line].right for line in region)
    groups: list[list[list[int]]] = []
    gap = _common_gap([_widest(boxes, row) for row in rows])
    for row in rows:
        group = groups[-1] if groups else []
        # The first continuation line of a list item hangs: it is indented, and begins nothing.
        hangs = len(group) == 1 and group[0][0] in item_lines
        previous = _widest(boxes, group[-1]) if group else None
        is_table = bool(group) and len(row) > 1 and len(group[-1]) > 1
        goes_on = previous and _continues(previous, _widest(boxes, row), left, right, hangs, gap)
        if is_table or (goes_on and row[0] not in item_lines):
            group.append(row)
        else:
            groups.append([row])
    return [_group(boxes, group, page_height) for group in groups]


def _continues(previous: Box, row: Box, left: float, right: float, hangs: bool, gap: float) -> bool:
    """Return whether `row` goes on with the paragraph whose last row is `previous`, in a column `left` to `right`."""
    height = min(previous.height, row.height)
    widest_gap = max(TIGHT_GAP * height, min(1.3 * gap, LOOSE_GAP * height))
    if max(previous.height, row.height) > 1.4 * height or row.top - previous.bottom > widest_gap:
        return False
    indented = not hangs and row.left - previous.left > 0.6 * height
    ended_early = previous.right < right - 0.3 * (right - left)
    return not indented and not ended_early


def _common_gap(rows: Sequence[Box]) -> float:
    """Return the median gap between rows in pixels, without those that follow a short last row."""
    gaps = [below.top - above.bottom for above, below in pairwise(rows)]
    return max(0.0, statistics.median(gaps)) if gaps else 0.0


def _widest(boxes: Sequence[Box], row: list[int]) -> Box:
    """Return the box that stands for a row; what stands beside it in the margin does not indent it."""
    return max((boxes[line] for line in row), key=lambda box: box.width)


def _group(boxes: Sequence[Box], rows: list[list[int]], page_height: float) -> Group:
    height = statistics.median(boxes[line].height for row in rows for line in row)
    larger = height >= HEADER_SIZE_RATIO * page_height and len(rows) <= 3 and all(len(row) == 1 for row in rows)
    return Group(tuple(tuple(row) for row in rows), larger)
