"""Image files as documents with Pillow: each frame of a TIFF is a page, every other file has one. In a `DecoderBox`."""

import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from operators.decode.pages import (
    POINTS_PER_INCH,
    Opened,
    PageOptions,
    PageStep,
    TextVerdict,
    capped_scale,
    failed_step,
    is_blank,
    missing_page,
)
from schemas.errors import DecodeError, RecordError

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")
ORIENTATION_TAG = 0x0112
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = (5, 6, 7, 8)
PLAUSIBLE_DPI = (10.0, 10_000.0)
MAX_SIDE_PX = 2**31 - 1
NO_TEXT = TextVerdict(False, False, "image", is_scan=True)

# The bound of PageOptions.max_source_pixels takes its place, after a JPEG has been asked for a smaller scale.
Image.MAX_IMAGE_PIXELS = None


def probe(path: str, password: str | None, max_pages: int) -> Iterator[dict[str, Any]]:
    """Yield the facts of an image file: values of `SOURCE_FACTS` columns, sizes of its first frame.

    Raises:
        DecodeError: `not_image`, `damaged`, or `too_many_pages`.
    """
    del password
    with open_image(path) as image:
        page_count = counted_frames(image)
        if page_count > max_pages:
            raise DecodeError(f"{page_count} frames, the policy allows {max_pages}", code="too_many_pages")
        check_sides(image)
        width_px, height_px = upright_size(image)
        yield {"page_count": page_count, "width_px": width_px, "height_px": height_px}


def decode_pages(
    path: str, password: str | None, page_numbers: Sequence[int], options: PageOptions
) -> Iterator[Opened | PageStep]:
    """Yield an `Opened`, then the steps of each frame, in the order of `page_numbers`.

    Raises:
        DecodeError: as `probe`.
    """
    del password
    with open_image(path) as image:
        page_count = counted_frames(image)
        yield Opened(page_count)
        for page_number in page_numbers:
            try:
                if page_number > page_count:
                    raise missing_page(page_number, page_count)
                yield from frame_steps(image, page_number, options)
            except RecordError as error:
                yield failed_step(page_number, error)


def open_image(path: str) -> Image.Image:
    """Return the image, its header read and nothing decoded.

    Raises:
        DecodeError: `not_image` or `damaged`.
    """
    try:
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise DecodeError("no readable image header", code="damaged") from error
    except Exception as error:
        raise translated(error, "open") from error


def counted_frames(image: Image.Image) -> int:
    """Return the pages of an image file: its frames if it is a TIFF, else one.

    Frames of the other formats are previews (MPO) or animations, not pages.

    Raises:
        DecodeError: `damaged`.
    """
    if image.format != "TIFF":
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception as error:
        raise translated(error, "open") from error


def frame_steps(image: Image.Image, page_number: int, options: PageOptions) -> Iterator[PageStep]:
    """Yield the steps of one frame: its size, then its pixels.

    Raises:
        DecodeError: the frame cannot be decoded, or is too large.
    """
    start = time.perf_counter()
    try:
        image.seek(page_number - 1)
        check_sides(image)
        width_px, height_px = upright_size(image)
        dpi = stated_dpi(image)
    except RecordError:
        raise
    except Exception as error:
        raise translated(error, "open") from error
    facts = {
        "page_count": counted_frames(image),
        "page_width_pt": width_px * POINTS_PER_INCH / dpi,
        "page_height_pt": height_px * POINTS_PER_INCH / dpi,
        "has_text_layer": False,
        "text_layer_chars": 0,
    }
    skip = options.render == "never"
    yield PageStep(page_number, facts, NO_TEXT, is_last=skip)
    if skip:
        return

    scale = capped_scale(width_px, height_px, 1.0, options)
    pixels = decode_frame(image, scale, options.max_source_pixels)
    blank = options.find_blank and is_blank(pixels)
    yield PageStep(
        page_number,
        {
            "image_height_px": pixels.shape[0],
            "image_width_px": pixels.shape[1],
            "dpi": dpi * pixels.shape[1] / width_px,
            "render_ms": (time.perf_counter() - start) * 1000,
        },
        image=None if blank else pixels,
        is_blank=blank,
        is_last=True,
    )


