"""Answers that go round in circles, found while they are written. No torch."""

from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class RepetitionLimits(BaseModel):
    """When an answer counts as looping: the same pattern of tokens again and again at its end.

    The defaults leave alone what documents really hold: a dozen columns of `0.00`, a few rows of a form that read
    alike, a sheet of labels. What loops goes on to the bound of the answer, so a few hundred tokens more to be sure
    cost little.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_tokens: Annotated[int, Field(ge=2, description="Tokens that the repetitions cover at least.")] = 384
    min_repeats: Annotated[int, Field(ge=3, description="How often the pattern stands there at least.")] = 8
    max_period: Annotated[int, Field(ge=1, description="Longest pattern that is looked for, in tokens.")] = 192
    exempt_factor: Annotated[
        int, Field(ge=1, description="Patterns that repeat by nature, as empty table cells do, may so many times more.")
    ] = 4
    check_tokens: Annotated[
        int, Field(ge=1, description="Looks once in so many tokens: a loop is found up to so many tokens late.")
    ] = 16

    def wanted_tokens(self, period: int) -> int:
        """Return how many tokens a pattern of `period` tokens covers when it counts as a loop."""
        return max(self.min_tokens, self.min_repeats * period)


class RepetitionWatch:
    """Follows one answer while it grows.

    What stands at the end is looked for right before: the distance to its last occurrence is the period, if the end is
    as long as the period or longer. So one look for the end of each of a few lengths finds a period up to that length,
    and only the periods found are counted out.

    Args:
        limits: when it counts as a loop.
        is_exempt: whether a pattern of tokens may repeat more often than others.
    """

    def __init__(self, limits: RepetitionLimits, is_exempt: Callable[[Sequence[int]], bool] | None = None) -> None:
        self._limits = limits
        self._is_exempt = is_exempt
        # A loop covers an end twice at least: half of `min_tokens` by definition, longer ones by three repetitions.
        self._ends = [limits.min_tokens // 2]
        while self._ends[-1] < limits.max_period:
            self._ends.append(2 * self._ends[-1])
        # The last tokens, a letter each: strings are searched faster than lists.
        self._recent = ""

    def is_looping(self, token_ids: Sequence[int]) -> bool:
        """Return whether the answer loops now.

        Args:
            token_ids: all of the answer so far; to be called after every token of it.
        """
        limits = self._limits
        if len(token_ids) % limits.check_tokens:
            return False
        kept = self._ends[-1] + limits.max_period
        self._recent = (self._recent + "".join(map(chr, token_ids[-limits.check_tokens :])))[-kept:]
        if len(token_ids) < limits.min_tokens:
            return False
        return any(self._is_loop(token_ids, period) for period in self._periods())

    def _periods(self) -> set[int]:
        """Return the distances at which the end of the answer stands before, 1 to `max_period`."""
        found: set[int] = set()
        for length in self._ends:
            last = len(self._recent) - length
            if last > 0:
                place = self._recent.rfind(self._recent[last:], max(0, last - self._limits.max_period), -1)
                found |= {last - place} if place >= 0 else set()
        return found

    def _is_loop(self, token_ids: Sequence[int], period: int) -> bool:
        wanted = self._limits.wanted_tokens(period)
        if not has_period(token_ids, period, wanted):
            return False
        if self._is_exempt is None or not self._is_exempt(token_ids[-period:]):
            return True
        return has_period(token_ids, period, wanted * self._limits.exempt_factor)


def has_period(token_ids: Sequence[int], period: int, count: int) -> bool:
    """Return whether there are `count` tokens at the end, each equal to the one `period` before it among them."""
    if len(token_ids) < count:
        return False
    tail = token_ids[-count:]
    return tail[period:] == tail[:-period]
