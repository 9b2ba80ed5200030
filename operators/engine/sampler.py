"""Logits become tokens, for all sequences at once, on the device.

Letters: `B` sequences, `R` of them that do not just take the likeliest token, `V` tokens of the vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from operators.engine.request import SamplingParams
from operators.engine.structured import AllowedTokens

ELEMENTS_AT_ONCE: Final = {"cuda": 1 << 26, "cpu": 1 << 20}
"""Scores that are held in float32 at a time, by type of device: 256 MiB on a GPU. On a CPU the fewer that stay in its
caches went up to three times as fast (64 sequences, 150,000 tokens)."""

BLOCK: Final = 1024
"""Neighbouring tokens whose weights are summed first when a place among them is drawn."""

LIKELY: Final = 256
"""Tokens that are put in order to find where `top_p` is reached; all are where these do not reach it."""


def choose_tokens(
    logits: Tensor,
    params: Sequence[SamplingParams],
    histories: Sequence[Sequence[int]],
    draws: Sequence[np.random.Generator],
    allowed: AllowedTokens | None = None,
) -> list[tuple[int, float]]:
    """Return the next token of each sequence and its log-probability under the model.

    A sequence's token depends on nothing but its own row, options, history, random numbers and grammar. The
    log-probability is that of the model as it is: what a grammar rules out, a temperature or a penalty do not count.

    Args:
        logits: (B, V), any float dtype; not changed.
        params: how each sequence chooses.
        histories: tokens each sequence has generated so far; a penalty looks at these alone, not at the prompt.
        draws: each sequence's own random numbers, one for each token; a greedy sequence draws none.
        allowed: what the grammars of some sequences allow; None: there are no grammars.
    """
    if not len(logits):
        return []
    bound = {} if allowed is None else dict(zip(allowed.rows, on_device(allowed, logits.device), strict=True))
    at_once = ELEMENTS_AT_ONCE.get(logits.device.type, ELEMENTS_AT_ONCE["cpu"])
    step = max(1, at_once // logits.shape[1])
    parts = [slice(start, start + step) for start in range(0, len(logits), step)]
    pairs = [
        choose_part(
            logits[part],
            params[part],
            histories[part],
            draws[part],
            [bound.get(row) for row in range(len(logits))[part]],
        )
        for part in parts
    ]
    # One tensor, so that one transfer from the device brings all.
    tokens, logprobs = torch.cat(pairs, dim=1).tolist()
    return list(zip(map(int, tokens), logprobs, strict=True))


def choose_part(
    logits: Tensor,
    params: Sequence[SamplingParams],
    histories: Sequence[Sequence[int]],
    draws: Sequence[np.random.Generator],
    allowed: Sequence[Tensor | None],
) -> Tensor:
    """Return tokens and log-probabilities as (2, B) float64.

    Args:
        logits: see `choose_tokens`, as are the next three.
        params: how each sequence chooses.
        histories: tokens of each so far.
        draws: random numbers of each.
        allowed: bits of the tokens each may choose from, (bytes,) uint8; None: from all.
    """
    chosen = logits.argmax(dim=-1)
    rows = [
        row
        for row, (param, history) in enumerate(zip(params, histories, strict=True))
        if param.temperature > 0 or (param.repetition_penalty != 1 and history) or allowed[row] is not None
    ]
    if rows:
        own = [params[row] for row in rows]
        scores = logits[rows].float()
        forbid(scores, [allowed[row] for row in rows])
        penalise(scores, [param.repetition_penalty for param in own], [histories[row] for row in rows])
        chosen[rows] = pick(scores, own, [draws[row] for row in rows])
    exact = logits.float()
    logprobs = exact.gather(1, chosen[:, None])[:, 0] - torch.logsumexp(exact, dim=-1)
    return torch.stack([chosen.double(), logprobs.double()])


def on_device(allowed: AllowedTokens, device: torch.device) -> Tensor:
    """Return the bits of `allowed` where the scores are, in one transfer."""
    bits = torch.from_numpy(allowed.bits)
    return bits.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else bits


def forbid(scores: Tensor, allowed: Sequence[Tensor | None]) -> None:
    """Give the tokens that each row may not choose the score of minus infinity, in place.

    Shapes:
        scores: (R, V) float32.
        allowed: (bytes,) uint8 for each row, see `AllowedTokens`; None: the row may choose any.
    """
    bound = [row for row, bits in enumerate(allowed) if bits is not None]
    if not bound:
        return
    bits = torch.stack([own for own in allowed if own is not None])
    # Looked up by the byte: nine times as fast on a CPU as bit operations and a masked fill.
    table = scores_of_bits(scores.device)
    added = table.index_select(0, bits.flatten().int()).view(len(bound), -1)[:, : scores.shape[1]]
    known = added.shape[1]
    if len(bound) == len(scores):
        scores[:, :known] += added
    else:
        scores[bound, :known] += added
    # Names that no tokenizer gives out: weights are padded to a round number of rows.
    scores[bound, known:] = -torch.inf


@functools.cache
def scores_of_bits(device: torch.device) -> Tensor:
    """Return what eight tokens get for each byte of bits, (256, 8) float32: 0 where a bit is set, else -inf."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(np.where(bits, np.float32(0), np.float32(-np.inf))).to(device)


