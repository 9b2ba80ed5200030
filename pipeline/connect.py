"""Flows on Ray Data: the contract check, then the only `map_batches` call of the project.

Every group of steps that shares workers becomes one actor pool. The settings follow what Ray 2.60 was seen to do:
its defaults retry a poisoned task for ever, and `max_errored_blocks` drops innocent rows of a block, so retries are
finite and errored blocks stay at zero; a failed attempt ends with an exception, and the run starts another over what
is still owed.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.data.exceptions import ExecutionTimeoutError, SystemException, UserCodeException

import pipeline
from pipeline.metrics import METER_INTERVAL_SECONDS, Meter, StepCount
from pipeline.step import Chain, Flow, Step, check_contract, workers_of
from schemas.errors import ConfigError, ContractError, TransientError, WorkerLostError, one_line

logger = logging.getLogger(__name__)

BLOCK_BYTES = 32 * 2**20
"""Largest block between steps: little to redo on a retry, and an early first row."""

TASK_RETRIES = 3

SHARED_SECONDS = 60.0
"""Time for one answer of a shared object."""

NAMED_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt): \S")

RAY_ERRORS = (ray.exceptions.RayError, UserCodeException, SystemException, ExecutionTimeoutError)
"""What ends an attempt: a dead worker that did not come back, or an exception in a worker that no guard could take."""


@dataclass(frozen=True)
class Cluster:
    """Where a flow runs.

    Attributes:
        address: a Ray cluster, or None for one of our own on this machine.
        cpus: logical CPUs of our own Ray; None takes the machine's, at least two.
        gpus: GPUs of our own Ray; None lets Ray find them.
        object_store_bytes: size of our own Ray's object store; None lets Ray choose.
    """

    address: str | None = None
    cpus: int | None = None
    gpus: int | None = None
    object_store_bytes: int | None = None


def start_ray(cluster: Cluster) -> None:
    """Connect to a cluster, or start a quiet Ray on this machine.

    Raises:
        ConfigError: no cluster answers at the address.
    """
    quiet_ray()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address:
        options["address"] = cluster.address
    else:
        # "local", or RAY_ADDRESS or a Ray that somebody started on this machine would be joined instead. A dashboard
        # costs seconds of start-up that a batch run never uses.
        options |= {"address": "local", "include_dashboard": False}
        options["num_cpus"] = cluster.cpus or max(2, os.cpu_count() or 1)
        if cluster.gpus is not None:
            options["num_gpus"] = cluster.gpus
        if cluster.object_store_bytes:
            options["object_store_memory"] = cluster.object_store_bytes
    ours = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except SystemExit as error:
        # Ray's own answer to SIGTERM, which it takes over while it starts.
        raise KeyboardInterrupt from error
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        where = cluster.address or "this machine"
        raise ConfigError(f"Ray does not start on {where}: {one_line(error)}") from error
    if threading.current_thread() is threading.main_thread():
        # Ray would go on to end the process with status 15 and no word.
        signal.signal(signal.SIGTERM, ours)


def stop_ray() -> None:
    """Leave the cluster; a Ray that this process started ends."""
    ray.shutdown()


def quiet_ray() -> None:
    """Keep Ray's own chatter out of the terminal; it stays in Ray's session logs."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    os.environ.setdefault("RAY_task_oom_retries", "3")
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def configure_data(no_progress_seconds: int) -> None:
    """Set the Ray Data options that the flow relies on."""
    context = DataContext.get_current()
    context.target_max_block_size = BLOCK_BYTES
    context.max_errored_blocks = 0
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = no_progress_seconds
    context.actor_init_retry_on_errors = False
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)


def hold(table: pa.Table) -> Any:
    """Return a reference to `table` in the object store."""
    return ray.put(table)


def cluster_cpus() -> float:
    """Return the logical CPUs of the cluster."""
    return float(ray.cluster_resources().get("CPU", 1))


