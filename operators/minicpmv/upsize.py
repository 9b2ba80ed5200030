"""Whether a small picture of text is worth enlarging, judged by the size and the density of its glyphs."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SMALL_GLYPH_PX: Final = 12.0
DENSE_GLYPHS_PER_KILOPIXEL: Final = 2.0
TINY_AREA_PX: Final = 6272
TINY_SIDE_PX: Final = 84
"""Numbers of the classifier with which MiniCPM-OCR 1.0 was trained."""

SMALLEST_GLYPH_AREA_PX: Final = 3
SMALLEST_GLYPH_HEIGHT_PX: Final = 2
LARGEST_GLYPH_SHARE: Final = 0.9
"""A blob that fills as much of a side is a frame or a rule, no glyph."""


def wanted_side_px(image: NDArray[np.uint8], slice_side_px: int) -> int | None:
    """Return the side of the square to whose area `image` should be brought.

    Args:
        image: (height, width, 3) uint8 RGB.
        slice_side_px: side of the square whose area one slice has.

    Returns:
        `slice_side_px` for small dense text, `TINY_SIDE_PX` for a tiny picture, None to keep it as large as it is.

    Source:
        transformers `models/minicpm_ocr/image_processing_minicpm_ocr.py`.
    """
    area_px = image.shape[0] * image.shape[1]
    heights_px = glyph_heights(image)
    glyph_px = float(np.median(heights_px)) if heights_px.size else 0.0
    density = heights_px.size * 1000.0 / area_px
    if 0 < glyph_px <= SMALL_GLYPH_PX and density >= DENSE_GLYPHS_PER_KILOPIXEL:
        return slice_side_px
    return TINY_SIDE_PX if area_px < TINY_AREA_PX else None


def glyph_heights(image: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return the height of every blob that may be a glyph, in pixels.

    Shapes:
        image: (height, width, 3) uint8 RGB.
        result: (blobs,) int32.
    """
    # Imported here: one mode of one member needs it, and every CPU worker imports this module.
    import cv2

    height_px, width_px = image.shape[:2]
    grey = np.asarray(Image.fromarray(np.ascontiguousarray(image)).convert("L"))
    _, binary = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    ink = binary == 0
    if ink.mean() > 0.5:
        # Light text on a dark ground: glyphs cover less than half of a picture.
        ink = ~ink
    _, _, facts, _ = cv2.connectedComponentsWithStats(ink.astype(np.uint8), connectivity=8)
    blobs: NDArray[Any] = facts[1:]
    widths_px, heights_px = blobs[:, cv2.CC_STAT_WIDTH], blobs[:, cv2.CC_STAT_HEIGHT]
    is_glyph = (
        (blobs[:, cv2.CC_STAT_AREA] >= SMALLEST_GLYPH_AREA_PX)
        & (heights_px >= SMALLEST_GLYPH_HEIGHT_PX)
        & (widths_px < LARGEST_GLYPH_SHARE * width_px)
        & (heights_px < LARGEST_GLYPH_SHARE * height_px)
    )
    return np.asarray(heights_px[is_glyph], np.int32)