def penalise(scores: Tensor, penalties: Sequence[float], histories: Sequence[Sequence[int]]) -> None:
    """Make the tokens of each row's history less likely, in place.

    Shapes:
        scores: (R, V) float32.

    Source:
        CTRL (arXiv 1909.05858), with negative scores multiplied instead of divided, as transformers does.
    """
    seen = [list(set(past)) if penalty != 1 else [] for penalty, past in zip(penalties, histories, strict=True)]
    counts = [len(tokens) for tokens in seen]
    if not any(counts):
        return
    # Rows, tokens and penalties in one transfer.
    table = np.stack(
        [
            np.repeat(np.arange(len(counts)), counts),
            np.concatenate([np.asarray(tokens, np.int64) for tokens in seen]),
            np.repeat(np.asarray(penalties), counts),
        ]
    )
    packed = torch.from_numpy(table).to(scores.device)
    rows, tokens = packed[0].long(), packed[1].long()
    values = scores[rows, tokens]
    factors = packed[2].to(values.dtype)
    scores[rows, tokens] = torch.where(values > 0, values / factors, values * factors)


def pick(scores: Tensor, params: Sequence[SamplingParams], draws: Sequence[np.random.Generator]) -> Tensor:
    """Return the token of each row, (R,) int64: drawn, or the likeliest where the temperature is 0.

    Tokens whose scores are equal are kept or dropped together, and places are drawn in the order of the vocabulary: no
    order among equals can make a difference.

    Shapes:
        scores: (R, V) float32, penalised; changed.
    """
    greedy = [row for row, param in enumerate(params) if param.temperature == 0]
    likeliest = scores[greedy].argmax(dim=-1) if greedy else None
    if likeliest is not None and len(greedy) == len(params):
        return likeliest
    pairs = [
        (param.temperature, draw.random()) if param.temperature else (1.0, 0.0)
        for param, draw in zip(params, draws, strict=True)
    ]
    temperatures, places = torch.tensor(pairs, dtype=torch.float64, device=scores.device).T
    weights = scores.sub_(scores.amax(dim=-1, keepdim=True)).div_(temperatures[:, None].float()).exp_()
    keep_largest(weights, params)
    drawn = draw_places(weights, places)
    if likeliest is not None:
        drawn[greedy] = likeliest
    return drawn


def keep_largest(weights: Tensor, params: Sequence[SamplingParams]) -> None:
    """Set to zero, in place, what `top_k` and `top_p` leave out of each row.

    Of the `top_k` largest weights those are kept that together reach `top_p` of their sum, the one that crosses it
    included, and what equals the smallest of these.

    Shapes:
        weights: (R, V) float32.
    """
    width = weights.shape[1]
    counts = [param.top_k if 0 < param.top_k < width else 0 for param in params]
    rows = [row for row, param in enumerate(params) if counts[row] or param.top_p < 1]
    if not rows:
        return
    own = weights if len(rows) == len(weights) else weights[rows]
    ordered = own.topk(min(width, max(counts[row] or LIKELY for row in rows))).values
    options = torch.tensor(
        [(counts[row] or width, params[row].top_p) for row in rows], dtype=torch.float64, device=weights.device
    )
    found, is_found = smallest_kept(ordered, own, options)
    late = [] if all(counts[row] for row in rows) else (~is_found).nonzero()[:, 0].tolist()
    if late:
        found[late] = smallest_kept(own[late].sort(descending=True).values, own[late], options[late])[0]
    floors = weights.new_zeros(len(weights), 1)
    floors[rows] = found
    weights.mul_(weights >= floors)


def smallest_kept(ordered: Tensor, weights: Tensor, options: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest weight that is kept of each row, (R, 1), and whether the largest ones sufficed to find it.

    Shapes:
        ordered: (R, count) float32, the largest of `weights`, in order.
        weights: (R, V) float32.
        options: (R, 2) float64: how many to keep, V for all, and the share of their sum to keep.
    """
    counts, shares = options[:, :1], options[:, 1:]
    sums = ordered.double().cumsum(dim=-1)
    last = (counts.long() - 1).clamp_(max=ordered.shape[1] - 1)
    all_count = weights.shape[1]
    totals = torch.where(counts < all_count, sums.gather(1, last), weights.sum(dim=-1, keepdim=True).double())
    wanted = shares * totals
    place = torch.minimum((sums < wanted).sum(dim=-1, keepdim=True), last)
    is_found = (counts < all_count) | (sums[:, -1:] >= wanted) | (ordered.shape[1] == all_count)
    return ordered.gather(1, place), is_found[:, 0]


def draw_places(weights: Tensor, places: Tensor) -> Tensor:
    """Return the token of each row at which the running sum of weights passes a share of the whole, (R,) int64.

    Shapes:
        weights: (R, V) float32, not all zero.
        places: (R,) float64 in [0, 1).
    """
    row_count, width = weights.shape
    whole = width // BLOCK * BLOCK
    blocks = weights[:, :whole].reshape(row_count, -1, BLOCK).sum(dim=-1)
    rest = weights[:, whole:].sum(dim=-1, keepdim=True)
    sums = torch.cat([blocks, rest], dim=1).double().cumsum(dim=-1)
    targets = places[:, None] * sums[:, -1:]
    block = passing(sums, targets)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    own = weights.gather(1, inside.clamp(max=width - 1)).double().masked_fill_(inside >= width, 0)
    return (block * BLOCK + passing(own.cumsum(dim=-1), targets - before))[:, 0]


def passing(sums: Tensor, targets: Tensor) -> Tensor:
    """Return where each row of running sums first passes its target, (R, 1); where it ends to grow, if it never does.

    Shapes:
        sums: (R, count), growing.
        targets: (R, 1).
    """
    # Sums of a block and of its tokens are rounded apart: a target may lie behind the last token by a hair.
    return torch.minimum((sums <= targets).sum(dim=-1, keepdim=True), (sums < sums[:, -1:]).sum(dim=-1, keepdim=True))
