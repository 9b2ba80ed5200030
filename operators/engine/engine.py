"""Requests in, completions out: a slot that falls free takes the next request at once."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from operators.engine.faults import FOREIGN_ERRORS, first_line, is_out_of_memory, raise_if_lost, translate
from operators.engine.protocol import SlotModel
from operators.engine.repetition import RepetitionLimits
from operators.engine.request import Outcome, Request
from operators.engine.running import Answer
from operators.engine.sampler import choose_tokens
from operators.engine.scheduler import Job, Prefill, Scheduler, SchedulerConfig
from schemas.errors import PromptTooLongError, RecordError

logger = logging.getLogger(__name__)

V = TypeVar("V")


@dataclass
class EngineStats:
    """What an engine has done since it was made.

    Attributes:
        decode_steps: passes that gave running answers a token each.
        decoded_tokens: tokens of answers that these passes made.
        decode_rows: slots that went through these passes, gaps included.
        busy_steps, busy_tokens: the same while requests were waiting, that is before the drain.
        prefill_tokens: prompt tokens that went through the text model.
        encoded_requests: requests whose pictures were encoded.
        encode_seconds, prefill_seconds, decode_seconds: time of each kind of work.
        most_running: most answers under way at once.
    """

    decode_steps: int = 0
    decoded_tokens: int = 0
    decode_rows: int = 0
    busy_steps: int = 0
    busy_tokens: int = 0
    prefill_tokens: int = 0
    encoded_requests: int = 0
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    most_running: int = 0

    def occupancy(self, slot_count: int) -> float | None:
        """Return the share of slots that were writing while requests waited; None when none ever did."""
        return self.busy_tokens / (self.busy_steps * slot_count) if self.busy_steps else None


class Engine(Generic[V]):
    """Runs requests on the slots of one model.

    Every request ends in a completion or in an error of its own. What fails in company is tried again: with fewer slots
    where memory ran out, else by itself.

    Args:
        model: makes the logits.
        config: how much runs at once.
        repetition: when an answer is ended as looping; None: never.
        is_exempt: whether a pattern of tokens may repeat more often than others.
    """

    def __init__(
        self,
        model: SlotModel[V],
        config: SchedulerConfig,
        repetition: RepetitionLimits | None = None,
        is_exempt: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.stats = EngineStats()
        self._repetition = repetition
        self._is_exempt = is_exempt
        self._scheduler = Scheduler(config)
        self._answers: dict[int, Answer[V]] = {}
        self._submitted: dict[int, float] = {}
        self._finished: dict[int, Outcome] = {}
        self._tickets = 0
        self._capacity_tokens = 0

    @property
    def slot_count(self) -> int:
        """Return how many requests run at once; fewer than configured after memory ran out."""
        return len(self._scheduler.slots)

    def generate(self, requests: Sequence[Request[V]]) -> list[Outcome]:
        """Return what became of each request, in their order.

        Raises:
            WorkerLostError: the device does not answer any more.
        """
        tickets = self.submit(requests)
        while not self._scheduler.is_idle:
            self.step()
        return [self._finished.pop(ticket) for ticket in tickets]

    def submit(self, requests: Sequence[Request[V]]) -> list[int]:
        """Put requests into the queue; return their tickets."""
        now = time.perf_counter()
        tickets: list[int] = []
        jobs: list[Job] = []
        for request in requests:
            ticket, self._tickets = self._tickets, self._tickets + 1
            tickets.append(ticket)
            self._submitted[ticket] = now
            room = self.model.max_positions - len(request.prompt_ids)
            if room < 1:
                self._end(ticket, too_long(request, self.model.max_positions))
                continue
            self._answers[ticket] = Answer(request, room, self._repetition, self._is_exempt)
            jobs.append(Job(ticket, len(request.prompt_ids), request.expected_tokens, request.visual_key))
        self._scheduler.submit(jobs)
        return tickets

    def collect(self) -> dict[int, Outcome]:
        """Return what has ended since the last call, by ticket."""
        ended, self._finished = self._finished, {}
        return ended

    def abort(self, ticket: int) -> None:
        """End a request where it is; its completion holds what is written so far."""
        for job in [*self._scheduler.running, *self._scheduler.waiting]:
            if job.ticket == ticket:
                self._answers[ticket].finish_reason = "abort"
                if job in self._scheduler.waiting:
                    self._scheduler.waiting.remove(job)
                self._finish(job)

    def step(self) -> None:
        """Do one iteration: encode and admit what fits, go on with prompts, give each running answer a token."""
        self._encode()
        self._admit()
        room = self.config.chunk_tokens
        while room > 0 and (part := self._scheduler.next_prefill(room)) is not None:
            self._prefill(part)
            room -= part.count * len(part.jobs)
        self._decode()

    def _encode(self) -> None:
        jobs = self._scheduler.to_encode()
        if not jobs:
            return
        began = time.perf_counter()
        self._encode_or_halve(jobs)
        self.stats.encode_seconds += time.perf_counter() - began

    def _encode_or_halve(self, jobs: list[Job]) -> None:
        answers = [self._answers[job.ticket] for job in jobs]
        shared = {answer.request.visual_key: answer.request.visual for answer in answers}
        visuals = [
            answer.request.visual if answer.request.visual_key is None else shared[answer.request.visual_key]
            for answer in answers
        ]
        try:
            prepared = self.model.encode([answer.request.prompt_ids for answer in answers], visuals)
        except RecordError as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
        except FOREIGN_ERRORS as error:
            raise_if_lost(error)
            if len(jobs) == 1:
                self._fail(jobs[0], translate(error))
                return
            logger.warning("%d requests could not be encoded together: %s", len(jobs), first_line(error))
        else:
            for job, answer, made in zip(jobs, answers, prepared, strict=True):
                answer.prepared, job.encoded = made, True
            self.stats.encoded_requests += len(jobs)
            return
        # Outside of the handlers: a caught error holds the failed batch's tensors.
        self.model.release_memory()
        middle = len(jobs) // 2
        self._encode_or_halve(jobs[:middle])
        self._encode_or_halve(jobs[middle:])

    def _admit(self) -> None:
        admitted = self._scheduler.admit()
        if not admitted:
            return
        wanted = max(job.prompt_tokens + self._answers[job.ticket].max_new_tokens for job in admitted)
        if wanted > self._capacity_tokens:
            self._open(wanted)
        now = time.perf_counter()
        for job in admitted:
            self._answers[job.ticket].began_seconds = now
        self.stats.most_running = max(self.stats.most_running, len(self._scheduler.running))

    def _open(self, capacity_tokens: int) -> None:
        """Give the model slots of this size; grows what there is, and keeps what it holds."""
        try:
            self.model.open_slots(self.slot_count, capacity_tokens)
        except FOREIGN_ERRORS as error:
            raise_if_lost(error)
            if not is_out_of_memory(error):
                raise
            self._shrink(error)
            return
        self._capacity_tokens = capacity_tokens

    def _prefill(self, part: Prefill) -> None:
        began = time.perf_counter()
        answers = [self._answers[job.ticket] for job in part.jobs]
        slots = [job.slot for job in part.jobs if job.slot is not None]
        try:
            logits = self.model.append_prompt([answer.prepared for answer in answers], slots, part.start, part.count)
            done = part.start + part.count == part.jobs[0].prompt_tokens
            chosen = self._choose(answers, logits) if done else []
        except FOREIGN_ERRORS as error:
            self._recover(list(part.jobs), error)
            return
        for job in part.jobs:
            job.prefilled += part.count
        self.stats.prefill_tokens += part.count * len(part.jobs)
        self.stats.prefill_seconds += time.perf_counter() - began
        for job, answer, (token, logprob) in zip(part.jobs, answers, chosen, strict=False):
            if not answer.request.rungs:
                answer.prepared = None
            self._take(job, answer, token, logprob)

    def _decode(self) -> None:
        jobs = self._scheduler.decoding()
        if not jobs:
            return
        began = time.perf_counter()
        self._compact()
        row_count = max(job.slot or 0 for job in jobs) + 1
        tokens, held, active = [0] * row_count, [0] * row_count, [False] * row_count
        for job in self._scheduler.running:
            if job.slot is not None and job.slot < row_count:
                held[job.slot] = job.held_tokens
        for job in jobs:
            assert job.slot is not None
            tokens[job.slot] = self._answers[job.ticket].token_ids[-1]
            active[job.slot] = True
        jobs.sort(key=lambda job: job.slot or 0)
        rows = [job.slot for job in jobs]
        answers = [self._answers[job.ticket] for job in jobs]
        try:
            logits = self.model.append_tokens(tokens, held, active)
            chosen = self._choose(answers, logits if len(rows) == row_count else logits[rows])
        except FOREIGN_ERRORS as error:
            self._recover(jobs, error)
            return
        self._count_step(len(jobs), row_count, time.perf_counter() - began)
        for job, answer, (token, logprob) in zip(jobs, answers, chosen, strict=True):
            job.generated += 1
            self._take(job, answer, token, logprob)

    def _count_step(self, job_count: int, row_count: int, seconds: float) -> None:
        self.stats.decode_steps += 1
        self.stats.decoded_tokens += job_count
        self.stats.decode_rows += row_count
        self.stats.decode_seconds += seconds
        if self._scheduler.waiting:
            self.stats.busy_steps += 1
            self.stats.busy_tokens += job_count

    def _compact(self) -> None:
        for job, slot in self._scheduler.compaction():
            assert job.slot is not None
            self.model.move_slot(job.slot, slot, job.held_tokens)
            self._scheduler.move(job, slot)

    def _choose(self, answers: Sequence[Answer[V]], logits: Any) -> list[tuple[int, float]]:
        return choose_tokens(
            logits,
            [answer.sampling for answer in answers],
            [answer.token_ids for answer in answers],
            [answer.draw for answer in answers],
        )

    def _take(self, job: Job, answer: Answer[V], token: int, logprob: float) -> None:
        answer.take(token, logprob, self.model.stop_ids)
        if answer.finish_reason is None:
            return
        if answer.next_attempt():
            self._scheduler.requeue(job)
            return
        self._finish(job)

    def _finish(self, job: Job) -> None:
        answer = self._answers[job.ticket]
        queued = answer.began_seconds - self._submitted[job.ticket] if answer.began_seconds else 0.0
        self._scheduler.release(job)
        self._end(job.ticket, answer.completion(time.perf_counter(), queued))

    def _fail(self, job: Job, error: RecordError) -> None:
        if job in self._scheduler.waiting:
            self._scheduler.waiting.remove(job)
        self._scheduler.release(job)
        self._end(job.ticket, error)

    def _end(self, ticket: int, outcome: Outcome) -> None:
        self._answers.pop(ticket, None)
        self._submitted.pop(ticket, None)
        self._finished[ticket] = outcome

    def _recover(self, jobs: list[Job], error: Exception) -> None:
        """Put jobs that failed together back into the queue; one that failed by itself gets its error."""
        raise_if_lost(error)
        if len(self._scheduler.running) == 1:
            failure = error if isinstance(error, RecordError) else translate(error)
            self._fail(jobs[0], failure)
            self.model.release_memory()
            return
        if is_out_of_memory(error) and self.slot_count > 1:
            self._shrink(error)
            return
        logger.warning("%d requests failed together and run one by one: %s", len(jobs), first_line(error))
        for job in jobs:
            self._restart(job, alone=True)
        self.model.release_memory()

    def _shrink(self, error: Exception) -> None:
        """Go on with half of the slots; what ran starts again."""
        count = max(1, self.slot_count // 2)
        logger.warning("memory ran out at %d slots, going on with %d: %s", self.slot_count, count, first_line(error))
        for job in reversed(self._scheduler.running):
            self._restart(job)
        self._scheduler.resize(count)
        self._capacity_tokens = 0
        self.model.release_memory()

    def _restart(self, job: Job, *, alone: bool = False) -> None:
        answer = self._answers[job.ticket]
        answer.start_over()
        # The features of its pictures are gone unless further attempts were foreseen.
        job.encoded = answer.prepared is not None
        self._scheduler.requeue(job, alone=alone)


def too_long(request: Request[Any], max_positions: int) -> RecordError:
    """Return the error of a prompt that leaves no room for an answer."""
    length, limit = len(request.prompt_ids), max_positions - 1
    return PromptTooLongError(f"the prompt has {length} tokens, at most {limit} fit", stage="generate")
