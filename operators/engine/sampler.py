"""Logits become tokens.

Letters: `B` sequences.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from operators.engine.request import SamplingParams


def choose_tokens(
    logits: Tensor,
    params: Sequence[SamplingParams],
    histories: Sequence[Sequence[int]],
    draws: Sequence[np.random.Generator],
) -> list[tuple[int, float]]:
    """Return the next token of each sequence and its log-probability under the model.

    Args:
        logits: (B, vocabulary), any float dtype; not changed.
        params: how each sequence chooses.
        histories: tokens each sequence has generated so far; a penalty looks at these alone, not at the prompt.
        draws: each sequence's own random numbers; a greedy sequence draws none.
    """
    chosen = logits.argmax(dim=-1)
    for row, (param, history, draw) in enumerate(zip(params, histories, draws, strict=True)):
        if param.temperature > 0 or (param.repetition_penalty != 1 and history):
            chosen[row] = choose_one(logits[row], param, history, draw)
    scores = logits.gather(1, chosen[:, None])[:, 0].float() - torch.logsumexp(logits.float(), dim=-1)
    # One tensor, so that one transfer from the device brings both.
    both = torch.stack([chosen.double(), scores.double()], dim=1).tolist()
    return [(int(token), logprob) for token, logprob in both]


def choose_one(logits: Tensor, param: SamplingParams, history: Sequence[int], draw: np.random.Generator) -> int:
    """Return the next token of one sequence.

    Shapes:
        logits: (vocabulary,).
    """
    scores = penalised(logits.float(), history, param.repetition_penalty)
    if param.temperature == 0:
        return int(scores.argmax())
    ordered, tokens = (scores / param.temperature).sort(descending=True)
    if param.top_k:
        ordered, tokens = ordered[: param.top_k], tokens[: param.top_k]
    cumulative = torch.softmax(ordered.double(), dim=-1).cumsum(dim=-1)
    # The token that crosses top_p is kept.
    kept = int((cumulative < param.top_p).sum()) + 1
    ceiling = float(cumulative[min(kept, len(cumulative)) - 1])
    place = int((cumulative < draw.random() * ceiling).sum())
    return int(tokens[min(place, len(tokens) - 1)])


def penalised(scores: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """Return `scores` with the tokens of `history` made less likely.

    Source:
        CTRL (arXiv 1909.05858), with negative scores multiplied instead of divided, as transformers does.
    """
    if penalty == 1 or not history:
        return scores
    seen = torch.tensor(sorted(set(history)), device=scores.device)
    values = scores[seen]
    return scores.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))
