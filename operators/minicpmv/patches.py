"""Slices become packed patches, on the device that encodes them.

Letters: `S` slices, `N` patches of all slices.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.minicpmv.visual import Visual
from schemas.errors import ContractError


@dataclass(frozen=True)
class PackedPatches:
    """Patches of several slices, one after the other.

    Shapes:
        pixel_values: (1, 3, side, side * N) float32 in [-1, 1]; columns side * j to side * (j + 1) are patch j.
        patch_grids: (S, 2) int32 on the CPU, rows then columns of each slice.
    """

    pixel_values: Tensor
    patch_grids: Tensor

    def __post_init__(self) -> None:
        columns = int(self.patch_grids.prod(dim=1).sum()) * self.pixel_values.shape[2]
        if self.pixel_values.shape[3] != columns:
            raise ContractError(f"{self.pixel_values.shape[3]} columns of patches for grids that hold {columns}")


def pack_patches(visuals: Sequence[Visual], patch_px: int, device: torch.device) -> PackedPatches:
    """Return the patches of all slices of `visuals`, in order, normalised on `device`.

    Source:
        transformers `models/minicpmv4_6/image_processing_pil_minicpmv4_6.py`; the values are equal to the bit.
    """
    pieces: list[Tensor] = []
    grids: list[tuple[int, int]] = []
    for visual in visuals:
        # Bytes and not floats cross to the device: a quarter of the traffic.
        pixels = torch.from_numpy(writable(visual.pixels)).to(device)
        start = 0
        for size, run in itertools.groupby(visual.shapes):
            count = len(list(run))
            stop = start + count * size.height_px * size.width_px * 3
            pieces.append(patchify(pixels[start:stop].view(count, *size, 3), patch_px))
            grids += [(size.height_px // patch_px, size.width_px // patch_px)] * count
            start = stop
    packed = torch.cat(pieces, dim=-1).unsqueeze(0)
    return PackedPatches(normalise(packed), torch.tensor(grids, dtype=torch.int32))


def writable(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return `pixels`, copied when it is read-only: torch takes no read-only memory without a warning."""
    return pixels if pixels.flags.writeable else pixels.copy()


def patchify(slices: Tensor, patch_px: int) -> Tensor:
    """Return slices of one size as patches side by side.

    Shapes:
        slices: (S, height, width, 3) uint8.
        result: (3, side, side * N) uint8.
    """
    count, height, width, channels = slices.shape
    split = slices.reshape(count, height // patch_px, patch_px, width // patch_px, patch_px, channels)
    return split.permute(5, 2, 0, 1, 3, 4).reshape(channels, patch_px, -1)


def normalise(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [-1, 1]."""
    return pixels.to(torch.float32).div_(255).sub_(0.5).div_(0.5)
