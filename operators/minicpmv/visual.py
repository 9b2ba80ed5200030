"""The slices of one record as the model takes them. No torch: the operator that makes them is named on the driver."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from operators.minicpmv.slicing import Size
from schemas.errors import GenerationError


@dataclass(frozen=True)
class Visual:
    """The slices of one request, as they travel in a row.

    Shapes:
        pixels: (bytes,) uint8; each slice is height x width x 3 RGB, rows first, one slice after the other.
        shapes: S sizes.
    """

    pixels: NDArray[np.uint8]
    shapes: tuple[Size, ...]

    def __post_init__(self) -> None:
        wanted = sum(size.height_px * size.width_px * 3 for size in self.shapes)
        if self.pixels.size != wanted:
            raise GenerationError(f"{self.pixels.size} bytes of pixels for slices that hold {wanted}")

    def patch_count(self, patch_px: int) -> int:
        """Return the number of patches of all slices."""
        return sum((size.height_px // patch_px) * (size.width_px // patch_px) for size in self.shapes)
