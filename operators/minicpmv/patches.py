"""Slices of many records become one batch of patches, on the device that encodes them.

Letters: `S` slices, `N` patches of all slices.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.minicpmv.slicing import Size
from schemas.errors import ContractError


@dataclass(frozen=True)
class PackedPatches:
    """Patches of several slices, one slice after the other, the slices sorted by size.

    Attributes:
        pixel_values: the patches. Those of one slice stand in merge order: the four that become one come together, at
            every level, so that merging is a reshape.
        grids: rows and columns of patches of each slice.
        places: number of each slice in the order in which it was given.
        merge_levels: how often four neighbours become one, from patch to visual token.

    Shapes:
        pixel_values: (N, side * side * 3) float32 in [-1, 1], ordered row, column, channel.
    """

    pixel_values: Tensor
    grids: tuple[tuple[int, int], ...]
    places: tuple[int, ...]
    merge_levels: int

    def __post_init__(self) -> None:
        wanted = sum(rows * cols for rows, cols in self.grids)
        if self.pixel_values.shape[0] != wanted:
            raise ContractError(f"{self.pixel_values.shape[0]} patches for grids that hold {wanted}")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the number of patches of each slice."""
        return tuple(rows * cols for rows, cols in self.grids)


def pack_patches(
    slices: Sequence[NDArray[np.uint8]], patch_px: int, merge_levels: int, device: torch.device
) -> PackedPatches:
    """Return the patches of all slices, normalised on `device`.

    Shapes:
        slices: each (height, width, 3) uint8.

    Source:
        transformers `models/minicpmv4_6/image_processing_pil_minicpmv4_6.py`; the values are equal to the bit.
    """
    places = sorted(range(len(slices)), key=lambda place: (slices[place].size, slices[place].shape, place))
    pieces: list[Tensor] = []
    grids: list[tuple[int, int]] = []
    for (height, width, _), run in itertools.groupby(places, key=lambda place: slices[place].shape):
        same = [slices[place] for place in run]
        # Bytes and not floats cross to the device: a quarter of the traffic.
        pixels = torch.from_numpy(np.stack(same)).to(device)
        pieces.append(patchify(pixels, patch_px, merge_levels))
        grids += [(height // patch_px, width // patch_px)] * len(same)
    return PackedPatches(normalise(torch.cat(pieces)), tuple(grids), tuple(places), merge_levels)


def slice_views(pixels: NDArray[np.uint8], shapes: Sequence[Size]) -> list[NDArray[np.uint8]]:
    """Return each slice of a record, (height, width, 3) uint8, without copying it."""
    stops = list(itertools.accumulate(size.height_px * size.width_px * 3 for size in shapes))
    starts = [0, *stops[:-1]]
    return [pixels[start:stop].reshape(*size, 3) for start, stop, size in zip(starts, stops, shapes, strict=True)]


def patchify(slices: Tensor, patch_px: int, merge_levels: int) -> Tensor:
    """Return slices of one size as patches in merge order.

    Shapes:
        slices: (S, height, width, 3) uint8.
        result: (N, side * side * 3) uint8.
    """
    count, height, width, channels = slices.shape
    rows, cols = height // patch_px, width // patch_px
    # A row of a patch with its channels is copied as a whole: the channels stay last.
    split = slices.view(count, rows, patch_px, cols, patch_px * channels).permute(0, 1, 3, 2, 4)
    return merge_order(split, merge_levels).reshape(count * rows * cols, -1)


def merge_order(grid: Tensor, merge_levels: int) -> Tensor:
    """Return what stands in a grid as a sequence in merge order.

    The four of each 2 x 2 square follow one another, at every level of merging; inside a square and between squares the
    order is row by row.

    Shapes:
        grid: (S, rows, cols, ...); both sides are multiples of 2 ** merge_levels.
        result: (S, rows * cols, ...), copied once.
    """
    count, rows, cols, *rest = grid.shape
    block = 2**merge_levels
    halves = [2] * merge_levels
    split = grid.unflatten(2, (cols // block, *halves)).unflatten(1, (rows // block, *halves))
    row_axes = range(1, 2 + merge_levels)
    col_axes = range(2 + merge_levels, 3 + 2 * merge_levels)
    pairs = [axis for pair in zip(row_axes, col_axes, strict=True) for axis in pair]
    kept = range(3 + 2 * merge_levels, split.dim())
    return split.permute(0, *pairs, *kept).reshape(count, rows * cols, *rest)


def normalise(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [-1, 1]."""
    return pixels.to(torch.float32).div_(255).sub_(0.5).div_(0.5)
