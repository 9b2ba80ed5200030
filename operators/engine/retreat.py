"""How many slots are in use after memory ran out, and when more are tried again."""

from dataclasses import dataclass
from typing import Final

CALM_PER_SLOT: Final = 4
"""Answers for each slot in use that must end well before more slots are tried. What a failed try costs, the answers
under way, stays a small part of that."""


@dataclass
class Retreat:
    """Counts of slots.

    Attributes:
        full_count: slots to have where memory allows.
        count: most slots to have now.
        calm_answers: that have ended since the last change.
        patience: grows where memory runs out again soon after an advance.
    """

    full_count: int
    count: int
    calm_answers: int = 0
    patience: int = CALM_PER_SLOT
    advanced: bool = False

    @property
    def is_over_due(self) -> bool:
        """Return whether more slots should be tried."""
        return self.count < self.full_count and self.calm_answers >= self.patience * self.count

    def halve(self, slot_count: int) -> None:
        """Memory ran out at so many slots: fewer than `count` where memory was planned for fewer."""
        if self.advanced:
            self.patience *= 2
        self.count, self.calm_answers, self.advanced = max(1, min(self.count, slot_count) // 2), 0, False

    def advance(self) -> None:
        """Try twice as many."""
        self.count, self.calm_answers, self.advanced = min(self.full_count, self.count * 2), 0, True
