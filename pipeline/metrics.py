"""Rows and seconds of each step, counted where the work is done and added up in one place."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

METER_INTERVAL_SECONDS = 1.0


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


class Meter:
    """Counts by step name; safe to share between threads. Runs in the driver, or as a small Ray actor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, StepCount] = {}

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
