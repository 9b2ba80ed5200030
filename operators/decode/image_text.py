"""How much text do the pictures on a page show? A cheap look at rows of ink, for judging what a text layer lacks."""

from typing import Any, Final

import numpy as np
import pymupdf
from numpy.typing import NDArray

MIN_IMAGE_SHARE: Final = 0.10
_MAX_IMAGE_PIXELS: Final = 60_000_000
"""Larger images are not opened for this; 60 million pixels take about a second to decode."""
_INK: Final = 60
"""Levels below the paper's that count as ink at 72 dpi, where strokes are grey."""
_MIN_PAPER: Final = 190
_MAX_INK_SHARE: Final = 0.4
_LINE_HEIGHT_PX: Final = (4, 24)
_MIN_LINE_CHANGES: Final = 16
"""Changes between paper and ink along a line of text; a row through a line chart has 2 to 8."""
_CHAR_WIDTH_PX: Final = 5.0
_MIN_LINES: Final = 4


def image_text_chars(page: pymupdf.Page, images: list[dict[str, Any]], known: list[list[float]]) -> int:
    """Return about how many characters the larger images of a page show; 0 for photographs and drawings.

    Args:
        page: the page; with a /Rotate nothing is counted.
        images: what `Page.get_image_info` gives.
        known: boxes of text that the page paints over its images, and that does not count.
    """
    if page.rotation:
        return 0
    total = 0
    seen: list[pymupdf.Rect] = []
    for info in sorted(images, key=lambda info: -pymupdf.Rect(info["bbox"]).get_area()):
        box = pymupdf.Rect(info["bbox"]) & page.rect
        if box.is_empty or box.get_area() < MIN_IMAGE_SHARE * page.rect.get_area():
            break
        # Scans in layers show the same text in each.
        if any(other.contains(box) for other in seen):
            continue
        seen.append(box)
        if info["width"] * info["height"] > _MAX_IMAGE_PIXELS or box.get_area() > 4e6:
            continue
        pixmap = page.get_pixmap(clip=box, colorspace=pymupdf.csGRAY, alpha=False)
        gray = np.frombuffer(pixmap.samples, np.uint8).reshape(pixmap.height, pixmap.stride)[:, : pixmap.width].copy()
        for left, top, right, bottom in known:
            rows = slice(max(0, int(top) - pixmap.y), max(0, int(bottom) + 1 - pixmap.y))
            columns = slice(max(0, int(left) - pixmap.x), max(0, int(right) + 1 - pixmap.x))
            gray[rows, columns] = 255
        total += text_chars(gray)
    return total


def text_chars(gray: NDArray[np.uint8]) -> int:
    """Return about how many characters a picture at 72 dpi shows.

    Args:
        gray: (height, width) uint8, 0 is black.
    """
    if min(gray.shape) < 16:
        return 0
    paper = int(np.percentile(gray, 80))
    if paper < _MIN_PAPER:
        return 0
    ink = gray < paper - _INK
    if ink.mean() > _MAX_INK_SHARE:
        return 0
    # Frames and rules run through the gaps between lines; a row or column that is mostly ink is one.
    ink = ink & ~(ink.mean(axis=0) > 0.6)[None] & ~(ink.mean(axis=1) > 0.6)[:, None]
    rows = np.flatnonzero(np.diff(np.concatenate([[False], ink.sum(axis=1) > 1, [False]]).astype(np.int8)))
    lines = 0
    chars = 0.0
    for start, stop in zip(rows[::2], rows[1::2], strict=True):
        if not _LINE_HEIGHT_PX[0] <= stop - start <= _LINE_HEIGHT_PX[1]:
            continue
        band = ink[start:stop]
        changes = int(np.abs(np.diff(band.astype(np.int8), axis=1)).sum(axis=1).max())
        columns = np.flatnonzero(band.any(axis=0))
        if changes >= _MIN_LINE_CHANGES:
            lines += 1
            chars += (columns[-1] - columns[0] + 1) / _CHAR_WIDTH_PX
    return int(chars) if lines >= _MIN_LINES else 0
