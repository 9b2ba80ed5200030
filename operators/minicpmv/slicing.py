"""An image becomes an overview and, when it is large, a grid of slices.

Sizes are height, width in that order, in pixels. Resampling is Pillow's bicubic filter on uint8, so a slice is equal to
the released processor's to the bit.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from operators.minicpmv.upsize import wanted_side_px
from schemas.errors import PrepareError
from schemas.image import Grid

DownsampleMode = Literal["16x", "4x"]
SmallImageUpsize = Literal["always", "never", "adaptive"]

MERGED_PATCHES_PER_SIDE: Final[dict[DownsampleMode, int]] = {"16x": 4, "4x": 2}
"""Patches along one side of the square that becomes one visual token."""


class SliceConfig(BaseModel):
    """Limits on slicing; the defaults are those of the released model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_slices: Annotated[int, Field(ge=1, description="Upper bound on rows * cols of the grid; 1 never slices.")] = 9
    slice_side_px: Annotated[int, Field(gt=0, description="Side of the square whose area one slice has.")] = 448
    patch_px: Annotated[int, Field(gt=0, description="Side of one patch of the vision encoder.")] = 14
    downsample_mode: Annotated[
        DownsampleMode, Field(description="Patches a visual token stands for: 16, or 4 for finer reading.")
    ] = "16x"
    query_count: Annotated[
        int | None, Field(gt=0, description="Visual tokens of every slice, where a resampler makes them; null: merged.")
    ] = None
    small_image_upsize: Annotated[
        SmallImageUpsize,
        Field(description="Enlarge what is smaller than one slice; adaptive: only where its text is small and dense."),
    ] = "always"

    @property
    def step_px(self) -> int:
        """Every side of a slice is a multiple of this, so that patches merge without remainder."""
        if self.query_count is not None:
            return self.patch_px
        return self.patch_px * MERGED_PATCHES_PER_SIDE[self.downsample_mode]


class Size(NamedTuple):
    """Height and width in pixels."""

    height_px: int
    width_px: int


