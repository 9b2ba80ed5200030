"""Attention inside each of many sequences of different lengths that lie one after the other, without a loop over them.

Letters: `N` rows of all sequences, `H` heads, `D` width of a head, `B` sequences of a bucket, `L` the longest of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

CALL_CELLS: Final = 4096
"""Scores of a query and a key that padding may cost a bucket, whatever its size: about what another call would."""

WASTE: Final = 1 / 16
"""The same as a share of the scores that are needed: keeps the calls few where every sequence has its own length."""

VARLEN_CAPABILITY: Final = (8, 0)
VARLEN_WIDTH_STEP: Final = 8
"""What the variable-length kernel needs of the device and of the width of a head."""


@dataclass(frozen=True)
class Bucket:
    """Neighbouring sequences that are attended to in one call.

    Attributes:
        start, stop: their rows.
        count: how many they are.
        longest: rows of the longest.
        index: (B * L,) int64 row of each place, padding repeats a row; None when all are equally long.
        mask: (B, 1, 1, L), 0 on rows and minus infinity on padding; None when all are equally long.
        places: (rows,) int64 place of each row among the B * L; None when all are equally long.
    """

    start: int
    stop: int
    count: int
    longest: int
    index: Tensor | None
    mask: Tensor | None
    places: Tensor | None


@dataclass(frozen=True)
class Ragged:
    """How the sequences of one batch are attended to.

    Attributes:
        buckets: all sequences, in order.
        cumulative: (sequences + 1,) int32 first row of each; None where the variable-length kernel does not run.
        longest: rows of the longest.
    """

    buckets: tuple[Bucket, ...]
    cumulative: Tensor | None
    longest: int


def plan_attention(lengths: Sequence[int], head_width: int, device: torch.device, dtype: torch.dtype) -> Ragged:
    """Return the plan for sequences of these lengths; sorted ones need the fewest calls."""
    longest = max(lengths)
    if runs_varlen(head_width, device, dtype):
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return Ragged((), starts.to(device, non_blocking=True), longest)
    return Ragged(plan_buckets(lengths, device, dtype), None, longest)


def runs_varlen(head_width: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether PyTorch's variable-length kernel takes such tensors."""
    return (
        varlen_attn is not None
        and device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_width % VARLEN_WIDTH_STEP == 0
        and torch.cuda.get_device_capability(device) >= VARLEN_CAPABILITY
    )


def plan_buckets(lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> tuple[Bucket, ...]:
    """Return the buckets of sequences of these lengths.

    On a CPU only equals share one: a call more costs less there than copies of what is attended to (4 to 5 % of a tower
    over crops of 34 lengths).
    """
    groups = [list(same) for _, same in groupby(lengths)] if device.type == "cpu" else group_lengths(lengths)
    buckets: list[Bucket] = []
    for group in groups:
        start = buckets[-1].stop if buckets else 0
        buckets.append(make_bucket(start, group, device, dtype))
    return tuple(buckets)


def group_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Return the lengths of each bucket: neighbours that padding to one length makes little more work of."""
    groups: list[list[int]] = []
    needed = longest = 0
    for length in lengths:
        more, reach = needed + length**2, max(longest, length)
        if groups and (len(groups[-1]) + 1) * reach**2 - more <= max(CALL_CELLS, WASTE * more):
            groups[-1].append(length)
            needed, longest = more, reach
        else:
            groups.append([length])
            needed, longest = length**2, length
    return groups


def make_bucket(start: int, lengths: list[int], device: torch.device, dtype: torch.dtype) -> Bucket:
    """Return the bucket of neighbouring sequences whose first row is `start`."""
    stop, longest = start + sum(lengths), max(lengths)
    if min(lengths) == longest:
        return Bucket(start, stop, len(lengths), longest, None, None, None)
    own = torch.tensor(lengths)[:, None]
    place = torch.arange(longest)[None, :]
    mask = place < own
    first = own.cumsum(0) - own
    index = torch.where(mask, first + place, first)
    places = mask.flatten().nonzero()[:, 0]
    # Added to the scores: a mask of truths would be turned into this in each layer.
    added = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
    return Bucket(
        start,
        stop,
        len(lengths),
        longest,
        index.flatten().to(device),
        added[:, None, None, :].to(device),
        places.to(device),
    )


def attend(queries: Tensor, keys: Tensor, values: Tensor, plan: Ragged) -> Tensor:
    """Return full attention of each sequence to itself.

    Shapes:
        queries, keys, values, result: (N, H, D).
    """
    if plan.cumulative is not None:
        starts = plan.cumulative
        attended: Tensor = varlen_attn(queries, keys, values, starts, starts, plan.longest, plan.longest)
        return attended
    parts = [attend_bucket(queries, keys, values, bucket) for bucket in plan.buckets]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_bucket(queries: Tensor, keys: Tensor, values: Tensor, bucket: Bucket) -> Tensor:
    """Return the attention of the sequences of one bucket, (rows, H, D)."""
    query, key, value = (padded_rows(tensor, bucket) for tensor in (queries, keys, values))
    attended = scaled_dot_product_attention(query, key, value, attn_mask=bucket.mask)
    return unpadded_rows(attended.transpose(1, 2), bucket)


def padded_rows(tensor: Tensor, bucket: Bucket) -> Tensor:
    """Return the rows of a bucket by sequence.

    Shapes:
        tensor: (N, H, D).
        result: (B, H, L, D), a view where no padding is needed.
    """
    rows = tensor[bucket.start : bucket.stop]
    if bucket.index is not None:
        rows = rows.index_select(0, bucket.index)
    return rows.view(bucket.count, bucket.longest, *tensor.shape[1:]).transpose(1, 2)


def unpadded_rows(attended: Tensor, bucket: Bucket) -> Tensor:
    """Return (B, L, H, D) as (rows, H, D), without the padding."""
    flat = attended.reshape(bucket.count * bucket.longest, *attended.shape[2:])
    return flat if bucket.places is None else flat.index_select(0, bucket.places)
