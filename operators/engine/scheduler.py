"""Which requests run in the next iteration. Knows tokens and slots; no torch, no pictures, no clock."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from operators.engine.layout import Layout


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
        most_tokens: of its prompt and its longest answer together.
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
    most_tokens: int = 0

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

    Slots are equally long. Where memory bounds how many there are, a request that is too long for those there are waits
    until no other can go before it, then until so few run that the fewer slots of its length hold them as well. Long
    ones go one after the other then, and as soon as the last has ended there are many slots again.
    """

    config: SchedulerConfig
    waiting: deque[Job] = field(default_factory=deque)
    slots: list[Job | None] = field(default_factory=list)
    arrived: int = 0
    admitted: int = 0
    layout: Layout = field(default_factory=lambda: Layout(0))

    def __post_init__(self) -> None:
        self.slots = [None] * self.config.slot_count
        self.layout = Layout(self.config.slot_count)

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

    def resize(self, layout: Layout) -> None:
        """Have other slots; jobs whose slots are gone start again."""
        gone = [job for job in self.slots[layout.slot_count :] if job is not None]
        self.requeue(gone)
        self.slots = (self.slots + [None] * layout.slot_count)[: layout.slot_count]
        self.layout = layout

    def next_layout(self, layout_for: Callable[[int], Layout]) -> Layout | None:
        """Return the slots to have for what runs and comes next; None: those there are.

        Args:
            layout_for: slots for requests of a length.
        """
        running = self.running
        if not self.waiting or self._runs_alone or (running and self.layout.most_tokens is None):
            return None
        if not running:
            return None if self.waiting[0].alone else layout_for(self.waiting[0].most_tokens)
        coming = self.coming()
        needed = max(job.most_tokens for job in [*running, (coming or self.waiting)[0]])
        if coming:
            has_more = len(coming) > self.slots.count(None)
            if not has_more or needed > self.layout.short_tokens:
                return None
            layout = layout_for(needed)
            # Less may fit than when the present slots were planned.
            return layout if len(running) <= layout.slot_count else None
        if self.waiting[0].alone or not self.waiting[0].encoded:
            return None
        layout = layout_for(needed)
        return layout if len(running) < layout.slot_count else None

    def coming(self) -> list[Job]:
        """Return the waiting jobs that fit into the slots there are, first those of which many more would not fit."""
        layout = self.layout
        if layout.most_tokens is None or not self.waiting:
            return list(self.waiting)
        if self._is_overdue(self.waiting[0]) and not self._fits(self.waiting[0]):
            return []
        fitting = [job for job in self.waiting if self._fits(job)]
        fitting.sort(key=lambda job: (not self._is_overdue(job), job.alone, job.most_tokens <= layout.short_tokens))
        return fitting

    def admit(self) -> list[Job]:
        """Give free slots to waiting jobs that are encoded; return those that got one."""
        admitted: list[Job] = []
        if self._runs_alone or None not in self.slots:
            return admitted
        coming = deque(self.coming())
        for slot, job in enumerate(self.slots):
            if job is not None:
                continue
            if not coming or not coming[0].encoded:
                break
            if coming[0].alone and (admitted or self.running):
                break
            first = coming.popleft()
            self.waiting.remove(first)
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
        # What `admit` takes next has to be what is encoded next, or both wait for each other.
        coming = self.coming() or list(self.waiting)
        if coming[0].alone:
            return [] if self.running or coming[0].encoded else [coming[0]]
        owed = [job for job in coming if not job.encoded and not job.alone]
        if not owed or (coming[0].encoded and sum(job.encoded for job in coming) >= free):
            return []
        # Longer ones may have come after some were encoded; all that wait encoded stay within the bound together.
        encoded = [job for job in self.waiting if job.encoded]
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
        if len(running) * 4 > used * 3 or any(not job.is_decoding for job in running) or self.coming():
            return []
        return self.packing(len(running))

    def packing(self, slot_count: int) -> list[tuple[Job, int]]:
        """Return the moves that leave only the first slots in use; no fewer than the jobs that run."""
        gaps = [slot for slot, job in enumerate(self.slots[:slot_count]) if job is None]
        late = [job for job in reversed(self.running) if (job.slot or 0) >= slot_count]
        return list(zip(late, gaps, strict=False))

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

    def _fits(self, job: Job) -> bool:
        return job.alone or self.layout.fits(job.most_tokens)

    def _is_overdue(self, job: Job) -> bool:
        return self.arrived - job.arrived > self.config.most_overtaking

    def _rank(self, job: Job) -> tuple[bool, bool, bool, int, int]:
        """Return what orders the queue: jobs that were overtaken too often, then those that may run in company."""
        if self._is_overdue(job):
            return (False, False, False, 0, job.ticket)
        return (True, job.alone, not job.restarted, -job.expected_tokens, job.ticket)