@dataclass(frozen=True)
class SlicePlan:
    """Where an image's pixels go: known from its size alone.

    Adaptive enlarging also depends on what an image shows: its slices may turn out smaller than planned.

    Attributes:
        grid: rows and columns of slices; `Grid(0, 0)` when only the overview is encoded.
        overview: size of the overview.
        sliced: size the image has before it is cut into the grid; None when there is no grid.
    """

    grid: Grid
    overview: Size
    sliced: Size | None

    def shapes(self) -> list[Size]:
        """Return the size of each slice: the overview, then the grid row by row."""
        if self.sliced is None:
            return [self.overview]
        cell = Size(self.sliced.height_px // self.grid.rows, self.sliced.width_px // self.grid.cols)
        return [self.overview] + [cell] * (self.grid.rows * self.grid.cols)


@dataclass(frozen=True)
class SlicedImage:
    """The slices of one image.

    Shapes:
        slices: each (height, width, 3) uint8 RGB; the overview first, then the grid row by row. Cells of the grid
            are views of one array, unless they differ in size, as adaptive enlarging makes them.
    """

    slices: list[NDArray[np.uint8]]
    grid: Grid


def nearest_multiple(length: float, step: int) -> int:
    """Return the multiple of `step` nearest to `length`, ties to the even multiple, at least one step."""
    return max(round(length / step) * step, step)


def choose_grid(height_px: int, width_px: int, config: SliceConfig) -> Grid:
    """Pick the grid whose shape is closest to the image's own.

    Returns:
        Rows and columns of slices. `Grid(0, 0)` when the image is small enough, or `max_slices` low enough, that the
        overview alone is encoded.

    Source:
        LLaVA-UHD, image modularization (arXiv 2403.11703).
    """
    count = min(math.ceil(height_px * width_px / config.slice_side_px**2), config.max_slices)
    if count <= 1:
        return Grid(0, 0)
    candidates = [
        Grid(rows=cells // cols, cols=cols)
        for cells in (count - 1, count, count + 1)
        if 1 < cells <= config.max_slices
        for cols in range(1, cells + 1)
        if cells % cols == 0
    ]
    # Logarithms make 2:1 exactly as far from square as 1:2.
    target = math.log(width_px / height_px)
    return min(candidates, key=lambda grid: abs(target - math.log(grid.cols / grid.rows)))


def best_resize(
    height_px: float, width_px: float, config: SliceConfig, *, upscale: bool, side_px: int | None = None
) -> Size:
    """Return the size of one slice that shows an image of this size.

    Args:
        height_px: height of the image or of one cell of it; may be fractional.
        width_px: width of the same.
        config: slice side and alignment.
        upscale: whether an image smaller than one slice is enlarged to it.
        side_px: side of the square whose area the slice gets; None: that of `config`.
    """
    side = side_px or config.slice_side_px
    height: float = height_px
    width: float = width_px
    if upscale or height_px * width_px > side * side:
        ratio = width_px / height_px
        # The width follows from the truncated height; the released processor does so.
        height = int(side / math.sqrt(ratio))
        width = int(height * ratio)
    return Size(nearest_multiple(height, config.step_px), nearest_multiple(width, config.step_px))


def refine(height_px: int, width_px: int, grid: Grid, config: SliceConfig) -> Size:
    """Return the size to which an image is brought before it is cut into `grid`."""
    cell = best_resize(
        nearest_multiple(height_px, grid.rows) / grid.rows,
        nearest_multiple(width_px, grid.cols) / grid.cols,
        config,
        upscale=True,
    )
    return Size(cell.height_px * grid.rows, cell.width_px * grid.cols)


def plan_slices(height_px: int, width_px: int, config: SliceConfig) -> SlicePlan:
    """Return the plan for an image of this size.

    Raises:
        PrepareError: a side is not positive.
    """
    if height_px < 1 or width_px < 1:
        raise PrepareError(f"an image of {height_px} x {width_px} px cannot be sliced", code="too_small")
    grid = choose_grid(height_px, width_px, config)
    sliced = refine(height_px, width_px, grid, config) if grid.rows else None
    upscale = sliced is None and config.small_image_upsize != "never"
    return SlicePlan(grid, best_resize(height_px, width_px, config, upscale=upscale), sliced)


def resize_image(image: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Return `image` at `size` with Pillow's antialiased bicubic filter.

    Shapes:
        image: (height, width, 3) uint8; the result alike, and read-only.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    resized = picture.resize((size.width_px, size.height_px), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def cut_grid(image: NDArray[np.uint8], grid: Grid) -> list[NDArray[np.uint8]]:
    """Return the cells of `image`, row by row, as views; its sides are multiples of the grid's."""
    height_px, width_px = image.shape[0] // grid.rows, image.shape[1] // grid.cols
    return [
        image[row * height_px : (row + 1) * height_px, col * width_px : (col + 1) * width_px]
        for row in range(grid.rows)
        for col in range(grid.cols)
    ]


def slice_image(image: NDArray[np.uint8], config: SliceConfig) -> SlicedImage:
    """Return the overview and the slices of `image`.

    Args:
        image: (height, width, 3) uint8 RGB, any size.
        config: limits on slicing.

    Raises:
        PrepareError: the array is not such an image.

    Source:
        transformers `models/minicpmv4_6/image_processing_pil_minicpmv4_6.py` and, for images smaller than one slice,
        `models/minicpm_ocr/image_processing_minicpm_ocr.py`, without rescaling and normalising, which the model does
        on its own device.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise PrepareError(f"wanted (height, width, 3) uint8, found {image.shape} {image.dtype}")
    plan = plan_slices(image.shape[0], image.shape[1], config)
    adaptive = config.small_image_upsize == "adaptive"
    if plan.sliced is None:
        side_px = wanted_side_px(image, config.slice_side_px) if adaptive else None
        overview = adapted_size(image, side_px, config) if adaptive else plan.overview
        return SlicedImage([resize_image(image, overview)], plan.grid)
    cells = cut_grid(resize_image(image, plan.sliced), plan.grid)
    if adaptive:
        parts = cut_evenly(image, plan.grid)
        cells = [adapt_cell(part, cell, config) for part, cell in zip(parts, cells, strict=True)]
    return SlicedImage([resize_image(image, plan.overview), *cells], plan.grid)


def adapted_size(image: NDArray[np.uint8], side_px: int | None, config: SliceConfig) -> Size:
    """Return the size of one slice that shows `image`, enlarged to the area of `side_px` squared if that is given."""
    return best_resize(image.shape[0], image.shape[1], config, upscale=side_px is not None, side_px=side_px)


def adapt_cell(part: NDArray[np.uint8], cell: NDArray[np.uint8], config: SliceConfig) -> NDArray[np.uint8]:
    """Return `cell`, or the part of the image that it shows at a smaller size, where that is enough.

    Shapes:
        part: (height, width, 3) uint8, before any resize; may be empty.
        cell: the same part as a cell of the enlarged image.
    """
    if not 0 < part.shape[0] * part.shape[1] <= config.slice_side_px**2:
        return cell
    side_px = wanted_side_px(part, config.slice_side_px)
    size = adapted_size(part, side_px, config)
    if side_px == config.slice_side_px or size.height_px * size.width_px >= cell.shape[0] * cell.shape[1]:
        return cell
    return resize_image(part, size)


def cut_evenly(image: NDArray[np.uint8], grid: Grid) -> list[NDArray[np.uint8]]:
    """Return the parts of `image` that the cells of `grid` show, row by row, as views; borders are rounded."""
    height_px, width_px = image.shape[:2]
    rows = [round(height_px * row / grid.rows) for row in range(grid.rows + 1)]
    cols = [round(width_px * col / grid.cols) for col in range(grid.cols + 1)]
    return [image[top:bottom, left:right] for top, bottom in pairwise(rows) for left, right in pairwise(cols)]
