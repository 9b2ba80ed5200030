"""One answer while it is written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from operators.engine.repetition import RepetitionLimits, RepetitionWatch
from operators.engine.request import Completion, FinishReason, Request, SamplingParams

V = TypeVar("V")


@dataclass
class Answer(Generic[V]):
    """A request and what has been written for it.

    Attributes:
        request: what was asked.
        room: tokens that the model's positions leave for the answer.
        prepared: the model's own form of the prompt; None before it is encoded and after its last use.
        attempt: 1 for the first.
        earlier_tokens: written by earlier attempts.
        earlier_saved: that the loops of earlier attempts would have written.
        submitted_seconds: when it came.
        began_seconds: when it got a slot first; None before.
    """

    request: Request[V]
    room: int
    repetition: RepetitionLimits | None = None
    is_exempt: Callable[[Sequence[int]], bool] | None = None
    prepared: Any = None
    attempt: int = 1
    earlier_tokens: int = 0
    earlier_saved: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    thought_is_open: bool = False
    submitted_seconds: float = 0.0
    began_seconds: float | None = None

    def __post_init__(self) -> None:
        self.start_over()

    @property
    def is_last_attempt(self) -> bool:
        """Return whether a loop in this attempt is final."""
        return self.attempt > len(self.request.rungs)

    @property
    def tokens_saved(self) -> int:
        """Return the tokens that a loop would have gone on to write."""
        return self.max_new_tokens - len(self.token_ids) if self.finish_reason == "repetition" else 0

    def start_over(self) -> None:
        """Begin this attempt, or begin it again; what it has written before is forgotten."""
        self.sampling: SamplingParams = (self.request.sampling, *self.request.rungs)[self.attempt - 1]
        self.max_new_tokens = min(self.sampling.max_new_tokens, self.room)
        self.token_ids, self.logprobs, self.forced = [], [], []
        self.finish_reason = None
        self.thought_is_open = self.request.thought is not None
        self.draw = np.random.default_rng([self.request.seed, self.attempt])
        self._watch = RepetitionWatch(self.repetition, self.is_exempt) if self.repetition else None

    def next_attempt(self) -> bool:
        """Go on to the next way of choosing tokens after a loop; return whether there is one."""
        if self.finish_reason != "repetition" or self.is_last_attempt:
            return False
        self.earlier_tokens += len(self.token_ids)
        self.earlier_saved += self.tokens_saved
        self.attempt += 1
        self.start_over()
        return True

    def take(self, token: int, logprob: float, stop_ids: Sequence[int]) -> None:
        """Append what the model chose, or what is forced instead of it, and see whether that ends the answer."""
        if self.forced:
            token = self.forced.pop(0)
        else:
            self.logprobs.append(logprob)
        if token in stop_ids:
            self.finish_reason = "stop"
            return
        self.token_ids.append(token)
        self._watch_thought(token)
        if self._watch is not None and self._watch.is_looping(self.token_ids):
            self.finish_reason = "repetition"
        elif len(self.token_ids) >= self.max_new_tokens:
            self.finish_reason = "length"

    def _watch_thought(self, token: int) -> None:
        budget = self.request.thought
        if budget is None or not self.thought_is_open:
            return
        if token == budget.end_id:
            self.thought_is_open = False
        elif len(self.token_ids) >= budget.max_tokens:
            self.forced = list(budget.forced_ids)
            self.thought_is_open = False

    def completion(self, now_seconds: float) -> Completion:
        """Return the finished completion."""
        began_seconds = now_seconds if self.began_seconds is None else self.began_seconds
        mean = sum(self.logprobs) / len(self.logprobs) if self.logprobs else 0.0
        written = len(self.token_ids) + (self.finish_reason == "stop")
        return Completion(
            tuple(self.token_ids),
            self.finish_reason or "abort",
            mean,
            written,
            attempt=self.attempt,
            wasted_tokens=self.earlier_tokens,
            tokens_saved=self.earlier_saved + self.tokens_saved,
            queue_seconds=began_seconds - self.submitted_seconds,
            generate_seconds=now_seconds - began_seconds,
        )
