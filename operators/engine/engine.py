"""Requests in, completions out, in padded batches of similar length."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Generic, TypeVar

import numpy as np
import torch

from operators.engine.protocol import CausalModel
from operators.engine.request import Completion, FinishReason, Outcome, Request
from operators.engine.sampler import choose_tokens
from schemas.errors import GenerationError, PromptTooLongError, RecordError, WorkerLostError

logger = logging.getLogger(__name__)

V = TypeVar("V")
S = TypeVar("S")

OUT_OF_MEMORY_TEXTS: Final = ("out of memory", "not enough memory", "can't allocate memory")
DEVICE_FAULT_TEXTS: Final = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "device-side assert")


@dataclass
class Running(Generic[V]):
    """A request whose completion grows.

    Attributes:
        request: what was asked.
        max_new_tokens: where the completion ends at the latest.
        draw: the request's own random numbers.
        forced: tokens that are written whatever the model says, the next one first.
    """

    request: Request[V]
    max_new_tokens: int
    draw: np.random.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    thought_is_open: bool = False

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
        if len(self.token_ids) >= self.max_new_tokens:
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

    def completion(self) -> Completion:
        """Return the finished completion, without times."""
        mean = sum(self.logprobs) / len(self.logprobs) if self.logprobs else 0.0
        written = len(self.token_ids) + (self.finish_reason == "stop")
        return Completion(tuple(self.token_ids), self.finish_reason or "abort", mean, written)


class BatchEngine(Generic[V, S]):
    """Runs requests in batches, each until its last request has ended.

    A request that has ended leaves its batch at once. A batch that does not fit into memory, or in which a request
    fails, is halved and tried again, down to single requests.

    Args:
        model: makes the logits.
        max_rows: requests in one batch.
        max_prompt_tokens: prompt tokens in one batch, padding included.
    """

    def __init__(self, model: CausalModel[V, S], *, max_rows: int, max_prompt_tokens: int) -> None:
        self.model = model
        self.max_rows = max_rows
        self.max_prompt_tokens = max_prompt_tokens

    def generate(self, requests: Sequence[Request[V]]) -> list[Outcome]:
        """Return what became of each request, in their order.

        Raises:
            WorkerLostError: the device does not answer any more.
        """
        began = time.perf_counter()
        outcomes: dict[int, Outcome] = {}
        fitting = []
        for index, request in enumerate(requests):
            if len(request.prompt_ids) < self.model.max_positions:
                fitting.append(index)
            else:
                outcomes[index] = self._too_long(request)
        lengths = {index: len(requests[index].prompt_ids) for index in fitting}
        for batch in plan_batches(lengths, self.max_rows, self.max_prompt_tokens):
            queued = time.perf_counter() - began
            answers = self._run_or_halve([requests[index] for index in batch])
            for index, answer in zip(batch, answers, strict=True):
                timed = replace(answer, queue_seconds=queued) if isinstance(answer, Completion) else answer
                outcomes[index] = timed
        return [outcomes[index] for index in range(len(requests))]

    def _too_long(self, request: Request[V]) -> RecordError:
        length, limit = len(request.prompt_ids), self.model.max_positions - 1
        return PromptTooLongError(f"the prompt has {length} tokens, at most {limit} fit", stage="generate")

    def _run_or_halve(self, requests: list[Request[V]]) -> list[Outcome]:
        try:
            return self._run(requests)
        except RecordError as error:
            if len(requests) == 1:
                return [error]
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            raise_if_lost(error)
            if len(requests) == 1:
                return [translate(error)]
            logger.warning("a batch of %d requests failed and is halved: %s", len(requests), first_line(error))
        # Outside of the handlers: a caught error holds the failed batch's tensors.
        self.model.release_memory()
        middle = len(requests) // 2
        return self._run_or_halve(requests[:middle]) + self._run_or_halve(requests[middle:])

    def _run(self, requests: list[Request[V]]) -> list[Outcome]:
        began = time.perf_counter()
        running = [self._start(request) for request in requests]
        logits, state = self.model.prefill(
            [request.prompt_ids for request in requests], [request.visual for request in requests]
        )
        live = running
        while True:
            self._take_tokens(live, logits)
            rows = [row for row, sequence in enumerate(live) if sequence.finish_reason is None]
            if not rows:
                break
            if len(rows) < len(live):
                self.model.keep(state, rows)
                live = [live[row] for row in rows]
            logits = self.model.decode(state, [sequence.token_ids[-1] for sequence in live])
        completions = [sequence.completion() for sequence in running]
        seconds = time.perf_counter() - began
        total = sum(completion.output_tokens for completion in completions)
        return [replace(completion, batch_seconds=seconds, batch_tokens=total) for completion in completions]

    def _start(self, request: Request[V]) -> Running[V]:
        room = self.model.max_positions - len(request.prompt_ids)
        return Running(
            request=request,
            max_new_tokens=min(request.sampling.max_new_tokens, room),
            draw=np.random.default_rng(request.seed),
            thought_is_open=request.thought is not None,
        )

    def _take_tokens(self, live: Sequence[Running[V]], logits: torch.Tensor) -> None:
        chosen = choose_tokens(
            logits,
            [sequence.request.sampling for sequence in live],
            [sequence.token_ids for sequence in live],
            [sequence.draw for sequence in live],
        )
        for sequence, (token, logprob) in zip(live, chosen, strict=True):
            sequence.take(token, logprob, self.model.stop_ids)


def plan_batches(lengths: dict[int, int], max_rows: int, max_tokens: int) -> list[list[int]]:
    """Return the requests of each batch: similar lengths together, the longest first.

    Longest first, so that a batch that does not fit into memory shows early.

    Args:
        lengths: prompt tokens of each request.
        max_rows: requests in one batch.
        max_tokens: prompt tokens in one batch, padding included; a longer request makes a batch alone.
    """
    batches: list[list[int]] = []
    for index in sorted(lengths, key=lambda index: (-lengths[index], index)):
        if batches:
            rows = len(batches[-1]) + 1
            if rows <= max_rows and rows * lengths[batches[-1][0]] <= max_tokens:
                batches[-1].append(index)
                continue
        batches.append([index])
    return batches


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory of the host or the device ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error).lower() for text in OUT_OF_MEMORY_TEXTS)


def raise_if_lost(error: BaseException) -> None:
    """Raise `WorkerLostError` when `error` leaves the device unusable for this process."""
    if is_out_of_memory(error):
        return
    if isinstance(error, torch.AcceleratorError) or any(text in str(error) for text in DEVICE_FAULT_TEXTS):
        raise WorkerLostError(f"the device failed: {first_line(error)}") from error


def translate(error: BaseException) -> GenerationError:
    """Return the error row's view of a failure of one request alone."""
    code = "out_of_memory" if is_out_of_memory(error) else "generation"
    failure = GenerationError(
        f"the model failed on this request alone: {first_line(error)}",
        code=code,
        exception_type=type(error).__name__,
        retryable=code == "out_of_memory",
    )
    failure.__cause__ = error.with_traceback(None)
    return failure


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]
