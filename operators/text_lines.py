"""Lines of text in a picture of a page: found, read, and judged by RapidOCR (PP-OCRv4 on ONNX Runtime).

Legend: H, W are the height and width of an image in pixels.
"""

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray
from rapidocr_onnxruntime import RapidOCR

Image = NDArray[np.uint8]
Polygon = NDArray[np.float32]

MIN_DETECT_SIDE_PX: Final = 736
"""Shorter side that the released detector asks for; smaller pictures are enlarged."""
MAX_ENLARGEMENT: Final = 3.0
WINDOW_ASPECT: Final = 3.0
"""Pages taller than this many widths are searched in windows of this shape."""
WINDOW_OVERLAP: Final = 0.25
COLUMN_PX: Final = 8
"""Width of one output column of the recogniser, in pixels of a line scaled to `LINE_HEIGHT_PX`."""
LINE_HEIGHT_PX: Final = 48
REACH_COLUMNS: Final = 4
"""How far to either side of a character its own ink reaches: two thirds of a line's height."""
SURE_SCORE: Final = 0.95
"""Seen: lines of clean Latin and Chinese print 0.96 and more, Cyrillic read as Latin 0.75 to 0.88."""
WORD_GAP: Final = 0.16
"""Least white space between words, in line heights; a line that was read with spaces sets its own measure."""
GUTTER_GAP: Final = 0.5
"""Least white space, in line heights, that parts two columns which the detector took for one line."""
GUTTER_STARTS: Final = 3
"""Lines that must begin at the far side of such a gap: Chinese print is often spaced as widely."""

_WORD = re.compile(r"[^\W_]{3,}")
_CHANGES_CASE = re.compile(r"[a-z]{1}[A-Z]")
_DIGIT_INSIDE = re.compile(r"[a-z]\d|\d[a-z]{2,}[a-z\d]*\d|[A-Za-z]\d[A-Za-z]")
_CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxz]{6,}", re.IGNORECASE)
_LATIN = re.compile(r"[A-Za-zÀ-ÿ]")
_NOT_LATIN = re.compile(r"[\u0370-\u04ff]")


@dataclass(frozen=True)
class TextLine:
    """One line as it was read.

    Attributes:
        polygon: (4, 2) float32, its corners in pixels of the picture, clockwise from the top left.
        text: the characters, with the spaces that the picture shows.
        score: mean probability of the characters, 0 to 1.
        unread_share: share of the line's inked width that no character explains, 0 to 1.
        odd_share: share of its words that do not look like words, 0 to 1.
    """

    polygon: Polygon
    text: str
    score: float
    unread_share: float
    odd_share: float

    @property
    def quality(self) -> float:
        """How far the text can be trusted, 0 to 1."""
        if not self.text.strip():
            return 0.0
        # A sure reading of odd words is a name, a code or a password.
        odd = self.odd_share if self.score < SURE_SCORE else 0.0
        return self.score * (1 - self.unread_share) * (1 - 0.5 * odd)

    @property
    def area_px(self) -> float:
        """Area of the polygon in pixels."""
        return float(cv2.contourArea(self.polygon))


