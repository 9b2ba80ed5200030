"""What the PDF and image decoders share: options, steps of a page, pixel bounds, blankness.

A decoder is a generator that runs in a `DecoderBox`. It yields an `Opened`, then one or more `PageStep`s for each
page: what is known so far, early, so that a page that hangs in its third step still has the facts of the first two.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from operators.base import OperatorConfig
from operators.decode.child import error_fields
from schemas.errors import DecodeError, RecordError

POINTS_PER_INCH = 72.0
BLANK_CELL_PX = 4
BLANK_CELL_LEVELS = 24
"""A stroke of a 6 pt digit at 200 dpi is about 2 pixels wide and moves the mean of a 4 x 4 cell by 60 levels or more
where it is black on white; paper grain and single specks move it by less than 16."""
BLANK_CELL_COUNT = 2


class PageOptions(OperatorConfig):
    """How pages become pixels."""

    dpi: Annotated[float, Field(gt=0, le=1200, description="Rendering resolution where the caps allow it.")] = 200.0
    max_pixels: Annotated[
        int, Field(ge=10_000, description="Most pixels of a rendered page; larger ones are scaled down to it.")
    ] = 6_000_000
    max_side_px: Annotated[
        int, Field(ge=100, description="Longest side of a rendered page; longer ones are scaled down to it.")
    ] = 20_000
    min_side_px: Annotated[
        int, Field(ge=1, description="A page whose shorter side falls below this under the caps is too_large.")
    ] = 8
    max_source_pixels: Annotated[
        int, Field(ge=10_000, description="Most pixels of an image file before scaling; 4 bytes each while decoding.")
    ] = 300_000_000
    render: Annotated[
        Literal["always", "untrusted", "never"],
        Field(description="Which pages are rendered; untrusted: those whose text layer is not trustworthy."),
    ] = "untrusted"
    layout: Annotated[bool, Field(description="Read the text layer as labelled blocks, about 0.4 s a page.")] = False
    find_blank: Annotated[bool, Field(description="Drop the pixels of nearly uniform pages without text.")] = True


@dataclass(frozen=True)
class Opened:
    """The document could be opened; it has `page_count` pages."""

    page_count: int


@dataclass(frozen=True)
class TextVerdict:
    """Whether the embedded text of a page can stand for the page, and why."""

    has_text: bool
    trustworthy: bool
    reason: str
    is_scan: bool


@dataclass(frozen=True)
class PageStep:
    """What one step found out about a page.

    Attributes:
        page_number: counts from 1.
        facts: values of `PAGE_FACTS` columns.
        verdict: set by the step that has judged the text layer.
        image: (height, width, 3) uint8 RGB, where the page has to be read.
        is_blank: the page was rendered, and there is nothing on it.
        failure: fields of the error that ended the page, as `operators.decode.child.error_fields` gives them.
        is_last: no further step of this page follows.
    """

    page_number: int
    facts: dict[str, Any] = field(default_factory=dict)
    verdict: TextVerdict | None = None
    image: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    is_blank: bool = False
    failure: dict[str, Any] | None = None
    is_last: bool = False


def failed_step(page_number: int, error: RecordError) -> PageStep:
    """Return the last step of a page that failed."""
    return PageStep(page_number, failure=error_fields(error), is_last=True)


def missing_page(page_number: int, page_count: int) -> DecodeError:
    """Return the error of a page that was planned but is not there."""
    return DecodeError(f"page {page_number} of a document that has {page_count}", code="page_missing")


def capped_scale(width: float, height: float, scale: float, options: PageOptions) -> float:
    """Return `scale`, or the largest smaller one at which the page keeps within the pixel caps.

    Args:
        width: in any unit, as `height`.
        height: see `width`.
        scale: wanted pixels a unit.
        options: the caps.

    Raises:
        DecodeError: `too_large` when the page is so long that its shorter side would vanish.
    """
    if not (math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0):
        raise DecodeError(f"page of {width} x {height}", code="damaged", stage="render")
    capped = min(scale, math.sqrt(options.max_pixels / width / height), options.max_side_px / max(width, height))
    shorter_px = min(width, height) * capped
    if capped < scale and shorter_px < options.min_side_px:
        raise DecodeError(
            f"page of {width:g} x {height:g} would be {shorter_px:.1f} px wide under the pixel caps",
            code="too_large",
            stage="render",
        )
    return capped


def is_blank(image: np.ndarray[Any, np.dtype[np.uint8]]) -> bool:
    """Return whether an image shows nothing: no cell of 4 x 4 pixels (but two) stands out from the page.

    Args:
        image: (height, width, 3) uint8.
    """
    height, width = (side - side % BLANK_CELL_PX for side in image.shape[:2])
    if not height or not width:
        return bool(np.ptp(image) < BLANK_CELL_LEVELS)
    # Any ink of any colour darkens or lightens at least one channel; the first look costs one pass over the green.
    for channel in (1, 0, 2):
        cells = image[:height, :width, channel].reshape(
            height // BLANK_CELL_PX, BLANK_CELL_PX, width // BLANK_CELL_PX, BLANK_CELL_PX
        )
        means = cells.mean(axis=(1, 3), dtype=np.float32)
        if np.count_nonzero(np.abs(means - np.median(means)) > BLANK_CELL_LEVELS) > BLANK_CELL_COUNT:
            return False
    return True
