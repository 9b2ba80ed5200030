"""Which requests run in the next iteration. Knows tokens and slots; no torch, no pictures, no clock."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class SchedulerConfig(BaseModel):
    """How much runs at once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slot_count: Annotated[int, Field(ge=1, description="Requests that run at once; more need more memory.")]
    chunk_tokens: Annotated[
        int, Field(ge=1, description="Prompt tokens between two decoding steps; fewer keep running answers moving.")
    ] = 2048
    encode_ahead: Annotated[
        int, Field(ge=1, description="Requests whose pictures are encoded together, before slots are free for all.")
    ] = 8
    most_overtaking: Annotated[
        int, Field(ge=0, description="Later requests that may go before a waiting one, as their answers are longer.")
    ] = 512


@dataclass(eq=False)
class Job:
    """One request on its way through the engine.

    Attributes:
        ticket: its number.
        prompt_tokens: length of its prompt.
        expected_tokens: of the answer; orders the queue.
        visual_key: of its pictures, where others may show the same.
        slot: where it runs; None before.
        prefilled: prompt tokens that its slot holds.
        generated: answer tokens that its slot holds.
        alone: it failed in company and runs by itself now.
        restarted: it ran before, and goes on before those that did not.
        encoded: whether its pictures are.
        arrived: requests that had arrived with it.
        admitted: slots that had been given away when it got its own; orders prompts.
    """

    ticket: int
    prompt_tokens: int
    expected_tokens: int = 0
    visual_key: str | None = None
    slot: int | None = None
    prefilled: int = 0
    generated: int = 0
    alone: bool = False
    restarted: bool = False
    encoded: bool = False
    arrived: int = 0
    admitted: int = 0

    @property
    def is_decoding(self) -> bool:
        """Return whether its prompt is in its slot."""
        return self.slot is not None and self.prefilled == self.prompt_tokens

    @property
    def held_tokens(self) -> int:
        """Return the tokens that its slot holds."""
        return self.prefilled + self.generated


@dataclass(frozen=True)
class Prefill:
    """Prompt tokens to run next: `count` of each job, all of which hold `start`."""

    jobs: tuple[Job, ...]
    start: int
    count: int


