"""A step of a flow: an operator, its options, and what its workers need."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from operators.base import Operator, OperatorConfig, require_columns
from pipeline.quarantine import watched
from pipeline.witness import Witness
from schemas.errors import ContractError
from schemas.source import UNIT

Report = Callable[[str, int, int, float], None]
"""Called with operator name, rows in, rows out, seconds, after each batch."""


@dataclass(frozen=True)
class Step:
    """One operator of a flow and the workers that run it.

    Attributes:
        operator: class to build, once a worker.
        config: its options.
        cpus: logical CPUs a worker takes.
        gpus: GPUs a worker takes.
        workers: fewest and most workers.
        rows_per_batch: rows handed to the operator at a time; None leaves batches as they come.
        same_worker: True runs this step in the workers of the step above, so that rows never leave the process.
        memory_bytes: memory a worker is expected to use; 0 leaves it undeclared.
        calls_at_once: batches that a worker takes at the same time, each in a thread of its own.
    """

    operator: type[Operator[Any]]
    config: OperatorConfig
    cpus: float = 1.0
    gpus: float = 0.0
    workers: tuple[int, int] = (1, 1)
    rows_per_batch: int | None = None
    same_worker: bool = False
    memory_bytes: int = 0
    calls_at_once: int = 1

    @property
    def name(self) -> str:
        """The operator's class name: what displays and metrics call the step."""
        return self.operator.__name__


@dataclass(frozen=True)
class Flow:
    """Heads that start from units of one kind each, and the trunk they share.

    Attributes:
        heads: steps for units, keyed by head name (`documents`, `videos`).
        trunk: steps for the records that every head produces.
        incoming: schema of what the heads start from.
        no_progress_seconds: time without a sign of life of any worker after which the flow is held to be stuck.
    """

    heads: dict[str, list[Step]]
    trunk: list[Step] = field(default_factory=list)
    incoming: pa.Schema = UNIT
    no_progress_seconds: int = 3600


def workers_of(steps: Sequence[Step]) -> list[list[Step]]:
    """Group steps that share workers: each group starts at a step that has workers of its own.

    Raises:
        ContractError: the first step asks to share the workers of a step above it.
    """
    groups: list[list[Step]] = []
    for step in steps:
        if not step.same_worker:
            groups.append([step])
        elif groups:
            groups[-1].append(step)
        else:
            raise ContractError(f"{step.name} is the first step and cannot share workers")
    return groups


def check_contract(steps: Sequence[Step], incoming: pa.Schema) -> pa.Schema:
    """Return the schema after `steps`, or raise before any worker starts.

    Raises:
        ContractError: a step reads a column that nothing above it produces.
    """
    schema = incoming
    for step in steps:
        require_columns(schema.empty_table(), step.operator.reads, step.name)
        kept = [] if step.operator.replaces else [f for f in schema if f.name not in step.operator.adds.names]
        schema = pa.schema([*kept, *step.operator.adds])
    return schema


class Chain:
    """Operators of one worker, run one after the other on each batch.

    Args:
        steps: the group that shares the worker.
        report: receives rows and seconds of each operator; excludes the time of the operators below it.
        witness: counts what ends the worker; None where nobody does.
    """

    def __init__(self, steps: Sequence[Step], report: Report, witness: Witness | None = None) -> None:
        self.names = [step.name for step in steps]
        self.operators = [step.operator(step.config) for step in steps]
        self.guards = [watched(operator, witness) for operator in self.operators]
        self.report = report
        self._lock = threading.Lock()
        self._made = 0
        self._inside = dict.fromkeys(self.names, 0)

    def work_done(self) -> int:
        """Return a count that grows as long as the chain gets on."""
        return self._made + sum(operator.work_done() for operator in self.operators)

    def inside(self) -> dict[str, int]:
        """Return the rows that each operator has in hand."""
        with self._lock:
            return dict(self._inside)

    def run(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield the tables that come out of the last operator for `table`."""
        yield from self._run_from(0, table)

    def _run_from(self, position: int, table: pa.Table) -> Iterator[pa.Table]:
        if position == len(self.guards):
            yield table
            return
        name = self.names[position]
        rows_out, seconds, started = 0, 0.0, time.perf_counter()
        self._hold(name, table.num_rows)
        try:
            for produced in self.guards[position].run(table):
                seconds += time.perf_counter() - started
                rows_out += produced.num_rows
                self._made += 1
                yield from self._run_from(position + 1, produced)
                started = time.perf_counter()
        finally:
            self._hold(name, -table.num_rows)
        seconds += time.perf_counter() - started
        self.report(name, table.num_rows, rows_out, seconds)

    def _hold(self, name: str, rows: int) -> None:
        with self._lock:
            self._inside[name] += rows

    def close(self) -> None:
        """Close every operator."""
        for operator in self.operators:
            operator.close()
