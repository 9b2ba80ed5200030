"""Which way up a page lies, and by how much it is skewed.

Text lines are found as the direction in which the ink's projection is sharpest and the gaps between glyphs are
narrowest. The small direction classifier of PP-OCR votes which of the two ways along that direction is up, and every
turn that it proposes is checked by reading a few lines both ways. Where there is too little text, or the evidence is
weak, the page is left as it is.

Legend: H, W are the height and width of an image in pixels.
"""

import functools
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from schemas.errors import ConfigError

Image = NDArray[np.uint8]
Floats = NDArray[np.float64]

WORK_SIDE_PX: Final = 1000
"""Long side of the reduced page: the glyphs of 8 pt print keep four pixels of height or more."""
MAX_SKEW_DEGREES: Final = 15.0
MIN_GLYPHS: Final = 12
"""Fewer glyph-like components give no stable projection."""
MIN_SKEW_GLYPHS: Final = 60
"""One or two short lines are sharp at any small angle."""
MAX_POINTS: Final = 20_000
STRIPS: Final = 3
"""Ink is projected in this many strips of the page, so that columns whose lines lie at different heights do not fill
each other's gaps."""
MIN_EVIDENCE: Final = 2.0
"""Least product of the two ratios between the directions. Seen: photograph 1.2, text pages 4.4 and more."""
MIN_CROPS: Final = 3
MAX_CROPS: Final = 12
CROP_HEIGHT_PX: Final = 48
CROP_WIDTH_PX: Final = 192
MIN_VOTE: Final = 0.6
MIN_READING: Final = 0.88
"""Seen: lines of Chinese and Latin print 0.91 and more once turned rightly, Armenian turned wrongly 0.87."""
READING_MARGIN: Final = 0.08
MIN_STANDING: Final = 0.75


@dataclass(frozen=True)
class Orientation:
    """How to put a page upright.

    Attributes:
        rotation: clockwise turn to apply, one of 0, 90, 180, 270.
        skew_degrees: counter-clockwise turn to apply after it, within +-15 degrees.
        confidence: 0 to 1; 0 where nothing could be said.
    """

    rotation: int
    skew_degrees: float
    confidence: float


UNKNOWN: Final = Orientation(0, 0.0, 0.0)


@dataclass(frozen=True)
class _Glyphs:
    """Components of the size of letters on a reduced page.

    Shapes:
        mask: (H, W) uint8, 1 inside the bounding boxes of the glyphs.
        xs, ys: (N,) float64, coordinates of their ink, at most `MAX_POINTS` of it.
    """

    mask: Image
    xs: Floats
    ys: Floats
    count: int
    side_px: float


def find_orientation(image: Image) -> Orientation:
    """Return the turn and skew that put `image` upright; `Orientation(0, 0.0, 0.0)` where there is too little text.

    Lines that run down the page count as sideways text only when they can be read once turned: otherwise they may
    be vertical Chinese or Japanese, or a script that this reader does not know.

    Args:
        image: (H, W, 3) uint8 RGB.
    """
    gray = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
    small = _reduced(gray)
    glyphs = _glyphs(small)
    if glyphs is None:
        return UNKNOWN
    evidence = _row_evidence(glyphs)
    if max(evidence, 1 / evidence) < MIN_EVIDENCE:
        return UNKNOWN
    if evidence > 1:
        return _half_turn(gray, small, _skew(glyphs), glyphs.side_px)
    return _quarter_turn(gray, small, glyphs.side_px)


def has_text_lines(image: Image) -> bool:
    """Return whether `image`, (H, W, 3) uint8 RGB, holds glyphs that stand in lines, in whatever script."""
    glyphs = _glyphs(_reduced(np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))))
    if glyphs is None:
        return False
    evidence = _row_evidence(glyphs)
    return max(evidence, 1 / evidence) >= MIN_EVIDENCE


