"""The resampler with keys and values absorbed into matrices that depend on no picture.

A layer norm takes the mean away, so with the rows of `kv_proj` centred (W), `ln_kv(kv_proj v)` is
`s W v * gain + bias`, where `s = 1 / sqrt(v' (W'W / D) v + eps)`. A query then meets `s v`, what the tower saw and its
scale, instead of a key; what it gathers is averaged first and projected afterwards. Neither keys nor values of the text
model's width exist: a fifth of the arithmetic at the released sizes, and less memory.

Letters: `N` patches of all slices, `V` width of the tower, `D` width of the text model, `P` packs, `Q` queries,
`H` heads, `L` patches of the longest pack of a bucket.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from operators.minicpmv.attention import Bucket
from operators.minicpmv.resampler import PackLayout, Resampler, positions_upto


class AbsorbedResampler:
    """Computes what `Resampler` does from the same weights.

    Args:
        plain: the weights, on their device and in their dtype.

    Attributes:
        seeks: (H * Q, V) what each query of each head looks for in `s v`.
        gram: (V, V) the norm of the text model's width, seen from the tower's.
        placed: (H * Q, D) float32 what each looks for in the encodings of place and time.
        values: (H, D / H, V) float32.
        shift: (D,) float32 what is gathered whatever is seen.
    """

    def __init__(self, plain: Resampler) -> None:
        self.plain = plain
        heads = plain.attn.num_heads
        weight = plain.kv_proj.weight.float()
        centred = weight - weight.mean(dim=0)
        gain, bias = plain.ln_kv.weight.float(), plain.ln_kv.bias.float()
        query_weight, key_weight, value_weight = plain.attn.in_proj_weight.float().chunk(3)
        query_bias, _, value_bias = plain.attn.in_proj_bias.float().chunk(3)
        normed = torch.nn.functional.layer_norm(
            plain.query.float(), (weight.shape[0],), plain.ln_q.weight.float(), plain.ln_q.bias.float(), plain.ln_q.eps
        )
        queries = linear(normed, query_weight, query_bias).unflatten(1, (heads, -1)).transpose(0, 1)
        scale = plain.attn.head_dim**-0.5
        self.placed = (queries @ key_weight.unflatten(0, (heads, -1)) * scale).flatten(0, 1)
        dtype = plain.query.dtype
        self.seeks = ((self.placed * gain) @ centred).to(dtype)
        self.gram = (centred.T @ centred / weight.shape[0]).to(dtype)
        self.values = ((value_weight * gain) @ centred).unflatten(0, (heads, -1))
        self.shift = value_weight @ bias + value_bias
        self._sought = lru_cache(maxsize=4)(self._sought_upto)

    def __call__(self, encoded: Tensor, layout: PackLayout) -> Tensor:
        """Return the visual tokens of each pack, (P, Q, D), in the order in which the packs were given."""
        if layout.rows is not None:
            encoded = encoded.index_select(0, layout.rows)
        seen = self.scaled(encoded)
        scores = self.scores(seen, layout)
        parts = [self.gather(scores, seen, bucket) for bucket in layout.buckets]
        attended = torch.cat(parts)[layout.places]
        tokens: Tensor = self.plain.ln_post(self.plain.attn.out_proj(attended)) @ self.plain.proj
        return tokens

    def scaled(self, encoded: Tensor) -> Tensor:
        """Return `s v` of each patch, (N, V)."""
        variance = product(encoded, self.gram).mul_(encoded).sum(dim=1, keepdim=True)
        # Rounded once: a scale that is rounded on its own would bend all scores of a patch the same way.
        return (encoded * torch.rsqrt(variance.add_(self.plain.ln_kv.eps))).to(encoded.dtype)

    def scores(self, seen: Tensor, layout: PackLayout) -> Tensor:
        """Return what each query thinks of each patch, (N, H * Q) float32; places are looked up by a product."""
        side = -(-layout.side // 8) * 8
        count, width = seen.shape
        wide = seen.new_zeros(count, width + 2 * side)
        wide[:, :width] = seen
        wide.scatter_(1, (layout.col_index + width)[:, None], 1.0)
        wide.scatter_(1, (layout.row_index + (width + side))[:, None], 1.0)
        scores = product(wide, self._sought(side))
        if layout.frame_index is not None and layout.times is not None:
            scores += (layout.times @ self.placed.T).index_select(0, layout.frame_index)
        return scores

    def _sought_upto(self, side: int) -> Tensor:
        """Return `seeks` and what is looked for in each column and row below `side`, (V + 2 * side, H * Q)."""
        half = self.placed.shape[1] // 2
        table = positions_upto(side, half).to(self.placed.device)
        columns, rows = self.placed[:, :half] @ table.T, self.placed[:, half:] @ table.T
        return torch.cat([self.seeks, columns.to(self.seeks.dtype), rows.to(self.seeks.dtype)], dim=1).T

    def gather(self, scores: Tensor, seen: Tensor, bucket: Bucket) -> Tensor:
        """Return what the queries gather from each pack of a bucket, (packs, Q, D)."""
        by_pack = (bucket.count, bucket.longest, -1)
        scores, seen = (rows_of(tensor, bucket).view(by_pack) for tensor in (scores, seen))
        if bucket.mask is not None:
            scores = scores + bucket.mask[:, 0, 0, :, None]
        shares = scores.softmax(dim=1).to(seen.dtype)
        gathered = product(shares.transpose(1, 2), seen).unflatten(1, (self.values.shape[0], -1))
        projected = torch.matmul(gathered, self.values.transpose(1, 2))
        return projected.transpose(1, 2).flatten(2).add_(self.shift).to(seen.dtype)


def product(one: Tensor, other: Tensor) -> Tensor:
    """Return a product of matrices in float32, whatever is multiplied: rounded scores would cost accuracy."""
    if one.dtype == torch.float32:
        return one @ other
    if one.is_cuda:
        return (
            torch.mm(one, other, out_dtype=torch.float32)
            if one.dim() == 2
            else torch.bmm(one, other, out_dtype=torch.float32)
        )
    return one.float() @ other.float()


def rows_of(tensor: Tensor, bucket: Bucket) -> Tensor:
    """Return the rows of a bucket, those of shorter packs repeated to the length of the longest."""
    rows = tensor[bucket.start : bucket.stop]
    return rows if bucket.index is None else rows.index_select(0, bucket.index)