class LineReader:
    """The detector and the recogniser, loaded once.

    Args:
        threads: threads of each ONNX Runtime session.
        detect_side_px: longer side at which lines are searched.
    """

    def __init__(self, threads: int, detect_side_px: int) -> None:
        # The detector's own limit would enlarge or reduce once more; `_detect_scale` has already chosen.
        self._engine: Any = RapidOCR(
            intra_op_num_threads=threads,
            inter_op_num_threads=1,
            det_limit_type="max",
            det_limit_side_len=detect_side_px,
        )
        self._detect_side_px = detect_side_px

    def read(self, image: Image) -> list[TextLine]:
        """Return the lines of `image`, (H, W, 3) uint8 RGB, in no particular order."""
        picture = np.ascontiguousarray(image[:, :, ::-1])
        found = self._find(picture)
        if not found:
            return []
        whole = self._engine.get_crop_img_list(picture, found)
        starts = np.array([polygon[0, 0] for polygon in found], np.float32)
        polygons = [
            part for polygon, crop in zip(found, whole, strict=True) for part in split_at_gutters(polygon, crop, starts)
        ]
        crops = self._engine.get_crop_img_list(picture, polygons)
        readings, _ = self._engine.text_rec(crops, return_word_box=True)
        judged = [_judged(*found) for found in zip(polygons, crops, readings, strict=True)]
        # The detector now and then marks an empty place: no ink, no text.
        return [line for line in judged if line.text.strip() or line.unread_share > 0]

    def _find(self, picture: Image) -> list[Polygon]:
        height, width = picture.shape[:2]
        found: list[Polygon] = []
        for top, bottom, own_top, own_bottom in _windows(height, width):
            for polygon in self._detect(picture[top:bottom]):
                polygon[:, 1] += top
                if own_top <= polygon[:, 1].mean() < own_bottom:
                    found.append(polygon)
        return found

    def _detect(self, picture: Image) -> list[Polygon]:
        height, width = picture.shape[:2]
        scale = _detect_scale(height, width, self._detect_side_px)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        boxes, _ = self._engine.text_det(cv2.resize(picture, size, interpolation=method) if scale != 1 else picture)
        if boxes is None:
            return []
        ratio = np.array([width / size[0], height / size[1]], np.float32)
        return [np.asarray(box, np.float32) * ratio for box in boxes]


def _detect_scale(height: int, width: int, detect_side_px: int) -> float:
    shorter, longer = sorted((height, width))
    return min(max(1.0, MIN_DETECT_SIDE_PX / shorter), MAX_ENLARGEMENT, detect_side_px / longer)


def _windows(height: int, width: int) -> list[tuple[int, int, float, float]]:
    """Return top, bottom, and the range whose lines each window owns, so that a very tall page keeps its resolution."""
    if height <= WINDOW_ASPECT * width:
        return [(0, height, -math.inf, math.inf)]
    side, overlap = round(WINDOW_ASPECT * width), round(WINDOW_OVERLAP * width)
    count = math.ceil((height - overlap) / (side - overlap))
    tops = [round(n * (height - side) / (count - 1)) for n in range(count)]
    cuts = [-math.inf, *((above + side + top) / 2 for above, top in pairwise(tops)), math.inf]
    return [(top, top + side, cuts[n], cuts[n + 1]) for n, top in enumerate(tops)]


def split_at_gutters(polygon: Polygon, crop: Image, starts: NDArray[np.float32]) -> list[Polygon]:
    """Return `polygon`, cut where its line `crop` shows a gap at whose far side other lines begin.

    Args:
        polygon: (4, 2), corners clockwise from the top left.
        crop: (H, W, 3) uint8, what the polygon encloses, level.
        starts: x positions at which the lines of the page begin.
    """
    height, width = crop.shape[:2]
    inked = np.flatnonzero(_ink_counts(crop) > 0)
    if width < 4 * height or len(inked) < 2:
        return [polygon]
    left, right = polygon[0, 0], polygon[1, 0]
    gaps = np.diff(inked)
    # A bullet is nearer to its item than to a column of its own.
    cuts = [
        (inked[n] + inked[n + 1]) / 2 / width
        for n in np.flatnonzero(gaps > GUTTER_GAP * height)
        if inked[n] - inked[0] > height
        and inked[-1] - inked[n + 1] > height
        and (abs(starts - (left + inked[n + 1] / width * (right - left))) < 0.6 * height).sum() >= GUTTER_STARTS
    ]
    shares = [0.0, *cuts, 1.0]
    top, bottom = (polygon[0], polygon[1]), (polygon[3], polygon[2])
    return [
        np.array([_between(*top, a), _between(*top, b), _between(*bottom, b), _between(*bottom, a)], np.float32)
        for a, b in pairwise(shares)
    ]


def _between(start: Polygon, stop: Polygon, share: float) -> Polygon:
    return np.asarray(start + (stop - start) * share, np.float32)


