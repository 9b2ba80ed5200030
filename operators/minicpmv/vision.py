"""The vision tower and the mergers of the family: one pass for all slices of a batch, no layer loops over them.

The modules are transformers' own and hold the weights; the pass over them is ours. Where the released code takes one
slice after the other, and one window of four patches after the other, this takes all at once.

Letters: `N` patches of all slices, `H` heads, `D` width of the tower, `T` visual tokens of all slices.

Source:
    SigLIP 2 (arXiv 2502.14786), LLaVA-UHD v4 for the mergers; transformers
    `models/minicpmv4_6/modeling_minicpmv4_6.py`.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from operators.minicpmv.attention import Ragged, attend, plan_attention
from operators.minicpmv.family import PositionBuckets
from operators.minicpmv.patches import PackedPatches, merge_order


def encode_patches(
    tower: Any, packed: PackedPatches, buckets: PositionBuckets, window_merger_after: int | None = None
) -> Tensor:
    """Return what the tower makes of each patch, or of each window where its own merger is used.

    Args:
        tower: a SigLIP tower of transformers, with a `vit_merger` where one is used.
        packed: the patches.
        buckets: how a patch finds its row of the position table.
        window_merger_after: number of the layer after which four patches become one; None: they never do.

    Shapes:
        result: (N, D), or (N / 4, D) after the merger, in the order of `packed`.
    """
    hidden = embed_patches(tower.embeddings, packed, buckets)
    heads = tower.config.num_attention_heads
    width = hidden.shape[1] // heads
    plan = plan_attention(packed.lengths, width, hidden.device, hidden.dtype)
    for index, layer in enumerate(tower.encoder.layers):
        hidden = encoder_layer(layer, hidden, heads, plan)
        if index == window_merger_after:
            hidden = merge_windows(tower.vit_merger, hidden, heads)
            plan = plan_attention([length // 4 for length in packed.lengths], width, hidden.device, hidden.dtype)
    encoded: Tensor = tower.post_layernorm(hidden)
    return encoded


def embed_patches(embeddings: Any, packed: PackedPatches, buckets: PositionBuckets) -> Tensor:
    """Return patches with their positions, (N, D) in the dtype of the weights.

    A convolution whose stride is its kernel is a matrix product; the channels of a patch come last.
    """
    projection = embeddings.patch_embedding
    weight = projection.weight.permute(0, 2, 3, 1).flatten(1)
    hidden = linear(packed.pixel_values.to(weight.dtype), weight, projection.bias)
    table = embeddings.position_embedding.weight
    side = round(table.shape[0] ** 0.5)
    ids = torch.cat([position_ids(*grid, side, packed.merge_levels, buckets) for grid in packed.grids])
    return hidden.add_(table[ids.to(table.device)])


@lru_cache(maxsize=4096)
def position_ids(rows: int, cols: int, side: int, merge_levels: int, buckets: PositionBuckets) -> Tensor:
    """Return the row of the position table of each patch of a grid, (rows * cols,) int64 in merge order."""
    ids = position_buckets(rows, side, buckets)[:, None] * side + position_buckets(cols, side, buckets)[None, :]
    return merge_order(ids[None, :, :, None], merge_levels).flatten()


def position_buckets(count: int, side: int, buckets: PositionBuckets) -> Tensor:
    """Return the place in the table of each of `count` neighbours, (count,) int64 below `side`.

    `exact` is floor(i * side / count). `float32_step` adds up a step of 1 / count in float32, as the released code of
    the resampler models does, which puts some neighbours one place lower.
    """
    if buckets == "exact":
        return torch.arange(count) * side // count
    steps = torch.arange(0, 1 - 1e-6, 1 / torch.tensor(count))
    return torch.bucketize(steps, torch.arange(1 / side, 1.0, 1 / side), right=True)


def encoder_layer(layer: Any, hidden: Tensor, heads: int, plan: Ragged) -> Tensor:
    """Return `hidden` after one layer of the tower; it is changed in place."""
    hidden += attention(layer.self_attn, layer.layer_norm1(hidden), heads, plan)
    hidden += layer.mlp(layer.layer_norm2(hidden))
    return hidden


def attention(weights: Any, hidden: Tensor, heads: int, plan: Ragged) -> Tensor:
    """Return self-attention inside each slice, (N, D)."""
    shape = (hidden.shape[0], heads, -1)
    queries, keys, values = (
        project(hidden).view(shape) for project in (weights.q_proj, weights.k_proj, weights.v_proj)
    )
    attended: Tensor = weights.out_proj(attend(queries, keys, values, plan).flatten(1))
    return attended


def merge_windows(merger: Any, hidden: Tensor, heads: int) -> Tensor:
    """Return one vector for each window of four patches, which follow one another in `hidden`.

    Shapes:
        hidden: (N, D).
        result: (N / 4, D).
    """
    windows = window_attention(merger.self_attn, merger.layer_norm1(hidden), heads).add_(hidden).unflatten(0, (-1, 4))
    inner = merger.act(merger.linear_1(merger.pre_norm(windows.flatten(1))))
    merged: Tensor = merger.linear_2(inner)
    return merged.add_(windows.mean(dim=1))


def window_attention(weights: Any, hidden: Tensor, heads: int) -> Tensor:
    """Return self-attention inside each four neighbours, (N, D)."""
    queries, keys, values = (
        project(hidden).view(-1, 4, heads, hidden.shape[1] // heads).transpose(1, 2)
        for project in (weights.q_proj, weights.k_proj, weights.v_proj)
    )
    attended = scaled_dot_product_attention(queries, keys, values)
    out: Tensor = weights.out_proj(attended.transpose(1, 2).reshape(hidden.shape))
    return out


def merge_patches(merger: Any, encoded: Tensor) -> Tensor:
    """Return visual tokens: four neighbours, which follow one another in `encoded`, become one, once or more often.

    Shapes:
        encoded: (N, D).
        result: (T, width of the text model).
    """
    for mlp in merger.mlp:
        encoded = mlp(encoded.reshape(-1, mlp.linear_1.in_features))
    return encoded
