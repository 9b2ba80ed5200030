"""The slices of one record as the model takes them. No torch: the operator that makes them is named on the driver."""

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from operators.minicpmv.slicing import Size
from schemas.errors import GenerationError

SAMPLE_STEP: Final = 4093
"""Of the bytes that tell most pictures of equal size apart: 0.1 ms for a page, whose digest takes 5 ms (measured).
A prime, so that it meets all colours and columns."""


@dataclass(frozen=True)
class Visual:
    """The slices of one request, as they travel in a row.

    Attributes:
        packs: temporal ids of the slices that are resampled together, in tenths of a second: a pack takes as many
            consecutive slices as it has ids. None when each slice is an image of its own.

    Shapes:
        pixels: (bytes,) uint8; each slice is height x width x 3 RGB, rows first, one slice after the other.
        shapes: S sizes.
    """

    pixels: NDArray[np.uint8]
    shapes: tuple[Size, ...]
    packs: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.packs is not None and sum(map(len, self.packs)) != len(self.shapes):
            raise GenerationError(f"packs of {sum(map(len, self.packs))} slices for {len(self.shapes)} slices")
        wanted = sum(size.height_px * size.width_px * 3 for size in self.shapes)
        if self.pixels.size != wanted:
            raise GenerationError(f"{self.pixels.size} bytes of pixels for slices that hold {wanted}")

    def patch_count(self, patch_px: int) -> int:
        """Return the number of patches of all slices."""
        return sum((size.height_px // patch_px) * (size.width_px // patch_px) for size in self.shapes)


def equal_content(visuals: Sequence[Visual]) -> list[str | None]:
    """Return a key for each that shows the same as another of them, equal where they do; None for the others.

    Whole pixels are read only of those that agree in a sample.
    """
    outlines = [outline(visual) for visual in visuals]
    counts = Counter(outlines)
    keys = [content_digest(visual) if counts[own] > 1 else None for visual, own in zip(visuals, outlines, strict=True)]
    repeated = Counter(keys)
    return [key if repeated[key] > 1 else None for key in keys]


def outline(visual: Visual) -> Hashable:
    """Return what differs between most pictures and costs next to nothing."""
    return (visual.shapes, visual.packs, visual.pixels[::SAMPLE_STEP].tobytes())


def content_digest(visual: Visual) -> str:
    """Return a digest of all that the model sees of it."""
    found = hashlib.blake2b(repr((visual.shapes, visual.packs)).encode(), digest_size=16)
    found.update(np.ascontiguousarray(visual.pixels).data)
    return found.hexdigest()
