"""What the engine asks of a model."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

V_contra = TypeVar("V_contra", contravariant=True)


class SlotModel(Protocol[V_contra]):
    """Makes the logits of the next token for sequences that live in numbered slots.

    What `encode` returns is the model's own; the engine hands it back and drops it when the prompt is in its slot.

    Attributes:
        stop_ids: tokens that end an answer.
        max_positions: longest sequence, prompt and completion together.
    """

    @property
    def stop_ids(self) -> Sequence[int]:
        """Return the tokens that end an answer."""
        ...

    @property
    def max_positions(self) -> int:
        """Return the longest sequence, prompt and completion together."""
        ...

    def slots_that_fit(self, token_count: int) -> int | None:
        """Return how many slots with room for so many tokens there is memory for; None where no bound is known.

        It holds for other slots in the place of those that are open. More tokens never let more fit.
        """
        ...

    def open_slots(self, slot_count: int, capacity_tokens: int) -> None:
        """Have this many slots, each with room for so many tokens.

        The slots that there were and are keep what they hold. As many as before do so also where memory for more room
        is lacking.
        """
        ...

    def close_slots(self) -> None:
        """Have no slots, and give their memory back."""
        ...

    def encode(self, prompts: Sequence[Sequence[int]], visuals: Sequence[V_contra | None]) -> list[Any]:
        """Return each prompt with its pictures as the model takes it; pictures that are the same object go once.

        Raises:
            RecordError: a request is malformed.
        """
        ...

    def append_prompt(self, prepared: Sequence[Any], slots: Sequence[int], start: int, count: int) -> Tensor:
        """Append `count` prompt tokens to slots that hold `start`; return the logits after them, (B, vocabulary)."""
        ...

    def append_tokens(self, token_ids: Sequence[int], held_tokens: Sequence[int], active: Sequence[bool]) -> Tensor:
        """Append one token to each active one of the first slots; return the logits after them.

        Args:
            token_ids: for each of the first slots; any where it is not active.
            held_tokens: tokens that each holds.
            active: slots that are not active stay as they are.

        Shapes:
            result: (len(token_ids), vocabulary) in the model's dtype; rows of slots that are not active mean nothing.
        """
        ...

    def move_slot(self, source: int, target: int, held_tokens: int) -> None:
        """Copy what one slot holds into another."""
        ...

    def release_memory(self) -> None:
        """Give memory that is not in use back to the device, before less is tried."""
        ...