@dataclass
class Scheduler:
    """The queue and the slots.

    A request takes a slot as soon as one is free and keeps it to its end. Waiting requests come in the order of the
    tokens they are expected to write, most first, so that the last slots to empty do so together; equals come in the
    order of their arrival. One that many later requests have overtaken comes next, whatever is expected of it. Prompts
    go before answers, at most `chunk_tokens` of them between two steps of decoding, so neither waits for the other.
    """

    config: SchedulerConfig
    waiting: deque[Job] = field(default_factory=deque)
    slots: list[Job | None] = field(default_factory=list)
    arrived: int = 0
    admitted: int = 0

    def __post_init__(self) -> None:
        self.slots = [None] * self.config.slot_count

    @property
    def running(self) -> list[Job]:
        """Return the jobs in slots, by slot."""
        return [job for job in self.slots if job is not None]

    @property
    def is_idle(self) -> bool:
        """Return whether nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put jobs into the queue."""
        self.arrived += len(jobs)
        for job in jobs:
            job.arrived = self.arrived
        self._queue(jobs)

    def requeue(self, jobs: Iterable[Job], *, alone: bool = False) -> None:
        """Take running or waiting jobs back: they start again before all others, or each by itself after them."""
        taken = list(jobs)
        for job in taken:
            self.release(job)
            job.prefilled = job.generated = 0
            job.restarted = True
            job.alone = job.alone or alone
        self._queue(taken)

    def release(self, job: Job) -> None:
        """Free the slot of a job, or its place in the queue."""
        if job.slot is not None:
            self.slots[job.slot] = None
            job.slot = None
        elif job in self.waiting:
            self.waiting.remove(job)

    def resize(self, slot_count: int) -> None:
        """Change the number of slots; jobs whose slots are gone start again."""
        gone = [job for job in self.slots[slot_count:] if job is not None]
        self.requeue(gone)
        self.slots = (self.slots + [None] * slot_count)[:slot_count]

    def admit(self) -> list[Job]:
        """Give free slots to waiting jobs that are encoded; return those that got one."""
        admitted: list[Job] = []
        if self._runs_alone:
            return admitted
        for slot, job in enumerate(self.slots):
            if job is not None:
                continue
            if not self.waiting or not self.waiting[0].encoded:
                break
            if self.waiting[0].alone and (admitted or self.running):
                break
            first = self.waiting.popleft()
            first.slot, first.admitted, self.admitted = slot, self.admitted, self.admitted + 1
            self.slots[slot] = first
            admitted.append(first)
            if first.alone:
                break
        return admitted

    def to_encode(self) -> list[Job]:
        """Return the jobs to encode next: none while there are encoded ones for all free slots."""
        free = self.slots.count(None)
        if not self.waiting or not free or self._runs_alone:
            return []
        if self.waiting[0].alone:
            return [] if self.running or self.waiting[0].encoded else [self.waiting[0]]
        encoded = [job for job in self.waiting if job.encoded]
        owed = [job for job in self.waiting if not job.encoded and not job.alone]
        if not owed or (self.waiting[0].encoded and len(encoded) >= free):
            return []
        # Longer ones may have come after some were encoded; all that wait encoded stay within the bound together.
        ahead = len({job.ticket if job.visual_key is None else job.visual_key for job in encoded})
        first = owed[: max(1, self.config.encode_ahead - ahead)]
        keys = {job.visual_key for job in first} - {None}
        return first + [job for job in owed[len(first) :] if job.visual_key in keys]

    def next_prefill(self, room: int) -> Prefill | None:
        """Return the next part of prompts that fits into `room` tokens; None when there is none.

        A prompt that has begun goes on first. One that fits whole between two steps of decoding is not split: it waits
        for the next, and a shorter one takes its place. Prompts of equal length go together.
        """
        owed = [job for job in self.running if not job.is_decoding]
        owed.sort(key=lambda job: (not job.prefilled, job.admitted))
        is_whole = room == self.config.chunk_tokens
        first = next((job for job in owed if job.prefilled or is_whole or job.prompt_tokens <= room), None)
        if first is None or room < 1:
            return None
        count = min(first.prompt_tokens - first.prefilled, room)
        if count < first.prompt_tokens:
            return Prefill((first,), first.prefilled, count)
        alike = [job for job in owed if job.prompt_tokens == count][: room // count]
        return Prefill(tuple(sorted(alike, key=lambda job: job.slot or 0)), 0, count)

    def decoding(self) -> list[Job]:
        """Return the jobs that get a token next, by slot."""
        return [job for job in self.running if job.is_decoding]

    def compaction(self) -> list[tuple[Job, int]]:
        """Return moves of jobs to lower slots: none while others may fill the gaps, or gaps are few."""
        running = self.running
        used = max((job.slot or 0 for job in running), default=-1) + 1
        if self.waiting or len(running) * 4 > used * 3 or any(not job.is_decoding for job in running):
            return []
        gaps = [slot for slot in range(len(running)) if self.slots[slot] is None]
        late = [job for job in reversed(running) if (job.slot or 0) >= len(running)]
        return list(zip(late, gaps, strict=True))

    def move(self, job: Job, slot: int) -> None:
        """Record that a job has moved to a free slot."""
        assert job.slot is not None
        assert self.slots[slot] is None
        self.slots[job.slot] = None
        self.slots[slot] = job
        job.slot = slot

    @property
    def _runs_alone(self) -> bool:
        return any(job is not None and job.alone for job in self.slots)

    def _queue(self, jobs: Iterable[Job]) -> None:
        self.waiting = deque(sorted([*self.waiting, *jobs], key=self._rank))

    def _rank(self, job: Job) -> tuple[bool, bool, bool, int, int]:
        """Return what orders the queue: jobs that were overtaken too often, then those that may run in company."""
        if self.arrived - job.arrived > self.config.most_overtaking:
            return (False, False, False, 0, job.ticket)
        return (True, job.alone, not job.restarted, -job.expected_tokens, job.ticket)
