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


@dataclass(eq=False)
class Job:
    """One request on its way through the engine.

    Attributes:
        ticket: its number.
        prompt_tokens: length of its prompt.
        slot: where it runs; None before.
        prefilled: prompt tokens that its slot holds.
        generated: answer tokens that its slot holds.
        expected_tokens: of the answer; orders the queue.
        visual_key: of its pictures, where others may show the same.
        alone: it failed in company and runs by itself now.
        encoded: whether its pictures are.
    """

    ticket: int
    prompt_tokens: int
    expected_tokens: int = 0
    visual_key: str | None = None
    slot: int | None = None
    prefilled: int = 0
    generated: int = 0
    alone: bool = False
    encoded: bool = False

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
    order of their arrival, and requests for which nothing is expected are never overtaken by later ones of the same
    kind. Prompts go before answers, at most `chunk_tokens` of them between two steps of decoding, so neither waits for
    the other.
    """

    config: SchedulerConfig
    waiting: deque[Job] = field(default_factory=deque)
    slots: list[Job | None] = field(default_factory=list)

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

    def submit(self, jobs: Iterable[Job]) -> None:
        """Put jobs into the queue."""
        self.waiting = deque(sorted([*self.waiting, *jobs], key=lambda job: (job.alone, -job.expected_tokens)))

    def requeue(self, job: Job, *, alone: bool = False) -> None:
        """Take a running job back: it starts again before all others, or by itself after them."""
        self.release(job)
        job.prefilled = job.generated = 0
        job.alone = job.alone or alone
        if job.alone:
            self.waiting.append(job)
        else:
            self.waiting.appendleft(job)

    def release(self, job: Job) -> None:
        """Free the slot of a job."""
        if job.slot is not None:
            self.slots[job.slot] = None
            job.slot = None

    def resize(self, slot_count: int) -> list[Job]:
        """Change the number of slots; return the jobs whose slots are gone, already requeued."""
        gone = [job for job in self.slots[slot_count:] if job is not None]
        for job in reversed(gone):
            self.requeue(job)
        self.slots = (self.slots + [None] * slot_count)[:slot_count]
        return gone

    def admit(self) -> list[Job]:
        """Give free slots to waiting jobs that are encoded; return those that got one."""
        admitted: list[Job] = []
        for slot, job in enumerate(self.slots):
            if job is not None or not self.waiting:
                continue
            first = self.waiting[0]
            if not first.encoded or (first.alone and (self.running or admitted)):
                break
            if any(other.alone for other in self.running):
                break
            first.slot = slot
            self.slots[slot] = self.waiting.popleft()
            admitted.append(first)
        return admitted

    def to_encode(self) -> list[Job]:
        """Return the jobs to encode next: none while encoded ones wait, or no slot is free."""
        free = self.slots.count(None)
        if not free or not self.waiting or self.waiting[0].encoded:
            return []
        if self.waiting[0].alone:
            return [self.waiting[0]]
        owed = [job for job in self.waiting if not job.encoded and not job.alone]
        first = owed[: self.config.encode_ahead]
        keys = {job.visual_key for job in first} - {None}
        return first + [job for job in owed[len(first) :] if job.visual_key in keys]

    def next_prefill(self, room: int) -> Prefill | None:
        """Return the next part of prompts that fits into `room` tokens; None when there is none.

        The job that holds the most goes on first; others whose parts are of the same length join it.
        """
        owed = [job for job in self.running if not job.is_decoding]
        if not owed or room < 1:
            return None
        first = max(owed, key=lambda job: (job.prefilled > 0, -job.ticket))
        count = min(first.prompt_tokens - first.prefilled, room)
        alike = [
            job
            for job in owed
            if job is not first
            and job.prefilled == first.prefilled
            and min(job.prompt_tokens - job.prefilled, room) == count
        ]
        # Those that have begun go on alone: joining them would copy what their slots hold.
        joined = [first, *alike[: room // count - 1]] if first.prefilled == 0 else [first]
        return Prefill(tuple(sorted(joined, key=lambda job: job.slot or 0)), first.prefilled, count)

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


def longest(jobs: Sequence[Job]) -> int:
    """Return the most tokens that any of the jobs holds."""
    return max((job.held_tokens for job in jobs), default=0)