def cluster_gpus() -> int:
    """Return the GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


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


def run_flow(flow: Flow, inputs: dict[str, list[Any]], meter: "RayMeter") -> Iterator[pa.Table]:
    """Run `flow` over held tables on Ray and yield what its last step returns.

    Args:
        flow: heads and trunk.
        inputs: references made by `hold`, for each head; each becomes one block, so one task of the first step.
        meter: receives the counts of every step.

    Yields:
        Tables of the last step, as they come.

    Raises:
        ContractError: the steps do not fit together, before any worker starts.
    """
    configure_data(flow.no_progress_seconds)
    used = [name for name, held in inputs.items() if held]
    for name in used:
        check_contract([*flow.heads[name], *flow.trunk], flow.incoming)
    if not used:
        return
    scale = cpu_scale(flow, used, cluster_cpus())
    heads = [_add_steps(ray.data.from_arrow_refs(inputs[name]), flow.heads[name], meter, scale) for name in used]
    records = heads[0].union(*heads[1:]) if len(heads) > 1 else heads[0]
    results = _add_steps(records, flow.trunk, meter, scale)
    yield from results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)


def cpu_scale(flow: Flow, heads: Sequence[str], cpus: float) -> float:
    """Return the factor on declared CPUs with which every pool gets its first worker.

    Pools that together ask for more CPUs than there are wait for each other for ever (seen), so on a small machine
    every worker declares less than it would like.
    """
    groups = [group for name in heads for group in workers_of(flow.heads[name])] + workers_of(flow.trunk)
    wanted = sum(group[0].cpus * group[0].workers[0] for group in groups)
    return min(1.0, 0.95 * cpus / wanted) if wanted else 1.0


def _add_steps(dataset: Any, steps: Sequence[Step], meter: "RayMeter", scale: float) -> Any:
    for group in workers_of(steps):
        first = group[0]
        fewest, most = first.workers
        options: dict[str, Any] = {"memory": first.memory_bytes} if first.memory_bytes else {}
        dataset = _map_batches(
            dataset,
            Worker,
            fn_constructor_args=(group, meter.handle, code_digest()),
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
            max_task_retries=TASK_RETRIES,
            **options,
        )
    return dataset


def _map_batches(dataset: Any, worker: type["Worker"], **options: Any) -> Any:
    with warnings.catch_warnings():
        # 2.60 has no named parameter for max_task_retries yet, and warns of the only way to set it.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        return dataset.map_batches(worker, **options)


class Worker:
    """The callable that Ray builds in each actor: a chain of operators and its counts."""

    def __init__(self, steps: Sequence[Step], meter: Any, driver_code: str) -> None:
        if code_digest() != driver_code:
            raise ContractError("this worker runs other pagereel code than the driver: update the cluster's image")
        self._reporter = Reporter(meter)
        self._chain = Chain(steps, self._reporter.add)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield the tables that the chain makes of one batch."""
        try:
            yield from self._chain.run(table)
        except WorkerLostError:
            # A sticky CUDA fault poisons the process: Ray replaces the actor and runs the batch again.
            logger.exception("this worker is unusable and ends")
            sys.stderr.flush()
            os._exit(17)
        finally:
            self._reporter.flush()


class Reporter:
    """Sends a worker's counts to the meter, at most once a second."""

    def __init__(self, meter: Any) -> None:
        self._meter = meter
        self._lock = threading.Lock()
        self._counts: dict[str, StepCount] = {}
        self._sent = 0.0

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


class RayMeter:
    """A `Meter` in a small actor of its own, read from the driver."""

    def __init__(self) -> None:
        self.handle = ray.remote(Meter).options(num_cpus=0, max_restarts=-1).remote()

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Return the counts so far."""
        result: dict[str, dict[str, Any]] = ray.get(self.handle.snapshot.remote(), timeout=30)
        return result


class RayShared:
    """An object in a small actor of its own.

    Args:
        kind: its class.
        arguments: what it is built with.
    """

    def __init__(self, kind: type[Any], *arguments: Any) -> None:
        self._handle = ray.remote(kind).options(num_cpus=0, max_restarts=-1).remote(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        """Return what the object's method returns.

        Raises:
            TransientError: its actor cannot be reached now.
        """
        try:
            return ray.get(getattr(self._handle, method).remote(*arguments), timeout=SHARED_SECONDS)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise TransientError(f"a service of this run cannot be reached: {one_line(error)}") from error

    def close(self) -> None:
        """End the actor; a cluster that is gone has ended it already."""
        with contextlib.suppress(*RAY_ERRORS, RuntimeError):
            ray.kill(self._handle)


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
