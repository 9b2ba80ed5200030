"""A bad request told from a broken engine: the engine is given one that it must be able to answer."""

from typing import Generic, TypeVar

import torch
from torch import Tensor

from operators.engine.faults import FAILURES, first_line, is_out_of_memory, survived
from operators.engine.protocol import SlotModel
from operators.engine.request import Request, SamplingParams
from schemas.errors import WorkerLostError

V = TypeVar("V")


class Health(Generic[V]):
    """Says whether a model still does what it must.

    Args:
        model: the one that failed.
        known_good: what it must be able to answer; None: a few tokens without a picture.
    """

    def __init__(self, model: SlotModel[V], known_good: Request[V] | None) -> None:
        self.model = model
        self.known_good = known_good or plain_request(model)

    @property
    def needed_tokens(self) -> int:
        """Return the room that the first slot must have."""
        return len(self.known_good.prompt_ids) + 1

    def require(self, failure: Exception, *, slots_are_free: bool) -> None:
        """Raise `WorkerLostError` where the known request fails as well, so that `failure` says nothing of its own.

        Where memory is lacking nothing is said.

        Args:
            failure: of a request that ran by itself.
            slots_are_free: whether the first slot may be written over; else the text model is not asked, as others are
                running on it.
        """
        try:
            self._encode_and_write(slots_are_free=slots_are_free)
        except FAILURES as error:
            own = survived(error)
            if is_out_of_memory(own):
                return
            raise WorkerLostError(
                f"the model fails on a request that it must be able to answer: {first_line(own)}; before that: "
                f"{first_line(failure)}"
            ) from failure

    def _encode_and_write(self, *, slots_are_free: bool) -> None:
        ids = self.known_good.prompt_ids
        prepared = self.model.encode([ids], [self.known_good.visual])
        if slots_are_free:
            token = likeliest(self.model.append_prompt(prepared, [0], 0, len(ids)))
            likeliest(self.model.append_tokens([token], [len(ids)], [True]))


def plain_request(model: SlotModel[V]) -> Request[V]:
    """Return a request of a token that every model knows: one that ends answers, and stands for no picture."""
    return Request((next(iter(model.stop_ids), 0),) * 4, SamplingParams(max_new_tokens=1))


def likeliest(logits: Tensor) -> int:
    """Return the likeliest token.

    Raises:
        ValueError: scores are not numbers.
    """
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the scores of tokens are not finite")
    return int(logits[0].argmax())
