"""Requests in, completions out: a slot that falls free takes the next request at once."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from operators.engine.faults import (
    FAILURES,
    FOREIGN_ERRORS,
    first_line,
    is_out_of_memory,
    raise_if_lost,
    survived,
    translate,
)
from operators.engine.health import Health
from operators.engine.layout import Layout, Planner
from operators.engine.protocol import SlotModel
from operators.engine.repetition import RepetitionLimits
from operators.engine.request import Outcome, Request
from operators.engine.retreat import Retreat
from operators.engine.running import Answer
from operators.engine.sampler import choose_tokens
from operators.engine.scheduler import Job, Prefill, Scheduler, SchedulerConfig
from operators.engine.stats import EngineStats
from operators.engine.structured import AllowedTokens, Grammar, Grammars
from operators.transfer import on_device
from schemas.errors import ConfigError, PromptTooLongError, RecordError

logger = logging.getLogger(__name__)

V = TypeVar("V")


class Engine(Generic[V]):
    """Runs requests on the slots of one model.

    Every request ends in a completion or in an error of its own. What fails in company is tried again: with fewer slots
    where memory ran out, else by itself.

    Args:
        model: makes the logits.
        config: how much runs at once.
        repetition: when an answer is ended as looping; None: never.
        is_exempt: whether a pattern of tokens may repeat more often than others.
        grammars: of the model's tokens, where requests have schemas.
        known_good: a small request that the model must be able to answer, with a picture where it takes any: where it
            fails as well, a failure is not the fault of its request.
    """

    def __init__(
        self,
        model: SlotModel[V],
        config: SchedulerConfig,
        repetition: RepetitionLimits | None = None,
        is_exempt: Callable[[Sequence[int]], bool] | None = None,
        grammars: Grammars | None = None,
        known_good: Request[V] | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.stats = EngineStats()
        self._repetition = repetition
        self._is_exempt = is_exempt
        self._grammars = grammars
        self._scheduler = Scheduler(config)
        self._retreat = Retreat(config.slot_count, config.slot_count)
        self._health = Health(model, known_good)
        self._planner = Planner(model.slots_that_fit, model.max_positions)
        self._opened_slots = 0
        self._opened_tokens = 0
        self._answers: dict[int, Answer[V]] = {}
        self._finished: dict[int, Outcome] = {}
        self._tickets = 0

    @property
    def slot_count(self) -> int:
        """Return how many requests run at once: fewer than configured where memory is planned for or ran out."""
        return len(self._scheduler.slots)

    def forget_stats(self) -> None:
        """Count from here on."""
        self.stats = EngineStats()

    def generate(self, requests: Sequence[Request[V]]) -> list[Outcome]:
        """Return what became of each request, in their order.

        Raises:
            WorkerLostError: the device does not answer any more.
        """
        tickets = self.submit(requests)
        try:
            while not self._scheduler.is_idle:
                self.step()
        except BaseException:
            self._drop(tickets)
            raise
        return [self._finished.pop(ticket) for ticket in tickets]

    def submit(self, requests: Sequence[Request[V]]) -> list[int]:
        """Put requests into the queue; return their tickets.

        Raises:
            ConfigError: a schema cannot be used; none of the requests is in the queue then.
        """
        grammars = [self._grammar(request) for request in requests]
        now = time.perf_counter()
        tickets: list[int] = []
        jobs: list[Job] = []
        for request, grammar in zip(requests, grammars, strict=True):
            ticket, self._tickets = self._tickets, self._tickets + 1
            tickets.append(ticket)
            room = self.model.max_positions - len(request.prompt_ids)
            if room < 1:
                self._finished[ticket] = too_long(request, self.model.max_positions)
                continue
            self._answers[ticket] = Answer(
                request, room, self._repetition, self._is_exempt, grammar=grammar, submitted_seconds=now
            )
            job = Job(ticket, len(request.prompt_ids), request.expected_tokens, request.visual_key)
            job.most_tokens = job.prompt_tokens + self._answers[ticket].max_new_tokens
            jobs.append(job)
        self._scheduler.submit(jobs)
        return tickets

    def _grammar(self, request: Request[V]) -> Grammar | None:
        if request.answer_schema is None:
            return None
        if self._grammars is None:
            raise ConfigError("a request has an answer schema, and the engine was given no grammars")
        return self._grammars.compile(request.answer_schema)

    def collect(self) -> dict[int, Outcome]:
        """Return what has ended since the last call, by ticket."""
        ended, self._finished = self._finished, {}
        return ended

    def abort(self, ticket: int) -> None:
        """End a request where it is; its completion holds what is written so far."""
        for job in [*self._scheduler.running, *self._scheduler.waiting]:
            if job.ticket == ticket:
                self._answers[ticket].finish_reason = "abort"
                self._finish(job)

    def step(self) -> None:
        """Do one iteration: encode and admit what fits, go on with prompts, give each running answer a token.

        Raises:
            WorkerLostError: the device does not answer any more.
        """
        try:
            self._encode()
            self._admit()
            room = self.config.chunk_tokens
            while (part := self._scheduler.next_prefill(room)) is not None:
                self._prefill(part)
                room -= part.count * len(part.jobs)
            self._decode()
        except FOREIGN_ERRORS as error:
            # A device's fault may show in any call after the one that made it.
            raise_if_lost(error)
            raise

    def _encode(self) -> None:
        jobs = self._scheduler.to_encode()
        if not jobs:
            return
        # One that runs alone has all the memory from here on.
        if jobs[0].alone and not self._open(jobs):
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
        except FAILURES as error:
            failure = survived(error)
        else:
            for job, answer, made in zip(jobs, answers, prepared, strict=True):
                answer.prepared, job.encoded = made, True
            self.stats.encoded_requests += len(jobs)
            self.stats.spared_encodings += len(jobs) - len({job.visual_key or job.ticket for job in jobs})
            return
        self.model.release_memory()
        if len(jobs) > 1:
            logger.warning("%d requests could not be encoded together: %s", len(jobs), first_line(failure))
            middle = len(jobs) // 2
            self._encode_or_halve(jobs[:middle])
            self._encode_or_halve(jobs[middle:])
        elif is_out_of_memory(failure) and not jobs[0].alone:
            self._restart(jobs, alone=True)
        else:
            self._fail(jobs[0], failure)

    def _admit(self) -> None:
        if self._retreat.is_over_due:
            # What runs would be lost if memory ran out again.
            if self._scheduler.running:
                return
            self._retreat.advance()
        self._lay_out()
        admitted = self._scheduler.admit()
        if not admitted or not self._open(admitted):
            return
        now = time.perf_counter()
        for job in admitted:
            answer = self._answers[job.ticket]
            answer.began_seconds = now if answer.began_seconds is None else answer.began_seconds
        self.stats.most_running = max(self.stats.most_running, len(self._scheduler.running))

    def _lay_out(self) -> None:
        """Plan for as many slots as fit into memory for what runs and comes next."""
        layout = self._scheduler.next_layout(lambda tokens: self._planner.layout(tokens, self._retreat.count))
        if layout is None or layout == self._scheduler.layout:
            return
        self._move(self._scheduler.packing(layout.slot_count))
        self._scheduler.resize(layout)

    def _open(self, jobs: Sequence[Job]) -> bool:
        """Have slots that hold these jobs and all that run to their ends; return whether memory sufficed."""
        count = 1 if jobs[0].alone else self.slot_count
        wanted = max(job.most_tokens for job in [*jobs, *self._scheduler.running])
        if count == self._opened_slots and wanted <= self._opened_tokens:
            if not jobs[0].alone or wanted == self._opened_tokens:
                return True
            # The room that another one needed may be what this one lacks.
            self._close()
        try:
            self.model.open_slots(count, wanted)
        except FOREIGN_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            failure = survived(error)
        else:
            self._opened_slots, self._opened_tokens = count, wanted
            return True
        if count == 1:
            self._fail(jobs[0], failure)
            self._close()
        else:
            self._shrink(failure)
        return False

    def _prefill(self, part: Prefill) -> None:
        began = time.perf_counter()
        answers = [self._answers[job.ticket] for job in part.jobs]
        slots = [job.slot for job in part.jobs if job.slot is not None]
        is_done = part.start + part.count == part.jobs[0].prompt_tokens
        try:
            logits = self.model.append_prompt([answer.prepared for answer in answers], slots, part.start, part.count)
            chosen = self._choose(answers, logits) if is_done else []
        except FAILURES as error:
            failure = survived(error)
        else:
            self.stats.prefill_tokens += part.count * len(part.jobs)
            self.stats.prefill_seconds += time.perf_counter() - began
            for job in part.jobs:
                job.prefilled += part.count
            for job, answer, (token, logprob) in zip(part.jobs, answers, chosen, strict=is_done):
                answer.prepared = None
                self._take(job, answer, token, logprob)
            return
        self._recover(part.jobs, failure)

    def _decode(self) -> None:
        self._compact()
        jobs = self._scheduler.decoding()
        if not jobs:
            return
        began = time.perf_counter()
        rows = [job.slot for job in jobs if job.slot is not None]
        row_count = rows[-1] + 1
        tokens, held, active = [0] * row_count, [0] * row_count, [False] * row_count
        for slot, other in enumerate(self._scheduler.slots[:row_count]):
            held[slot] = other.held_tokens if other else 0
        answers = [self._answers[job.ticket] for job in jobs]
        for slot, answer in zip(rows, answers, strict=True):
            tokens[slot], active[slot] = answer.token_ids[-1], True
        try:
            logits = self.model.append_tokens(tokens, held, active)
            own = logits if len(rows) == row_count else logits[on_device(rows, logits.device)]
            chosen = self._choose(answers, own)
        except FAILURES as error:
            failure = survived(error)
        else:
            self._count_step(len(jobs), row_count, time.perf_counter() - began)
            for job, answer, (token, logprob) in zip(jobs, answers, chosen, strict=True):
                job.generated += 1
                self._take(job, answer, token, logprob)
            return
        self._recover(jobs, failure)

    def _count_step(self, job_count: int, row_count: int, seconds: float) -> None:
        self.stats.decode_steps += 1
        self.stats.decoded_tokens += job_count
        self.stats.decode_rows += row_count
        self.stats.decode_seconds += seconds
        if self._scheduler.waiting:
            self.stats.busy_steps += 1
            self.stats.busy_slots += self.slot_count
            self.stats.busy_tokens += job_count

    def _compact(self) -> None:
        self._move(self._scheduler.compaction())

    def _move(self, moves: Sequence[tuple[Job, int]]) -> None:
        for job, slot in moves:
            assert job.slot is not None
            if job.held_tokens:
                self.model.move_slot(job.slot, slot, job.held_tokens)
            self._scheduler.move(job, slot)

    def _choose(self, answers: Sequence[Answer[V]], logits: Any) -> list[tuple[int, float]]:
        return choose_tokens(
            logits,
            [answer.sampling for answer in answers],
            [answer.token_ids for answer in answers],
            [answer.draw for answer in answers],
            self._allowed(answers),
        )

    def _allowed(self, answers: Sequence[Answer[V]]) -> AllowedTokens | None:
        """Return what the grammars of these answers allow next; None where no answer follows one now."""
        matchers: dict[int, Any] = {row: answer.matcher for row, answer in enumerate(answers) if answer.follows_grammar}
        if not matchers:
            return None
        assert self._grammars is not None
        began = time.perf_counter()
        allowed = self._grammars.allowed(matchers)
        self.stats.constrain_seconds += time.perf_counter() - began
        self.stats.constrained_tokens += len(matchers)
        return allowed

    def _take(self, job: Job, answer: Answer[V], token: int, logprob: float) -> None:
        began = time.perf_counter()
        answer.take(token, logprob, self.model.stop_ids)
        if answer.matcher is not None:
            self.stats.constrain_seconds += time.perf_counter() - began
        if answer.finish_reason is None:
            return
        if answer.next_attempt():
            job.most_tokens = job.prompt_tokens + answer.max_new_tokens
            # Pictures are encoded again: few answers loop, and the features of all would have been kept for them.
            job.encoded = False
            self._scheduler.requeue([job])
            return
        answer.close()
        self._finish(job)
        self._retreat.calm_answers += 1

    def _finish(self, job: Job) -> None:
        self._scheduler.release(job)
        answer = self._answers.pop(job.ticket)
        self._finished[job.ticket] = answer.completion(time.perf_counter())

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, RecordError) and not is_out_of_memory(error):
            self._require_health(job, error)
        self._scheduler.release(job)
        del self._answers[job.ticket]
        self._finished[job.ticket] = translate(error)

    def _require_health(self, job: Job, error: Exception) -> None:
        """Raise `WorkerLostError` where not the request was bad, but the model fails on any."""
        slots_are_free = all(other is job for other in self._scheduler.running)
        needed = self._health.needed_tokens
        if slots_are_free and self._opened_tokens < needed:
            try:
                self.model.open_slots(max(1, self._opened_slots), needed)
            except FOREIGN_ERRORS as lacking:
                if not is_out_of_memory(lacking):
                    raise
                return
            self._opened_slots, self._opened_tokens = max(1, self._opened_slots), needed
        self._health.require(error, slots_are_free=slots_are_free)

    def _drop(self, tickets: Sequence[int]) -> None:
        """Forget requests that nobody waits for any more."""
        gone = set(tickets)
        for job in [*self._scheduler.running, *self._scheduler.waiting]:
            if job.ticket in gone:
                self._scheduler.release(job)
        for ticket in gone:
            self._answers.pop(ticket, None)
            self._finished.pop(ticket, None)

    def _recover(self, jobs: Sequence[Job], error: Exception) -> None:
        """Go on after these failed together: with fewer slots, one by one, or without the one that failed by itself."""
        lacks_memory = is_out_of_memory(error)
        by_itself = len(self._scheduler.running) == 1
        if lacks_memory and not by_itself:
            self._shrink(error)
        elif by_itself and (jobs[0].alone or not lacks_memory):
            self._fail(jobs[0], error)
        else:
            logger.warning("%d requests failed and run one by one: %s", len(jobs), first_line(error))
            self._restart(jobs, alone=True)
        if lacks_memory:
            self.model.release_memory()

    def _shrink(self, error: Exception) -> None:
        """Go on with half of the slots; what ran starts again."""
        self._retreat.halve(self.slot_count)
        logger.warning(
            "memory ran out at %d slots, going on with %d: %s", self.slot_count, self._retreat.count, first_line(error)
        )
        self._restart(self._scheduler.running)
        self._scheduler.resize(Layout(self._retreat.count))
        self._close()

    def _close(self) -> None:
        """Give the memory of the slots back; they are made anew before the next request runs."""
        self._opened_slots = self._opened_tokens = 0
        self.model.close_slots()
        self.model.release_memory()

    def _restart(self, jobs: Sequence[Job], *, alone: bool = False) -> None:
        for job in jobs:
            answer = self._answers[job.ticket]
            answer.start_over()
            # The features of its pictures are gone once they are in a slot.
            job.encoded = answer.prepared is not None
        self._scheduler.requeue(jobs, alone=alone)


def too_long(request: Request[Any], max_positions: int) -> RecordError:
    """Return the error of a prompt that leaves no room for an answer."""
    length, limit = len(request.prompt_ids), max_positions - 1
    return PromptTooLongError(f"the prompt has {length} tokens, at most {limit} fit", stage="generate")
