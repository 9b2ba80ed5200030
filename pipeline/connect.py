"""Flows on Ray Data: the contract check, then the only `map_batches` call of the project.

Every group of steps that shares workers becomes one actor pool. The settings follow what Ray 2.60 was seen to do:
its defaults retry a poisoned task for ever, and `max_errored_blocks` drops innocent rows of a block, so retries are
finite and errored blocks stay at zero; a failed attempt ends with an exception, and the run starts another over what
is still owed.
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.data.exceptions import ExecutionTimeoutError, SystemException, UserCodeException

from pipeline.cluster import steady_cpus
from pipeline.metrics import Meter
from pipeline.orphans import end_with_parent
from pipeline.shared import Shared
from pipeline.step import Flow, Step, check_contract, workers_of
from pipeline.watchdog import Pool, Pulses
from pipeline.worker import Worker, code_digest
from schemas.errors import TransientError, one_line

logger = logging.getLogger(__name__)

BLOCK_BYTES = 32 * 2**20
"""Largest block between steps: little to redo on a retry, and an early first row."""

TASK_RETRIES = 32
"""Deaths of its worker that a task outlives. Each record that kills costs three, two of them shared with its
neighbours, and so does each of another batch that is with the same worker; Ray also charges those that only wait there.
It is finite so that what no strike explains ends the attempt, and the next goes on with the strikes of this one."""

BLOCK_PATIENCE_SECONDS = 24 * 3600
"""Ray sees only blocks that are finished, and one of a large model may take hours on a CPU. `pipeline/watch.py` looks
inside, and ends what hangs long before."""

SHARED_SECONDS = 60.0
"""Time for one answer of a shared object."""

NAMED_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt): \S")

RAY_ERRORS = (ray.exceptions.RayError, UserCodeException, SystemException, ExecutionTimeoutError)
"""What ends an attempt: a dead worker that did not come back, or an exception in a worker that no guard could take."""


def configure_data() -> None:
    """Set the Ray Data options that the flow relies on."""
    context = DataContext.get_current()
    context.target_max_block_size = BLOCK_BYTES
    context.max_errored_blocks = 0
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = BLOCK_PATIENCE_SECONDS
    context.actor_init_retry_on_errors = False
    context.max_consecutive_actor_init_deaths = 0
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)


def hold(table: pa.Table) -> Any:
    """Return a reference to `table` in the object store.

    Raises:
        TransientError: Ray cannot take it.
    """
    try:
        return ray.put(table)
    except ray.exceptions.RayError as error:
        raise TransientError(f"Ray cannot take what is to be done: {one_line(error)}") from error


def root_cause(error: BaseException) -> str:
    """Return in one line what went wrong inside a Ray error.

    Ray wraps the worker's exception several times over, and prints its traceback into messages; the last line that
    names an exception is the one that a person can act on.
    """
    if isinstance(error, ExecutionTimeoutError):
        return one_line(error)
    named: list[str] = []
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        named += [line.strip() for line in str(found).splitlines() if NAMED_EXCEPTION.match(line.strip())]
        waiting += [found.__context__, found.__cause__, getattr(found, "cause", None)]
    lines = named or [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].strip()[:500]


def run_flow(
    flow: Flow, inputs: dict[str, list[Any]], meter: "RayMeter", strikes: Shared | None = None
) -> Iterator[pa.Table]:
    """Run `flow` over held tables on Ray and yield what its last step returns.

    Args:
        flow: heads and trunk.
        inputs: references made by `hold`, for each head; each becomes one block, so one task of the first step.
        meter: receives the counts of every step.
        strikes: a `pipeline.strikes.Strikes` that counts what ends workers; None: nobody does.

    Yields:
        Tables of the last step, as they come.

    Raises:
        ContractError: the steps do not fit together, before any worker starts.
    """
    configure_data()
    used = [name for name, held in inputs.items() if held]
    for name in used:
        check_contract([*flow.heads[name], *flow.trunk], flow.incoming)
    if not used:
        return
    meter.forget_workers()
    scale = cpu_scale(flow, used, steady_cpus())
    shared = (meter.handle, code_digest(), strikes)
    heads = [_add_steps(ray.data.from_arrow_refs(inputs[name]), flow.heads[name], shared, scale) for name in used]
    records = heads[0].union(*heads[1:]) if len(heads) > 1 else heads[0]
    results = _add_steps(records, flow.trunk, shared, scale)
    yield from results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)


def cpu_scale(flow: Flow, heads: Sequence[str], cpus: float) -> float:
    """Return the factor on declared CPUs with which every pool gets its first worker.

    Pools that together ask for more CPUs than there are wait for each other for ever (seen), so on a small machine
    every worker declares less than it would like. In a small cluster too: the only worker of the first step was on a
    node that was lost, and there was no room for another on the nodes that were left (seen).

    Args:
        flow: what runs.
        heads: the heads of it that are used.
        cpus: that there are, whatever node is lost.
    """
    wanted = sum(group[0].cpus * group[0].workers[0] for group in _groups(flow, heads))
    return min(1.0, 0.95 * cpus / wanted) if wanted else 1.0


def pools_of(flow: Flow, heads: Sequence[str]) -> list[Pool]:
    """Return the pools of workers that a flow runs in, as they are asked for on this cluster."""
    scale = cpu_scale(flow, heads, steady_cpus())
    return [
        Pool(tuple(step.name for step in group), group[0].workers[0], round(group[0].cpus * scale, 3), group[0].gpus)
        for group in _groups(flow, heads)
    ]


def _groups(flow: Flow, heads: Sequence[str]) -> list[list[Step]]:
    return [group for name in heads for group in workers_of(flow.heads[name])] + workers_of(flow.trunk)


def _add_steps(dataset: Any, steps: Sequence[Step], shared: tuple[Any, ...], scale: float) -> Any:
    for group in workers_of(steps):
        first = group[0]
        fewest, most = first.workers
        options: dict[str, Any] = {"memory": first.memory_bytes} if first.memory_bytes else {}
        dataset = _map_batches(
            dataset,
            Worker,
            fn_constructor_args=(group, *shared),
            batch_format="pyarrow",
            batch_size=first.rows_per_batch,
            zero_copy_batch=True,
            compute=ActorPoolStrategy(
                min_size=fewest,
                max_size=max(fewest, most),
                max_concurrent_calls_per_actor=first.calls_at_once,
                enable_true_multi_threading=first.calls_at_once > 1,
            ),
            num_cpus=round(first.cpus * scale, 3),
            num_gpus=first.gpus,
            # For ever: a worker that may not come back any more leaves Ray Data waiting for it (seen).
            max_restarts=-1,
            max_task_retries=TASK_RETRIES,
            **options,
        )
    return dataset


def _map_batches(dataset: Any, worker: type["Worker"], **options: Any) -> Any:
    with warnings.catch_warnings():
        # 2.60 has no named parameter for max_task_retries yet, and warns of the only way to set it.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        return dataset.map_batches(worker, **options)


def _hosted(kind: type[Any]) -> type[Any]:
    """Return a class like `kind` whose objects, built in a process of their own, end with its node."""

    class Hosted(kind):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            end_with_parent()
            super().__init__(*arguments)

    Hosted.__name__ = Hosted.__qualname__ = kind.__name__
    return Hosted


class RayMeter:
    """A `Meter` in a small actor of its own, read from the driver."""

    def __init__(self) -> None:
        self.handle = ray.remote(_hosted(Meter)).options(num_cpus=0, max_restarts=-1).remote()

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Return the counts so far; nothing where the actor cannot be reached, since no run should end for a count."""
        try:
            result: dict[str, dict[str, Any]] = ray.get(self.handle.snapshot.remote(), timeout=30)
        except ray.exceptions.RayError as error:
            logger.debug("no counts: %r", error)
            return {}
        return result

    def pulses(self) -> Pulses:
        """Return the last sign of life of each worker, and its age in seconds."""
        result: Pulses = ray.get(self.handle.pulses.remote(), timeout=30)
        return result

    def forget_workers(self) -> None:
        """Drop the signs of life of workers that are gone."""
        self.handle.forget_workers.remote()


class RayShared:
    """An object in a small actor of its own.

    Args:
        kind: its class.
        arguments: what it is built with.
    """

    def __init__(self, kind: type[Any], *arguments: Any) -> None:
        self._handle = ray.remote(_hosted(kind)).options(num_cpus=0, max_restarts=-1).remote(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        """Return what the object's method returns.

        Raises:
            TransientError: its actor cannot be reached now.
        """
        try:
            return ray.get(getattr(self._handle, method).remote(*arguments), timeout=SHARED_SECONDS)
        except ray.exceptions.RayTaskError:
            # Raised by the object itself.
            raise
        except ray.exceptions.RayError as error:
            raise TransientError(f"a service of this run cannot be reached: {one_line(error)}") from error

    def close(self) -> None:
        """End the actor; a cluster that is gone has ended it already."""
        with contextlib.suppress(*RAY_ERRORS, RuntimeError):
            ray.kill(self._handle)
