"""Answers that go round in circles, found while they are written. No torch."""

from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field


class RepetitionLimits(BaseModel):
    """When an answer counts as looping: the same pattern of tokens again and again at its end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_tokens: Annotated[int, Field(ge=1, description="Tokens that the repetitions cover at least.")] = 96
    min_repeats: Annotated[int, Field(ge=2, description="How often the pattern stands there at least.")] = 6
    max_period: Annotated[int, Field(ge=1, description="Longest pattern that is looked for, in tokens.")] = 192
    exempt_factor: Annotated[
        int, Field(ge=1, description="Patterns that may well repeat, such as empty table cells, may so many times more.")
    ] = 8


class RepetitionWatch:
    """Follows one answer token by token.

    For each period it counts how many tokens at the end equal the one a period before: a pattern of p tokens that
    stands there n times makes (n - 1) * p such tokens.

    Args:
        limits: when it counts as a loop.
        is_exempt: whether a pattern of tokens may repeat more often than others.
    """

    def __init__(self, limits: RepetitionLimits, is_exempt: Callable[[Sequence[int]], bool] | None = None) -> None:
        self._limits = limits
        self._is_exempt = is_exempt
        self._periods = np.arange(1, limits.max_period + 1)
        self._runs = np.zeros(limits.max_period, np.int64)
        # Long enough that it is seldom moved; new tokens stand to the left, so that a slice is newest first.
        self._recent = np.full(limits.max_period * 8, -1, np.int64)
        self._first = len(self._recent)
        self._count = 0

    def take(self, token: int) -> bool:
        """Add a token; return whether the answer is looping now."""
        limits = self._limits
        past = self._recent[self._first : self._first + limits.max_period]
        runs = self._runs[: len(past)]
        runs += 1
        runs[past != token] = 0
        self._push(token)
        if self._count < limits.min_tokens:
            return False
        covered = self._runs + self._periods
        looping = (covered >= limits.min_tokens) & (covered >= limits.min_repeats * self._periods)
        if not looping.any():
            return False
        period = int(looping.argmax()) + 1
        if self._is_exempt is None or not self._is_exempt(self.pattern(period)):
            return True
        return bool(covered[period - 1] >= limits.exempt_factor * max(limits.min_tokens, limits.min_repeats * period))

    def pattern(self, period: int) -> list[int]:
        """Return the last `period` tokens in the order in which they were written."""
        tokens: list[int] = self._recent[self._first : self._first + period][::-1].tolist()
        return tokens

    def _push(self, token: int) -> None:
        if self._first == 0:
            kept = self._recent[: self._limits.max_period].copy()
            self._first = len(self._recent) - len(kept)
            self._recent[self._first :] = kept
        self._first -= 1
        self._recent[self._first] = token
        self._count += 1