def upright(image: Image, orientation: Orientation) -> Image:
    """Return `image` turned by `orientation`, on a canvas that holds all of it, the new corners white.

    The centre of the page stays the centre of the canvas, whose sides are those of `hull_size`, rounded up.

    Args:
        image: (H, W, 3) uint8.
        orientation: what `find_orientation` said.
    """
    turned: Image = np.ascontiguousarray(np.rot90(image, -(orientation.rotation // 90)))
    if not orientation.skew_degrees:
        return turned
    height, width = turned.shape[:2]
    canvas_height, canvas_width = hull_size(height, width, orientation.skew_degrees)
    size = math.ceil(canvas_width), math.ceil(canvas_height)
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), orientation.skew_degrees, 1.0)
    matrix[:, 2] += (size[0] - width) / 2, (size[1] - height) / 2
    white = (255, 255, 255)
    return np.asarray(cv2.warpAffine(turned, matrix, size, flags=cv2.INTER_CUBIC, borderValue=white), np.uint8)


def hull_size(height: float, width: float, skew_degrees: float) -> tuple[float, float]:
    """Return height and width of the upright rectangle around a `height` x `width` one turned by `skew_degrees`."""
    sine, cosine = abs(math.sin(math.radians(skew_degrees))), math.cos(math.radians(skew_degrees))
    return width * sine + height * cosine, width * cosine + height * sine


def _reduced(gray: Image) -> Image:
    factor = WORK_SIDE_PX / max(gray.shape)
    if factor >= 1:
        return gray
    height, width = (max(1, round(side * factor)) for side in gray.shape)
    return np.asarray(cv2.resize(gray, (width, height), interpolation=cv2.INTER_AREA))


def _glyphs(small: Image) -> _Glyphs | None:
    """Return the glyph-like components of a reduced page, or None where there are too few."""
    background = cv2.blur(small, (41, 41)).astype(np.int16)
    ink = ((background - small) > 18).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(ink, connectivity=8)
    width, height, area = stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT], stats[:, cv2.CC_STAT_AREA]
    longer, shorter = np.maximum(width, height), np.minimum(width, height)
    # Rules and pictures are left out: a table's grid is as sharp down the page as across it.
    fits = (longer >= 3) & (longer <= 60) & (area >= 4) & (shorter * 12 > longer)
    fits[0] = False
    if fits.sum() < MIN_GLYPHS:
        return None
    mask = np.zeros(small.shape, np.uint8)
    for left, top, box_width, box_height, _ in stats[fits]:
        mask[top : top + box_height, left : left + box_width] = 1
    ys, xs = np.nonzero(fits[labels])
    step = max(1, math.ceil(len(xs) / MAX_POINTS))
    # A stride that shares no factor with line pitches would need luck; a fixed shuffle does not.
    kept = np.random.default_rng(0).permutation(len(xs))[::step]
    side_px = float(np.median(longer[fits]))
    return _Glyphs(mask, xs[kept].astype(np.float64), ys[kept].astype(np.float64), int(fits.sum()), side_px)


def _row_evidence(glyphs: _Glyphs) -> float:
    """Return how much more the text runs along rows than along columns; below 1 it runs along columns."""
    window_px = max(2, round(glyphs.side_px * 0.8))
    height, width = glyphs.mask.shape
    angles = np.arange(-MAX_SKEW_DEGREES, MAX_SKEW_DEGREES + 0.1, 0.5)
    rows = max(_sharpness(glyphs.xs, glyphs.ys, width, angle, window_px) for angle in angles)
    cols = max(_sharpness(glyphs.ys, -glyphs.xs, height, angle, window_px) for angle in angles)
    longest_gap = 4 * glyphs.side_px
    gaps = _mean_gap(glyphs.mask.T, longest_gap) / _mean_gap(glyphs.mask, longest_gap)
    return max(rows, 1e-9) / max(cols, 1e-9) * gaps


def _sharpness(xs: Floats, ys: Floats, extent_px: int, degrees: float, window_px: int) -> float:
    """Return how sharply ink projected at `degrees` changes over `window_px`.

    Changes over less than a glyph say little: Chinese print has them along both axes.
    """
    angle = math.radians(degrees)
    bins = ys * math.cos(angle) - xs * math.sin(angle)
    bins = (bins - bins.min()).astype(np.int64) + window_px
    length = int(bins.max()) + window_px + 1
    strip = np.clip((xs - xs.min()) * STRIPS / extent_px, 0, STRIPS - 1).astype(np.int64)
    profile = np.bincount(strip * length + bins, minlength=length * STRIPS).astype(np.float64)
    summed = np.cumsum(profile)
    smooth = summed[window_px:] - summed[:-window_px]
    change = smooth[window_px:] - smooth[:-window_px]
    return float(change @ change)


