"""What the engine asks of a model."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor

V_contra = TypeVar("V_contra", contravariant=True)
S = TypeVar("S")


class CausalModel(Protocol[V_contra, S]):
    """Makes the logits of the next token for a batch of sequences.

    `S` is the model's own state of a running batch: its cache and whatever goes with it.

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

    def prefill(self, prompts: Sequence[Sequence[int]], visuals: Sequence[V_contra | None]) -> tuple[Tensor, S]:
        """Return the logits after each prompt, (B, vocabulary) in the model's dtype, and the state to go on with.

        Raises:
            RecordError: a request of the batch is malformed.
        """
        ...

    def decode(self, state: S, token_ids: Sequence[int]) -> Tensor:
        """Append one token to each sequence; return the logits after it, (B, vocabulary), and update `state`."""
        ...

    def keep(self, state: S, rows: Sequence[int]) -> None:
        """Drop from `state` all sequences but those at `rows`, which stay in this order."""
        ...

    def release_memory(self) -> None:
        """Give memory that is not in use back to the device, before a smaller batch is tried."""
        ...
