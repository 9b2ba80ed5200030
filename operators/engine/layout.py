"""How many slots there are for requests of different lengths. Knows tokens and slots; no torch."""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

WORTHWHILE: Final = 1.25
"""How many times as many slots are worth making them anew. What runs is copied for it, which takes milliseconds, while
fewer slots cost throughput for as long as they last."""


@dataclass(frozen=True)
class Layout:
    """Slots of one length.

    Attributes:
        slot_count: how many.
        most_tokens: longest request for which there is memory for so many; None: no bound is known.
        short_tokens: longest request for which there would be memory for many more; 0 where there is no such.
    """

    slot_count: int
    most_tokens: int | None = None
    short_tokens: int = 0

    def fits(self, token_count: int) -> bool:
        """Return whether a request of this length runs in these slots."""
        return self.most_tokens is None or token_count <= self.most_tokens


class Planner:
    """Says how many slots fit into memory.

    Args:
        slots_that_fit: of a length; None where no bound is known. More tokens never let more fit.
        longest_tokens: of any request.
    """

    def __init__(self, slots_that_fit: Callable[[int], int | None], longest_tokens: int) -> None:
        self.slots_that_fit = slots_that_fit
        self.longest_tokens = longest_tokens

    def layout(self, token_count: int, most_slots: int) -> Layout:
        """Return the slots to have for requests of this length: as many as fit, one where none does."""
        fitting = self.slots_that_fit(token_count)
        if fitting is None:
            return Layout(most_slots)
        slot_count = max(1, min(most_slots, fitting))
        more = math.ceil(slot_count * WORTHWHILE)
        return Layout(
            slot_count,
            max(token_count, self.longest_in(slot_count)),
            self.longest_in(more) if more <= most_slots else 0,
        )

    def longest_in(self, slot_count: int) -> int:
        """Return the longest request of which so many fit; 0 where not even the shortest does."""
        return bisect_right(range(1, self.longest_tokens + 1), -slot_count, key=lambda tokens: -self._count(tokens))

    def _count(self, token_count: int) -> int:
        return self.slots_that_fit(token_count) or 0
