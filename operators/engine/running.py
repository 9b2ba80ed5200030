"""One answer while it is written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from operators.engine.repetition import RepetitionLimits, RepetitionWatch
from operators.engine.request import Completion, FinishReason, Request, SamplingParams, ThoughtBudget

V = TypeVar("V")


class Matcher(Protocol):
    """Follows an answer through its grammar; see `operators.engine.structured`."""

    def accept(self, token_id: int, room_tokens: int) -> bool:
        """Go on with a token, unless the answer could then not end any more within the room that follows."""
        ...

    def end(self, room_tokens: int) -> Sequence[int] | None:
        """Return tokens that end the answer where it stands, if so few suffice."""
        ...


class Grammar(Protocol):
    """What the answers of one schema look like."""

    @property
    def shortest_tokens(self) -> int:
        """Return the tokens of a short answer."""
        ...

    def start(self) -> Matcher:
        """Return what follows a new answer."""
        ...


@dataclass
class Answer(Generic[V]):
    """A request and what has been written for it.

    Attributes:
        request: what was asked.
        room: tokens that the model's positions leave for the answer.
        prepared: the model's own form of the prompt; None before it is encoded and once it is in a slot.
        grammar: of its schema; None: it is any text.
        attempt: 1 for the first.
        earlier_tokens: written by earlier attempts.
        earlier_saved: that the loops of earlier attempts would have written.
        closed_tokens: at its end, by which it was closed.
        submitted_seconds: when it came.
        began_seconds: when it got a slot first; None before.
    """

    request: Request[V]
    room: int
    repetition: RepetitionLimits | None = None
    is_exempt: Callable[[Sequence[int]], bool] | None = None
    prepared: Any = None
    grammar: Grammar | None = None
    attempt: int = 1
    earlier_tokens: int = 0
    earlier_saved: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    thought_is_open: bool = False
    closed_tokens: int = 0
    submitted_seconds: float = 0.0
    began_seconds: float | None = None

    def __post_init__(self) -> None:
        self.start_over()

    @property
    def follows_grammar(self) -> bool:
        """Return whether the next token is one that its grammar allows: not in a thought, nor where one is forced."""
        return self.matcher is not None and not self.thought_is_open and not self.forced

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
        self.finish_reason, self.closed_tokens = None, 0
        self.matcher = self.grammar.start() if self.grammar else None
        self.thought_is_open = self.request.thought is not None
        self.draw = np.random.default_rng([self.request.seed, self.attempt])
        self._watch = RepetitionWatch(self.repetition, self.is_exempt) if self.repetition else None

    def next_attempt(self) -> bool:
        """Go on to the next way of choosing tokens after a loop; return whether there is one.

        None is made once loops and prompts read again have cost as many tokens as one answer may have: so all attempts
        together cost less than two that run to the bound, however many rungs there are.
        """
        spent = self.earlier_tokens + len(self.token_ids) + (self.attempt - 1) * len(self.request.prompt_ids)
        if self.finish_reason != "repetition" or self.is_last_attempt or spent >= self.max_new_tokens:
            return False
        self.earlier_tokens += len(self.token_ids)
        self.earlier_saved += self.tokens_saved
        self.attempt += 1
        self.start_over()
        return True

    def take(self, token: int, logprob: float, stop_ids: Sequence[int]) -> None:
        """Append what the model chose, or what is forced instead of it, and see whether that ends the answer.

        Where it leaves no room to end the answer as its grammar wants, the answer is closed without it. Where it ends
        an answer that a grammar wants inside its thought, it ends the thought alone.
        """
        if self.grammar and self.thought_is_open and token in stop_ids:
            self._end_thought()
        if self.forced:
            token = self.forced.pop(0)
        elif self.follows_grammar and token not in stop_ids and not self._accept(token):
            self.finish_reason = "length"
            return
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

    def close(self) -> None:
        """Write what a value of the schema lacks where the answer has ended."""
        if self.matcher is None or not self.follows_grammar or self.finish_reason not in ("length", "repetition"):
            return
        end = self.matcher.end(self.max_new_tokens - len(self.token_ids)) or ()
        self.token_ids += end
        self.closed_tokens = len(end)

    def _accept(self, token: int) -> bool:
        assert self.matcher is not None
        return self.matcher.accept(token, self.max_new_tokens - len(self.token_ids) - 1)

    def _watch_thought(self, token: int) -> None:
        budget = self.request.thought
        if budget is None or not self.thought_is_open:
            return
        if token == budget.end_id:
            self.thought_is_open = False
            # A grammar has no words for what stands between a thought and its answer.
            self.forced = list(budget.forced_ids[1:]) if self.grammar else []
        elif len(self.token_ids) >= self._thought_tokens(budget):
            self._end_thought()

    def _end_thought(self) -> None:
        assert self.request.thought is not None
        self.forced = list(self.request.thought.forced_ids)
        self.thought_is_open = False

    def _thought_tokens(self, budget: ThoughtBudget) -> int:
        """Return the tokens that a thought may have: fewer than its budget where a short answer needs the room."""
        if self.grammar is None:
            return budget.max_tokens
        kept = len(budget.forced_ids) + self.grammar.shortest_tokens
        return min(budget.max_tokens, self.max_new_tokens - kept)

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
            closed_tokens=self.closed_tokens,
            queue_seconds=began_seconds - self.submitted_seconds,
            generate_seconds=now_seconds - began_seconds,
        )
