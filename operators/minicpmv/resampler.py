"""The resampler: a fixed number of queries attends to the patches of a slice, or of a pack of frames, of many at once.

Letters: `N` patches of all slices, `V` width of the tower, `D` width of the text model, `P` packs, `Q` queries,
`H` heads, `L` patches of the longest pack of a bucket.

Source:
    MiniCPM-V (arXiv 2408.01800) for the two-dimensional form; MiniCPM-V 4.5 (arXiv 2509.18154) for packs and time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from operators.minicpmv.attention import Bucket, padded_rows, plan_buckets

HEAD_WIDTH: Final = 128
NO_TIME: Final = -1
"""Temporal id of a slice that is no frame of a pack."""

WAVELENGTH: Final = 10000


class Resampler(nn.Module):  # type: ignore[misc]
    """The weights, under their released names.

    Args:
        width: of the text model.
        vision_width: of the tower.
        query_count: visual tokens of a slice or pack.
    """

    def __init__(self, width: int, vision_width: int, query_count: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(query_count, width))
        self.kv_proj = nn.Linear(vision_width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, max(width // HEAD_WIDTH, 1))
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_kv = nn.LayerNorm(width, eps=1e-6)
        self.ln_post = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Parameter(torch.zeros(width, width))

    def forward(self, encoded: Tensor, layout: "PackLayout") -> Tensor:
        """Return the visual tokens of each pack, (P, Q, D), in the order in which the packs were given.

        Shapes:
            encoded: (N, V) of the tower, slice after slice.
        """
        keys, values = self.keys_and_values(encoded, layout)
        queries = self.queries()
        parts = [self._attend(queries, keys, values, bucket) for bucket in layout.buckets]
        attended = torch.cat(parts)[layout.places]
        tokens: Tensor = self.ln_post(self.attn.out_proj(attended)) @ self.proj
        return tokens

    def queries(self) -> Tensor:
        """Return the projected queries, (H, Q, D / H); they depend on no picture."""
        weight, bias = self._part(0)
        return linear(self.ln_q(self.query), weight, bias).unflatten(1, (self.attn.num_heads, -1)).transpose(0, 1)

    def keys_and_values(self, encoded: Tensor, layout: "PackLayout") -> tuple[Tensor, Tensor]:
        """Return what each patch offers, pack after pack, (N, H, D / H) each; keys know where and when it is."""
        if layout.rows is not None:
            encoded = encoded.index_select(0, layout.rows)
        projected = self.ln_kv(self.kv_proj(encoded))
        key_weight, key_bias = self._part(1)
        value_weight, value_bias = self._part(2)
        heads = (self.attn.num_heads, -1)
        values = linear(projected, value_weight, value_bias).unflatten(1, heads)
        keys = linear(layout.add_positions(projected), key_weight, key_bias).unflatten(1, heads)
        return keys, values

    def _part(self, index: int) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the queries (0), keys (1) or values (2)."""
        weight = self.attn.in_proj_weight.chunk(3)[index]
        return weight, self.attn.in_proj_bias.chunk(3)[index]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, bucket: Bucket) -> Tensor:
        """Return what the queries gather from each pack of a bucket, (packs, Q, D)."""
        repeated = queries.expand(bucket.count, *queries.shape)
        attended = scaled_dot_product_attention(
            repeated, padded_rows(keys, bucket), padded_rows(values, bucket), attn_mask=bucket.mask
        )
        return attended.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class PackLayout:
    """Which patches belong together, where they are in their slice, and when it was shown.

    Attributes:
        rows: (N,) int64 row of the tower's output for each patch, pack after pack; None when it is so already.
        buckets: the packs, shortest first.
        places: (P,) int64 place of each given pack among them.
        row_index, col_index: (N,) int64 place of each patch in its slice.
        frame_index: (N,) int64 row of `times` for each patch; None when no slice has a time.
        times: (frames, D) float32 encoding of the time of each slice, zero for those without.
        side: patches along the longest side of any slice.
    """

    rows: Tensor | None
    buckets: tuple[Bucket, ...]
    places: Tensor
    row_index: Tensor
    col_index: Tensor
    frame_index: Tensor | None
    times: Tensor | None
    side: int

    def add_positions(self, projected: Tensor) -> Tensor:
        """Return a copy of (N, D) with the places in the picture, and in time, added.

        Half of the channels tell the column, the other half the row. Tables are cast to the dtype before they are
        added, as the released code does.
        """
        width = projected.shape[1]
        # In steps, so that few tables are kept.
        table = positions_upto(-(-self.side // 64) * 64, width // 2).to(projected.device, projected.dtype)
        placed = projected.clone()
        placed[:, : width // 2] += table[self.col_index]
        placed[:, width // 2 :] += table[self.row_index]
        if self.frame_index is not None and self.times is not None:
            placed += self.times.to(projected.dtype)[self.frame_index]
        return placed


def lay_out(
    grids: Sequence[tuple[int, int]], packs: Sequence[Sequence[tuple[int, int]]], width: int, like: Tensor
) -> PackLayout:
    """Return the layout of packs.

    Args:
        grids: rows and columns of patches of each slice, in the order of the tower's output.
        packs: number of each slice and its temporal id, -1 for none, pack by pack; each slice in one pack.
        width: of the text model.
        like: a tensor of the device and dtype in which the resampler runs.
    """
    device = like.device
    lengths = [rows * cols for rows, cols in grids]
    starts = np.cumsum([0, *lengths])
    totals = [sum(lengths[number] for number, _ in pack) for pack in packs]
    order = sorted(range(len(packs)), key=lambda pack: (totals[pack], pack))
    slices = [entry for pack in order for entry in packs[pack]]
    rows = np.concatenate([np.arange(starts[number], starts[number + 1]) for number, _ in slices])
    sides = [grid_indexes(*grids[number]) for number, _ in slices]
    times = [time for _, time in slices]
    has_times = any(time != NO_TIME for time in times)
    frame_index = np.repeat(np.arange(len(slices)), [lengths[number] for number, _ in slices])
    return PackLayout(
        rows=None if bool((rows == np.arange(len(rows))).all()) else torch.from_numpy(rows).to(device),
        buckets=plan_buckets([totals[pack] for pack in order], device, like.dtype),
        places=torch.from_numpy(np.argsort(order)).to(device),
        row_index=torch.from_numpy(np.concatenate([side[0] for side in sides])).to(device),
        col_index=torch.from_numpy(np.concatenate([side[1] for side in sides])).to(device),
        frame_index=torch.from_numpy(frame_index).to(device) if has_times else None,
        times=torch.from_numpy(encode_times(times, width)).to(device) if has_times else None,
        side=max(max(grid) for grid in grids),
    )


@lru_cache(maxsize=4096)
def grid_indexes(rows: int, cols: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return row and column of each patch of a grid, row by row."""
    places = np.arange(rows * cols)
    return places // cols, places % cols


@lru_cache(maxsize=16)
def positions_upto(count: int, width: int) -> Tensor:
    """Return the encoding of the places 0 to count - 1, (count, width) float32."""
    return torch.from_numpy(sine_cosine(np.arange(count), width))


def encode_times(times: Sequence[int], width: int) -> NDArray[np.float32]:
    """Return the encoding of temporal ids, (times, width) float32, zero for -1.

    Rows are computed as they are needed: the released table for two hours would take 1.2 GB.
    """
    encoded = sine_cosine(np.array(times), width)
    encoded[np.array(times) == NO_TIME] = 0
    return encoded


def sine_cosine(positions: NDArray[np.int64], width: int) -> NDArray[np.float32]:
    """Return sines, then cosines, of positions at `width` / 2 falling rates, (positions, width) float32.

    Computed in float32, as the released tables are.
    """
    rates = np.arange(width // 2, dtype=np.float32) / np.float32(width / 2)
    rates = np.float32(1) / np.float32(WAVELENGTH) ** rates
    angles = positions.astype(np.float32)[:, None] * rates[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
