"""The slices of one record as the model takes them. No torch: the operator that makes them is named on the driver."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from operators.minicpmv.slicing import Size
from schemas.errors import GenerationError


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
