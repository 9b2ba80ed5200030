"""What Ray builds in each actor of a flow: operators, their counts, and signs of life."""

import functools
import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

import pipeline
from pipeline.cluster import living_nodes
from pipeline.last_words import WordFile
from pipeline.metrics import METER_INTERVAL_SECONDS, PULSE_SECONDS, Pulse, StepCount
from pipeline.orphans import end_with_parent
from pipeline.shared import Shared
from pipeline.step import Chain, Step
from pipeline.witness import Witness
from schemas.errors import ContractError, WorkerLostError, one_line

logger = logging.getLogger(__name__)


class Worker:
    """The callable that Ray builds in each actor: a chain of operators, its counts, and who counts its deaths."""

    def __init__(self, steps: Sequence[Step], meter: Any, driver_code: str, strikes: Shared | None) -> None:
        end_with_parent()
        if code_digest() != driver_code:
            raise ContractError("this worker runs other pagereel code than the driver: update the cluster's image")
        context = ray.get_runtime_context()
        worker = context.get_actor_id() or str(os.getpid())
        self._chain: Chain | None = None
        self._names = tuple(step.name for step in steps)
        self._node = context.get_node_id()
        self._reporter = Reporter(meter, worker, self._pulse)
        self._words = WordFile(worker)
        witness = None
        if strikes is not None:
            witness = Witness(strikes, worker, f"{os.getpid()}-{time.time_ns()}", self._node, self._names[0])
            witness.arrive(living_nodes(), self._words.of_predecessor())
        self._words.open()
        self._chain = Chain(steps, self._reporter.add, witness)
        if witness is not None:
            witness.built()
        self._reporter.send_pulse()

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield the tables that the chain makes of one batch."""
        assert self._chain is not None
        try:
            yield from self._chain.run(table)
        except WorkerLostError as error:
            # A sticky CUDA fault poisons the process: Ray replaces the actor and runs the batch again.
            logger.exception("this worker is unusable and ends")
            self._words.say(one_line(error))
            sys.stderr.flush()
            os._exit(17)
        finally:
            self._reporter.flush()

    def _pulse(self) -> Pulse:
        chain = self._chain
        return Pulse(
            self._names,
            self._node,
            is_built=chain is not None,
            work=chain.work_done() if chain else 0,
            inside=chain.inside() if chain else {},
        )


class Reporter:
    """Sends a worker's counts to the meter, at most once a second, and signs of life from a thread of its own.

    Args:
        meter: the actor that takes them.
        worker: whose.
        pulse: makes the next sign of life.
    """

    def __init__(self, meter: Any, worker: str, pulse: Callable[[], Pulse]) -> None:
        self._meter = meter
        self._worker = worker
        self._pulse = pulse
        self._lock = threading.Lock()
        self._counts: dict[str, StepCount] = {}
        self._sent = 0.0
        self.send_pulse()
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def send_pulse(self) -> None:
        """Send a sign of life now."""
        self._meter.pulse.remote(self._worker, self._pulse())

    def _beat(self) -> None:
        while True:
            time.sleep(PULSE_SECONDS)
            try:
                self.send_pulse()
            except Exception as error:  # noqa: BLE001 - a thread that ended here would look like a worker that hangs
                logger.debug("no sign of life this time: %r", error)

    def add(self, name: str, rows_in: int, rows_out: int, seconds: float) -> None:
        """Count one call of a step."""
        with self._lock:
            self._counts.setdefault(name, StepCount()).add(rows_in, rows_out, seconds)
        if time.monotonic() - self._sent > METER_INTERVAL_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what has been counted; a lost report costs a number on a display, never a row."""
        with self._lock:
            counts, self._counts = self._counts, {}
            self._sent = time.monotonic()
        if counts:
            self._meter.merge.remote(counts)


@functools.cache
def code_digest() -> str:
    """Return a hash of the source of our packages: workers that run other code than the driver are refused."""
    hasher = hashlib.sha256()
    root = Path(pipeline.__file__ or "").parent.parent
    for package in ("schemas", "operators", "pipeline"):
        for path in sorted((root / package).rglob("*.py")):
            hasher.update(path.relative_to(root).as_posix().encode())
            hasher.update(path.read_bytes())
    return hasher.hexdigest()
