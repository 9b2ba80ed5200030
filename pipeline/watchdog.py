"""When a flow is held to be stuck, and what it was waiting for."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pipeline.metrics import PULSE_SECONDS, Pulse

UNREACHABLE_SECONDS: Final = 300.0
"""Time without an answer of the cluster after which it is held to be gone; a head that is replaced is back by then."""

PLACING_SECONDS: Final = 60.0
"""Time after which a run says that it waits for workers that the cluster has no room for; it goes on waiting."""

SILENT_PULSES: Final = 6
"""Pulses that a worker may miss before it is called silent."""


class GoneError(OSError):
    """What the driver cannot do without is gone for good."""


class Stillness:
    """How long something has not changed."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._last: Hashable = None

    def seconds(self, sign: Hashable, now: float) -> float:
        """Return for how long `sign` has been what it is."""
        if sign != self._last:
            self._last, self._since = sign, now
        return now - self._since


@dataclass(frozen=True)
class Pool:
    """Workers that a flow needs.

    Attributes:
        steps: names of the operators of each worker.
        fewest: workers without which it cannot go on.
        cpus, gpus: what one takes.
    """

    steps: tuple[str, ...]
    fewest: int
    cpus: float
    gpus: float

    @property
    def name(self) -> str:
        """The name of its first step, by which people know it."""
        return self.steps[0]


@dataclass(frozen=True)
class Room:
    """What a cluster has, and how much of it nobody holds."""

    cpus: float
    free_cpus: float
    gpus: float
    free_gpus: float
    nodes: int


Pulses = Mapping[str, tuple[float, Pulse]]


def unplaced(pools: Sequence[Pool], pulses: Pulses, room: Room) -> str | None:
    """Return in words which workers the cluster has not started, None where all are there."""
    missing = []
    for pool in pools:
        alive = sum(pulse.steps == pool.steps for _, pulse in pulses.values())
        if alive < min(1, pool.fewest):
            missing.append(f"{pool.name} ({_asks(pool)}): {alive} of {pool.fewest} started")
    if not missing:
        return None
    return f"no room for a worker of {', of '.join(missing)}; {_told(room)}"


def waits_for(pools: Sequence[Pool], steps: Mapping[str, Mapping[str, Any]], pulses: Pulses, room: Room) -> str:
    """Return in words where a flow that does not get on stands.

    Args:
        pools: of the flow, in the order of its steps.
        steps: counts of each step so far.
        pulses: last signs of life of the workers, with their age in seconds.
        room: of the cluster.
    """
    missing = unplaced(pools, pulses, room)
    if missing:
        return f"it waits for workers that the cluster does not start: {missing}"
    unbuilt = sorted({pulse.steps[0] for _, pulse in pulses.values() if not pulse.is_built})
    told = [f"a worker of {name} is still being built" for name in unbuilt]
    for worker, (age, pulse) in pulses.items():
        silent = f", silent for {age:.0f} s" if age > SILENT_PULSES * PULSE_SECONDS else ""
        told += [f"{name} has {rows} rows in hand{silent} ({worker})" for name, rows in pulse.inside.items() if rows]
    counts = [f"{name} {count['rows_in']} rows in, {count['rows_out']} out" for name, count in steps.items()]
    where = "; ".join(told) or f"no worker has rows in hand; {_told(room)}"
    return f"{where} (so far: {', '.join(counts) or 'nothing'})"


def _asks(pool: Pool) -> str:
    return f"{pool.gpus:g} GPUs and {pool.cpus:g} CPUs" if pool.gpus else f"{pool.cpus:g} CPUs"


def _told(room: Room) -> str:
    gpus = f", {room.gpus:g} GPUs of which {room.free_gpus:g} free" if room.gpus else ", no GPU"
    nodes = f"{room.nodes} node" + ("s" if room.nodes != 1 else "")
    return f"the cluster has {nodes} with {room.cpus:g} CPUs of which {room.free_cpus:g} free{gpus}"
