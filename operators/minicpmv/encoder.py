"""Pictures of many records become visual tokens in one pass, whatever their sizes, and each record gets its own back.

Letters: `T` visual tokens of a record, `D` width of the text model.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.minicpmv.absorbed import AbsorbedResampler
from operators.minicpmv.family import Family
from operators.minicpmv.network import Network
from operators.minicpmv.patches import PackedPatches, pack_patches, slice_views
from operators.minicpmv.resampler import NO_TIME, lay_out
from operators.minicpmv.vision import encode_patches, merge_patches
from operators.minicpmv.visual import Visual

PATCHES_PER_CALL: Final = {"cuda": 65_536, "cpu": 16_384}
"""Most patches that go through the tower at once, by type of device. Bounds its activations: about 0.6 GB in bf16 for
the widest tensor of a model of full size on a GPU."""

CPU_TENSOR_BYTES: Final = 8 * 2**20
"""Largest tensor of the tower on a CPU: from about four times that, each allocation pays for fresh pages (measured)."""


@dataclass(frozen=True)
class Group:
    """Slices that become tokens together: one slice, or a pack of frames.

    Attributes:
        record: number of the record they belong to.
        slices: each (height, width, 3) uint8.
        times: temporal id of each, -1 for none.
    """

    record: int
    slices: tuple[NDArray[np.uint8], ...]
    times: tuple[int, ...]

    def patch_count(self, patch_px: int) -> int:
        """Return the patches of all slices."""
        return sum(math.prod(part.shape[:2]) for part in self.slices) // patch_px**2


@dataclass(frozen=True)
class Chunk:
    """What goes through at once, on the device.

    Attributes:
        groups: what the tokens are made for.
        packed: the slices of all groups, in their order; several where one group is more than the tower takes at once.
    """

    groups: tuple[Group, ...]
    packed: tuple[PackedPatches, ...]


class VisionEncoder:
    """Tower and connector of one network.

    Args:
        network: the weights.
        family: which member they are.
        patch_px: side of a patch.
        device: where the tower is.
        patches_per_call: bound on what goes through at once; None: by the device and the width of the tower.
    """

    def __init__(
        self,
        network: Network,
        family: Family,
        patch_px: int,
        device: torch.device,
        patches_per_call: int | None = None,
    ) -> None:
        self.network = network
        self.family = family
        self.patch_px = patch_px
        self.device = device
        self.resample = resampler_of(network, family, device)
        self.patches_per_call = patches_per_call or most_patches(network.tower.config.intermediate_size, device.type)

    def encode(self, visuals: Sequence[Visual], merge_levels: Sequence[int]) -> list[Tensor]:
        """Return the visual tokens of each record, (T, D).

        Args:
            visuals: the pictures of each record.
            merge_levels: how often four neighbours become one, for each record: 2 or 1; 0 where a resampler follows.
        """
        tokens: list[list[Tensor]] = [[] for _ in visuals]
        for levels in sorted(set(merge_levels)):
            chosen = [number for number, own in enumerate(merge_levels) if own == levels]
            groups = [group for number in chosen for group in groups_of(number, visuals[number])]
            for chunk in chunks(groups, self.patch_px, self.patches_per_call):
                for group, made in zip(chunk, self.encode_groups(chunk, levels), strict=True):
                    tokens[group.record].append(made)
        return [torch.cat(parts) for parts in tokens]

    def encode_groups(self, groups: Sequence[Group], merge_levels: int) -> list[Tensor]:
        """Return the visual tokens of each group, (T, D); all go through together."""
        return self.encode_chunk(self.pack(groups, merge_levels))

    def pack(self, groups: Sequence[Group], merge_levels: int) -> Chunk:
        """Return the patches of these groups, on the device."""
        slices = [part for group in groups for part in group.slices]
        runs = split_slices(slices, self.patch_px, self.patches_per_call)
        packed = (pack_patches(run, self.patch_px, merge_levels, self.device) for run in runs)
        return Chunk(tuple(groups), tuple(packed))

    def encode_chunk(self, chunk: Chunk) -> list[Tensor]:
        """Return the visual tokens of each group, (T, D)."""
        levels = chunk.packed[0].merge_levels
        after = self._window_merger_after(levels)
        encoded = [
            encode_patches(self.network.tower, packed, self.family.position_buckets, after) for packed in chunk.packed
        ]
        grids, where = joined(chunk.packed)
        whole = encoded[0] if len(encoded) == 1 else torch.cat(encoded)
        if self.family.connector == "merger":
            merged = merge_patches(self.network.connector, whole)
            found = merged.split([rows * cols // 4**levels for rows, cols in grids])
            return [found[place] for place in where]
        numbers = iter(where)
        packs = [[(next(numbers), time) for time in group.times] for group in chunk.groups]
        layout = lay_out(grids, packs, self.network.connector.proj.shape[0], whole)
        return list(self.resample(whole, layout))

    def _window_merger_after(self, merge_levels: int) -> int | None:
        """Return the layer after which windows merge: only where patches merge once more than the mergers do."""
        if self.family.connector == "resampler" or merge_levels <= len(self.network.connector.mlp):
            return None
        return int(self.network.tower.config.insert_layer_id)


def resampler_of(network: Network, family: Family, device: torch.device) -> Any:
    """Return what resamples: on a CPU the absorbed form, which is faster and as exact; elsewhere the released one.

    Where `kv_proj` is quantised there is nothing to absorb.
    """
    if family.connector == "merger" or device.type != "cpu":
        return network.connector
    if not network.connector.kv_proj.weight.is_floating_point():
        return network.connector
    with torch.no_grad():
        return AbsorbedResampler(network.connector)


def most_patches(inner_width: int, device_type: str) -> int:
    """Return how many patches go at once through a tower whose widest layer has this width."""
    if device_type != "cpu":
        return PATCHES_PER_CALL["cuda"]
    return min(PATCHES_PER_CALL["cpu"], CPU_TENSOR_BYTES // (4 * inner_width))


def groups_of(record: int, visual: Visual) -> Iterator[Group]:
    """Yield the groups of a record in the order of its tokens."""
    views = iter(slice_views(visual.pixels, visual.shapes))
    packs = visual.packs if visual.packs is not None else ((NO_TIME,),) * len(visual.shapes)
    for times in packs:
        yield Group(record, tuple(next(views) for _ in times), tuple(times))


def chunks(groups: Sequence[Group], patch_px: int, patches: int) -> Iterator[list[Group]]:
    """Yield the groups in order, in runs of at most `patches`; a larger group goes alone."""
    chunk: list[Group] = []
    room = patches
    for group in groups:
        count = group.patch_count(patch_px)
        if chunk and count > room:
            yield chunk
            chunk, room = [], patches
        chunk.append(group)
        room -= count
    if chunk:
        yield chunk


def split_slices(
    slices: Sequence[NDArray[np.uint8]], patch_px: int, patches: int
) -> Iterator[Sequence[NDArray[np.uint8]]]:
    """Yield the slices in order, in runs of at most `patches`; a larger slice goes alone."""
    start, room = 0, patches
    for place, part in enumerate(slices):
        count = math.prod(part.shape[:2]) // patch_px**2
        if count > room and place > start:
            yield slices[start:place]
            start, room = place, patches
        room -= count
    yield slices[start:]


def joined(packed: Sequence[PackedPatches]) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the grids of all slices in the order of their patches, and where among them each given slice stands."""
    grids: list[tuple[int, int]] = []
    where: list[int] = []
    for part in packed:
        where += [len(grids) + place for place in inverse(part.places)]
        grids += part.grids
    return grids, where


def inverse(places: Sequence[int]) -> list[int]:
    """Return where each number stands in a permutation."""
    found = [0] * len(places)
    for index, place in enumerate(places):
        found[place] = index
    return found
