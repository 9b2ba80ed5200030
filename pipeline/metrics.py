"""Rows and seconds of each step, counted where the work is done and added up in one place; signs of life of workers."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

METER_INTERVAL_SECONDS = 1.0

PULSE_SECONDS = 10.0
"""Time between two signs of life of a worker."""


@dataclass
class StepCount:
    """What one step has done so far, over all its workers.

    Attributes:
        rows_in: rows handed to the operator.
        rows_out: rows it returned.
        seconds: seconds its workers spent inside it, added up.
        batches: calls.
    """

    rows_in: int = 0
    rows_out: int = 0
    seconds: float = 0.0
    batches: int = 0

    def add(self, rows_in: int, rows_out: int, seconds: float, batches: int = 1) -> None:
        """Add one call, or the sums of several."""
        self.rows_in += rows_in
        self.rows_out += rows_out
        self.seconds += seconds
        self.batches += batches


@dataclass(frozen=True)
class Pulse:
    """A sign of life of one worker.

    Attributes:
        steps: names of its operators.
        node: where it is.
        is_built: False while its operators are made.
        work: grows as long as it gets on, also inside a call.
        inside: rows that each operator has in hand.
    """

    steps: tuple[str, ...]
    node: str
    is_built: bool
    work: int
    inside: Mapping[str, int]


class Meter:
    """Counts by step name; safe to share between threads. Runs in the driver, or as a small Ray actor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, StepCount] = {}
        self._pulses: dict[str, tuple[float, Pulse]] = {}

    def add(self, name: str, rows_in: int, rows_out: int, seconds: float) -> None:
        """Add one call of a step."""
        with self._lock:
            self._counts.setdefault(name, StepCount()).add(rows_in, rows_out, seconds)

    def merge(self, counts: Mapping[str, StepCount]) -> None:
        """Add what a worker has counted since it last reported."""
        with self._lock:
            for name, count in counts.items():
                self._counts.setdefault(name, StepCount()).add(
                    count.rows_in, count.rows_out, count.seconds, count.batches
                )

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Return the counts as plain values."""
        with self._lock:
            return {name: dict(vars(count)) for name, count in self._counts.items()}

    def pulse(self, worker: str, pulse: Pulse) -> None:
        """Take a worker's sign of life."""
        with self._lock:
            self._pulses[worker] = (time.monotonic(), pulse)

    def pulses(self) -> dict[str, tuple[float, Pulse]]:
        """Return the last sign of life of each worker, and how many seconds old it is."""
        now = time.monotonic()
        with self._lock:
            return {worker: (now - at, pulse) for worker, (at, pulse) in self._pulses.items()}

    def forget_workers(self) -> None:
        """Drop the signs of life: other workers are about to start."""
        with self._lock:
            self._pulses.clear()