def _mean_gap(mask: Image, longest_px: float) -> float:
    """Return the mean length of the gaps inside the rows of `mask`, leaving out those over `longest_px`."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    row_length = edges.shape[1]
    starts, stops = np.flatnonzero(edges.ravel() == 1), np.flatnonzero(edges.ravel() == -1)
    same_row = starts[1:] // row_length == stops[:-1] // row_length
    gaps = (starts[1:] - stops[:-1])[same_row]
    gaps = gaps[gaps <= longest_px]
    return float(gaps.mean()) if len(gaps) else longest_px


def _skew(glyphs: _Glyphs) -> float:
    """Return the angle by which the lines fall to the right, to a tenth of a degree: the turn that undoes it."""
    if glyphs.count < MIN_SKEW_GLYPHS:
        return 0.0
    width = glyphs.mask.shape[1]
    window_px = max(2, round(glyphs.side_px * 0.8))
    step = 0.5
    coarse = np.arange(-MAX_SKEW_DEGREES, MAX_SKEW_DEGREES + 0.1, step)
    best = max(coarse, key=lambda angle: _sharpness(glyphs.xs, glyphs.ys, width, angle, window_px))
    fine = np.arange(best - step, best + step + 0.01, 0.1)
    best = max(fine, key=lambda angle: _sharpness(glyphs.xs, glyphs.ys, width, angle, max(1, window_px // 3)))
    best = float(np.clip(round(best, 1), -MAX_SKEW_DEGREES, MAX_SKEW_DEGREES))
    # Below this, resampling costs more sharpness than the turn gains.
    return best if abs(best) >= 0.3 else 0.0


def _half_turn(gray: Image, small: Image, skew_degrees: float, side_px: float) -> Orientation:
    crops = _line_crops(gray, small, skew_degrees, side_px)
    if len(crops) < MIN_CROPS:
        return Orientation(0, skew_degrees, 0.3)
    up = float(_up_probability(crops).mean())
    if up > 1 - MIN_VOTE:
        return Orientation(0, skew_degrees, max(up, 0.5))
    reading, inverted = _readings(crops)
    if inverted > MIN_READING and inverted - reading > READING_MARGIN and not _stands_across(crops, 1):
        return Orientation(180, skew_degrees, 1 - up)
    return Orientation(0, skew_degrees, 0.3)


def _quarter_turn(gray: Image, small: Image, side_px: float) -> Orientation:
    gray, small = (np.ascontiguousarray(np.rot90(picture, -1)) for picture in (gray, small))
    glyphs = _glyphs(small)
    if glyphs is None:
        return UNKNOWN
    skew_degrees = _skew(glyphs)
    crops = _line_crops(gray, small, skew_degrees, side_px)
    if len(crops) < MIN_CROPS:
        return UNKNOWN
    clockwise, counter = _readings(crops)
    if max(clockwise, counter) < MIN_READING or abs(clockwise - counter) < READING_MARGIN:
        return UNKNOWN
    if _stands_across(crops, 1 if counter > clockwise else 3):
        return UNKNOWN
    return Orientation(90 if clockwise > counter else 270, skew_degrees, max(clockwise, counter))


def _stands_across(crops: list[Image], quarters: int) -> bool:
    """Return whether single characters of lines can be read once they are turned counter-clockwise by `quarters`.

    The recogniser has learned vertical Chinese as lines turned counter-clockwise, so reading such a line proves
    nothing; its characters one by one do.
    """
    side = CROP_HEIGHT_PX
    windows = [crop[:, left : left + side] for crop in crops[:6] for left in range(0, crop.shape[1] - side + 1, 12)]
    scores = _scores([np.ascontiguousarray(np.rot90(window, quarters)) for window in windows])
    # Few windows hold just one character.
    return bool(np.quantile(scores, 0.75) > MIN_STANDING)


def _line_crops(gray: Image, small: Image, skew_degrees: float, side_px: float) -> list[Image]:
    """Return up to `MAX_CROPS` pieces of text lines, `CROP_HEIGHT_PX` high and `CROP_WIDTH_PX` wide, deskewed."""
    height, width = small.shape
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), skew_degrees, 1.0)
    level = np.asarray(cv2.warpAffine(small, turn, (width, height), borderMode=cv2.BORDER_REPLICATE))
    boxes = _line_boxes(level, side_px)
    picked = [boxes[index] for index in np.linspace(0, len(boxes) - 1, min(len(boxes), MAX_CROPS)).astype(int)]
    scale = gray.shape[1] / width
    back = cv2.invertAffineTransform(turn)
    return [_crop(gray, box, back, scale) for box in picked]


def _line_boxes(level: Image, side_px: float) -> list[tuple[int, int, int, int]]:
    """Return left, top, width, height of stretches of text lines on a deskewed reduced page, top to bottom."""
    glyphs = _glyphs(level)
    if glyphs is None:
        return []
    kernel = np.ones((1, max(3, round(side_px))), np.uint8)
    joined = cv2.morphologyEx(glyphs.mask, cv2.MORPH_CLOSE, kernel)
    _, _, stats, _ = cv2.connectedComponentsWithStats(joined, connectivity=8)
    boxes = [tuple(int(value) for value in row[:4]) for row in stats[1:]]
    lines = [box for box in boxes if box[2] >= 3 * box[3] and 0.6 * side_px <= box[3] <= 3 * side_px]
    return sorted(((left, top, width, height) for left, top, width, height in lines), key=lambda box: box[1])


def _crop(gray: Image, box: tuple[int, int, int, int], back: Floats, scale: float) -> Image:
    """Return the beginning of the line in `box`, cut from the full page through the inverse turn `back`."""
    left, top, width, height = box
    margin = 0.12 * height
    line_height = height + 2 * margin
    line_width = min(width + 2 * margin, line_height * CROP_WIDTH_PX / CROP_HEIGHT_PX)
    corners = np.array(
        [
            [left - margin, top - margin],
            [left - margin + line_width, top - margin],
            [left - margin, top + height + margin],
        ]
    )
    source = (corners @ back[:, :2].T + back[:, 2]) * scale
    target_width = max(CROP_HEIGHT_PX, round(line_width / line_height * CROP_HEIGHT_PX))
    target = np.array([[0, 0], [target_width, 0], [0, CROP_HEIGHT_PX]], np.float32)
    matrix = cv2.getAffineTransform(source.astype(np.float32), target)
    size = target_width, CROP_HEIGHT_PX
    return np.asarray(cv2.warpAffine(gray, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))


@functools.lru_cache(maxsize=2)
def _session(name: str) -> Any:
    """Return the ONNX session of a model that rapidocr_onnxruntime carries, on one thread."""
    # Imported here: workers that never meet a page of pixels need not load it.
    import onnxruntime

    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    if spec is None or spec.origin is None:
        raise ConfigError("rapidocr_onnxruntime is not installed: make setup installs it without its dependencies")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    path = Path(spec.origin).parent / "models" / name
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(name: str, crops: list[Image], width_px: int = CROP_WIDTH_PX) -> NDArray[np.float32]:
    session = _session(name)
    batch = np.zeros((len(crops), 3, CROP_HEIGHT_PX, width_px), np.float32)
    for index, crop in enumerate(crops):
        batch[index, :, :, : crop.shape[1]] = crop[:, :width_px] / 127.5 - 1
    (output,) = session.run(None, {session.get_inputs()[0].name: batch})
    return np.asarray(output, np.float32)


def _up_probability(crops: list[Image]) -> NDArray[np.float32]:
    """Return for each crop how likely it stands upright, and not on its head."""
    return _run("ch_ppocr_mobile_v2.0_cls_infer.onnx", crops)[:, 0]


def _readings(crops: list[Image]) -> tuple[float, float]:
    """Return how surely the crops are read as they stand, and turned upside down: 0 to 1."""
    inverted = [np.ascontiguousarray(np.rot90(crop, 2)) for crop in crops]
    return _reading(crops), _reading(inverted)


def _reading(crops: list[Image]) -> float:
    return float(_scores(crops).mean())


def _scores(crops: list[Image]) -> NDArray[np.float32]:
    """Return for each crop the mean probability of what was read, blanks left out."""
    probabilities = _run("ch_PP-OCRv4_rec_infer.onnx", crops, max(crop.shape[1] for crop in crops))
    best, read = probabilities.max(axis=2), probabilities.argmax(axis=2) != 0
    return np.asarray((best * read).sum(axis=1) / np.maximum(read.sum(axis=1), 1), np.float32)