def _judged(polygon: Polygon, crop: Image, reading: tuple[str, float, list[Any]]) -> TextLine:
    text, score, (_, _, word_columns, _, _) = reading
    columns = [column for word in word_columns for column in word]
    counts = _ink_counts(crop)
    # One pixel in a column is a speck, or the blur of a neighbour: it needs no character to explain it.
    ink = counts > 1
    px_per_column = COLUMN_PX * crop.shape[0] / LINE_HEIGHT_PX
    return TextLine(
        polygon=polygon,
        text=with_spaces(text, [(column + 0.5) * px_per_column for column in columns], counts > 0, crop.shape[0]),
        score=float(score),
        unread_share=_unread_share(columns, ink, px_per_column),
        odd_share=odd_word_share(text),
    )


def _ink_counts(crop: Image) -> NDArray[np.int64]:
    """Return the number of inked pixels in each pixel column of a line; rules along the text are left out."""
    gray = cv2.cvtColor(crop, cv2.COLOR_BGR2GRAY)
    _, mask = cv2.threshold(gray, 0, 1, cv2.THRESH_BINARY_INV + cv2.THRESH_OTSU)
    if mask.mean() > 0.5:
        mask = 1 - mask
    ruled = mask.mean(axis=1) > 0.8
    return np.asarray(mask[~ruled].sum(axis=0), np.int64)


def _unread_share(columns: list[int], ink: NDArray[np.bool_], px_per_column: float) -> float:
    """Return the share of inked columns that are farther from every character than a character reaches."""
    inked = np.flatnonzero(ink) / px_per_column
    if not len(inked):
        return 0.0
    if not columns:
        return 1.0
    distance = np.abs(inked[:, None] - (np.asarray(columns)[None, :] + 0.5)).min(axis=1)
    return float((distance > REACH_COLUMNS).mean())


def with_spaces(text: str, centres_px: list[float], ink: NDArray[np.bool_], height_px: int) -> str:
    """Return `text` with a space put where the picture shows a word gap that the recogniser left out.

    Args:
        text: the characters read.
        centres_px: where each of them was seen.
        ink: (W,) bool, the pixel columns that hold ink.
        height_px: height of the line.
    """
    gaps = [_widest_gap(ink[int(before) : int(after) + 1]) for before, after in pairwise(centres_px)]
    spaces = [
        _widest_gap(ink[int(centres_px[n - 1]) : int(centres_px[n + 1]) + 1])
        for n in range(1, len(text) - 1)
        if text[n] == " "
    ]
    least = max(WORD_GAP * height_px, 0.8 * float(np.median(spaces)) if spaces else 0.0)
    pieces = list(text[:1])
    for gap, before, after in zip(gaps, text, text[1:], strict=False):
        if gap >= least and _may_part(before, after):
            pieces.append(" ")
        pieces.append(after)
    return "".join(pieces)


def _may_part(before: str, after: str) -> bool:
    """Return whether a word may end with `before` and another begin with `after`."""
    ends = _LATIN.match(before) or before.isdigit() or before in ",.;:!?)"
    begins = _LATIN.match(after) or (after.isdigit() and not before.isdigit()) or after == "("
    return bool(ends and begins)


def _widest_gap(ink: NDArray[np.bool_]) -> int:
    """Return the widest run without ink that has ink on both sides."""
    inked = np.flatnonzero(ink)
    return int(np.diff(inked).max()) - 1 if len(inked) > 1 else 0


def odd_word_share(text: str) -> float:
    """Return the share of words of three characters and more that Latin print would not hold.

    Cyrillic, Greek or Georgian read as Latin shows capitals and digits inside words, and scripts mixed in one word.
    Text without such words gives 0.
    """
    words = _WORD.findall(text)
    latin = [word for word in words if _LATIN.search(word)]
    if not latin:
        return 0.0
    return sum(_is_odd(word) for word in latin) / len(latin)


def _is_odd(word: str) -> bool:
    return bool(
        (len(_CHANGES_CASE.findall(word)) > 0 and not _is_camel_case(word))
        or _DIGIT_INSIDE.search(word)
        or _CONSONANTS.search(word)
        or (_NOT_LATIN.search(word) and _LATIN.search(word))
    )


def _is_camel_case(word: str) -> bool:
    """Return whether each capital but the first begins a part of three letters or more, as in a product's name."""
    return all(len(part) >= 3 for part in re.findall(r"[A-Z]*[a-z]+|[A-Z]+", word))