def check_sides(image: Image.Image) -> None:
    """Raise `too_large` for a size that a damaged header makes up, and that no column of the tables could hold."""
    if max(image.size) > MAX_SIDE_PX:
        raise DecodeError(f"{image.width} x {image.height} px, at most {MAX_SIDE_PX} a side", code="too_large")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height in pixels after the EXIF orientation."""
    width_px, height_px = image.size
    turned = owed_transpose(image) in TURNED
    return (height_px, width_px) if turned else (width_px, height_px)


def owed_transpose(image: Image.Image) -> int:
    """Return the EXIF orientation that is still to be applied, 1 for none; Pillow turns TIFF frames by itself."""
    # Pillow decodes a whole PNG to look for EXIF data behind its pixels, before any bound on them.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    return int(image.getexif().get(ORIENTATION_TAG, 1))


def stated_dpi(image: Image.Image) -> float:
    """Return the pixels an inch that the file states, 72 where it states nothing plausible."""
    stated = image.info.get("dpi")
    value = float(stated[0]) if isinstance(stated, tuple) and stated else 0.0
    return value if PLAUSIBLE_DPI[0] <= value <= PLAUSIBLE_DPI[1] else POINTS_PER_INCH


def decode_frame(image: Image.Image, scale: float, max_source_pixels: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the current frame, scaled and upright, over white, as (height, width, 3) uint8 RGB.

    Args:
        image: seeked to the frame.
        scale: at most 1.
        max_source_pixels: most pixels that are decoded.

    Raises:
        DecodeError: `too_large`, `memory_limit` or `damaged`.
    """
    width_px, height_px = image.size
    target = (max(1, round(width_px * scale)), max(1, round(height_px * scale)))
    try:
        if scale < 1:
            # Lets the JPEG decoder leave out what the scaling would throw away; no effect on other formats.
            image.draft(None, target)
        if image.width * image.height > max_source_pixels:
            raise DecodeError(
                f"{width_px} x {height_px} px, the policy allows {max_source_pixels}", code="too_large", stage="render"
            )
        transpose = TRANSPOSES.get(owed_transpose(image))
        reduced = eight_bits(image)
        if reduced.size != target:
            reduced = reduced.resize(target, Image.Resampling.LANCZOS, reducing_gap=2.0)
        frame = over_white(reduced)
        if transpose is not None:
            frame = frame.transpose(transpose)
        return np.asarray(frame)
    except RecordError:
        raise
    except Exception as error:
        raise translated(error, "render") from error


def eight_bits(image: Image.Image) -> Image.Image:
    """Return the image in a mode of 8-bit channels that can be resampled: L, LA, RGB, RGBA or CMYK."""
    if image.mode == "P":
        return image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode.startswith(("I", "F")):
        return stretched(image)
    if image.mode in ("RGB", "L") and "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK"):
        image.load()
        return image
    return image.convert({"1": "L", "La": "LA", "PA": "RGBA", "RGBa": "RGBA"}.get(image.mode, "RGB"))


def stretched(image: Image.Image) -> Image.Image:
    """Return deep grey as 8 bits: 16-bit values by their upper byte, floats and 32 bits over their own range."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((values >> 8).astype(np.uint8))
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low >= 0 and 255 < high <= 65535 and image.mode == "I":
        low, high = 0.0, 65535.0
    levels = (values.astype(np.float32) - low) * (255.0 / max(high - low, 1e-9))
    return Image.fromarray(np.nan_to_num(levels).clip(0, 255).astype(np.uint8))


def over_white(image: Image.Image) -> Image.Image:
    """Return the image as RGB, transparent parts white."""
    if image.mode in ("LA", "RGBA"):
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")


def translated(error: Exception, stage: str) -> DecodeError:
    """Return the `DecodeError` for what Pillow raised on hostile bytes: nearly any exception."""
    code = "memory_limit" if isinstance(error, MemoryError) else "damaged"
    found = "truncated" if isinstance(error, struct.error | EOFError) else str(error)
    return DecodeError(found or type(error).__name__, code=code, stage=stage)
