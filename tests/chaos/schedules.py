"""Schedules: what is read, where, and what goes wrong when; everything follows from a seed."""

import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from tests.chaos.corpora import CORPORA

LEADS = (
    "driver_kill",
    "worker_kill",
    "decoder_kill",
    "second_driver",
    "disk_full",
    "driver_kill",
    "s3_faults",
    "node_kill",
    "clock_jump",
    "worker_kill",
    "pause",
    "driver_kill",
    "store_full",
    "decoder_kill",
    "node_cut",
    "s3_faults",
    "driver_kill",
    "raylet_kill",
    "second_driver",
    "disk_full",
)
"""The main fault of each schedule, one after the other: any twenty in a row have every kind."""

KINDS = tuple(dict.fromkeys(LEADS))
NEEDS_ROOT = ("disk_full", "store_full", "node_kill", "node_cut")
NEEDS_RAY = ("worker_kill", "raylet_kill", "store_full")
NEEDS_CLUSTER = ("node_kill", "node_cut")
WHOLE_CALL = ("disk_full", "store_full", "s3_faults")
"""Faults that last from the beginning of a call to its end."""

EXTRAS = ("driver_kill", "worker_kill", "decoder_kill", "pause")
ENDS_WORKERS = ("worker_kill", "raylet_kill", "node_kill", "node_cut")
MOST_WORKER_DEATHS = 2
"""A record whose worker died three times is quarantined, and rightly so."""

Venue = Literal["loop", "ray", "cluster"]
LIKELY_SECONDS = {"layers": 4.5, "mixed": 9.0, "captions": 9.0, "ignored-layers": 8.0}
"""What a call over a corpus takes in a plain loop."""

RAY_SECONDS = 6.0
"""What Ray adds to it."""

LATER = 0.6
"""How much of that time a call takes whose run is half done."""

HITS_PROCESSES = ("worker_kill", "raylet_kill", "pause", "node_kill", "node_cut")
"""They wait until there is something to hit, so they may be due early."""

EARLY, EARLIEST = 0.55, 0.3
"""The part of a call in which those are due, and the part in which the files are decoded."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: one of `KINDS`.
        trigger: `start` of the call, `seconds` after it, `commits` that the call has seen, or `publish`, the first file
            that it publishes.
        amount: of seconds or commits.
        delay_seconds: time from the trigger to the fault.
        choice: in [0, 1): which of several victims, or how bad.
        length_seconds: of a fault that passes.
    """

    kind: str
    trigger: Literal["start", "seconds", "commits", "publish"]
    amount: float
    delay_seconds: float
    choice: float
    length_seconds: float

    def __str__(self) -> str:
        moment = self.trigger if self.trigger in ("start", "publish") else f"{self.trigger} {self.amount:g}"
        return f"{self.kind}@{moment}"


@dataclass(frozen=True)
class Schedule:
    """One run, and what goes wrong in its first calls; the calls after them are left in peace."""

    seed: int
    corpus: str
    venue: Venue
    on_s3: bool
    calls: tuple[tuple[Fault, ...], ...]

    def __str__(self) -> str:
        calls = " | ".join(", ".join(map(str, faults)) for faults in self.calls)
        return f"{self.corpus} {self.venue} {'s3' if self.on_s3 else 'folder'}: {calls}"


def draw(seed: int, kinds: Collection[str] = KINDS) -> Schedule:
    """Return the schedule of `seed`, with main faults of `kinds` only."""
    random_numbers = random.Random(f"chaos {seed}")
    leads = [kind for kind in LEADS if kind in kinds]
    lead = leads[seed % len(leads)]
    venue = _venue(random_numbers, lead)
    corpus = random_numbers.choice(sorted(CORPORA))
    on_s3 = lead == "s3_faults" or (lead != "disk_full" and random_numbers.random() < 0.2)
    extras = [kind for kind in EXTRAS if kind != "worker_kill" or venue != "loop"]
    calls = []
    deaths = 0
    for number in range(random_numbers.choice((1, 1, 1, 2, 2, 3))):
        found = [lead] if number == 0 or random_numbers.random() < 0.3 else [random_numbers.choice(extras)]
        if random_numbers.random() < 0.3:
            found.append(random_numbers.choice(extras))
        faults = []
        for kind in found:
            deaths += kind in ENDS_WORKERS
            if kind not in ENDS_WORKERS or deaths <= MOST_WORKER_DEATHS:
                seconds = LIKELY_SECONDS[corpus] + (0.0 if venue == "loop" else RAY_SECONDS)
                faults.append(_fault(random_numbers, kind, seconds if number == 0 else LATER * seconds))
        if faults:
            calls.append(tuple(faults))
    return Schedule(seed=seed, corpus=corpus, venue=venue, on_s3=on_s3, calls=tuple(calls))


def _venue(random_numbers: random.Random, lead: str) -> Venue:
    if lead in NEEDS_CLUSTER:
        return "cluster"
    if lead in NEEDS_RAY:
        return "ray"
    return "loop" if random_numbers.random() < 0.55 else "ray"


def _fault(random_numbers: random.Random, kind: str, seconds: float) -> Fault:
    trigger: Literal["start", "seconds", "commits", "publish"] = "start"
    amount = 0.0
    if kind not in WHOLE_CALL:
        dice = 1.0 if kind == "decoder_kill" else random_numbers.random()
        trigger = "publish" if dice < 0.15 and kind == "driver_kill" else "commits" if dice < 0.45 else "seconds"
        part = EARLIEST if kind == "decoder_kill" else EARLY if kind in HITS_PROCESSES else 1.0
        amount = random_numbers.uniform(0.3, part * seconds)
        if trigger == "commits":
            amount = 1 if kind in HITS_PROCESSES else random_numbers.choice((1, 1, 2))
    return Fault(
        kind=kind,
        trigger=trigger,
        amount=round(amount, 2),
        delay_seconds=round(random_numbers.uniform(0, 0.3), 3),
        choice=random_numbers.random(),
        length_seconds=round(random_numbers.uniform(0.5, 6.0), 2),
    )
