"""Where a flow runs: on Ray, started only when there is something to do, or as a plain loop."""

import math
import socket
from collections.abc import Hashable, Iterator
from typing import Any, Protocol

import pyarrow as pa

from pipeline import local
from pipeline.last_words import LoneWitness
from pipeline.metrics import Meter
from pipeline.shared import LocalShared, Shared
from pipeline.spec import RunSpec
from pipeline.step import Chain, Flow
from pipeline.watchdog import Pool, Pulses, unplaced, waits_for
from schemas.errors import (
    ConfigError,
    ContractError,
    PagereelError,
    ServiceLostError,
    TransientError,
    WorkersBrokenError,
)

ADDRESS_TIMEOUT_SECONDS = 3.0

FINAL: dict[str, type[PagereelError]] = {
    "ConfigError": ConfigError,
    "ContractError": ContractError,
    "ServiceLostError": ServiceLostError,
    "WorkersBrokenError": WorkersBrokenError,
    "WorkerLostError": WorkersBrokenError,
}
"""What no further attempt would change, by the name of what a worker raised. A worker that is lost ends its process; as
an exception that comes only from one that cannot be built, as where the model fails on its first small request."""


def check_address(address: str) -> None:
    """Refuse the address of a cluster at which nothing listens: Ray itself would try for minutes.

    Raises:
        ConfigError: nobody listens there.
    """
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if not separator or not port.isdigit():
        if address != "auto":
            raise ConfigError(f"cluster address {address!r} is neither host:port nor auto")
        return
    try:
        socket.create_connection((host, int(port)), timeout=ADDRESS_TIMEOUT_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster answers at {address!r}: {error}") from error


class Executor(Protocol):
    """Runs flows, one after the other.

    Attributes:
        worker_count: how many operators can work at once.
        patience_seconds: time without a sign after which the flow that runs is held to be stuck.
    """

    worker_count: int
    patience_seconds: float

    def start(self) -> list[str]:
        """Take what it needs, and return what a person should know of it; calling it again does nothing."""

    def hold(self, table: pa.Table) -> Any:
        """Return a small handle to `table`, which leaves the driver's memory where it can."""

    def run(self, flow: Flow, inputs: dict[str, list[Any]], strikes: Shared | None = None) -> Iterator[pa.Table]:
        """Yield what the last step returns for the held tables of each head.

        Args:
            flow: heads and trunk.
            inputs: tables that `hold` holds, by head.
            strikes: a shared `pipeline.strikes.Strikes` that counts what ends workers; None: nobody does.
        """

    def steps(self) -> dict[str, dict[str, Any]]:
        """Return the counts of each step so far."""

    def signs(self) -> Hashable:
        """Return what changes as long as workers get on, also inside a batch.

        Raises:
            GoneError: they are out of reach for good.
            Exception: they cannot be reached now.
        """

    def waits_for(self) -> str:
        """Return in words where the flow stands."""

    def unplaced(self) -> str | None:
        """Return in words which workers of the flow nobody has started, None where all are there."""

    def gpu_count(self) -> int:
        """Return the GPUs there are."""

    def share(self, kind: type[Any], *arguments: Any) -> Shared:
        """Build an object of `kind` that every worker of a flow reaches."""

    def close(self) -> None:
        """Give everything back."""


class LocalExecutor:
    """A plain loop in this process.

    Args:
        run_uri: the run, of which a fault that ends this process is remembered.
    """

    worker_count = 1
    patience_seconds = math.inf

    def __init__(self, run_uri: str = "") -> None:
        self._run_uri = run_uri
        self._meter = Meter()
        self._chains: list[Chain] = []

    def start(self) -> list[str]:
        """Nothing to start."""
        return []

    def hold(self, table: pa.Table) -> pa.Table:
        """Return the table itself."""
        return table

    def run(self, flow: Flow, inputs: dict[str, list[Any]], strikes: Shared | None = None) -> Iterator[pa.Table]:
        """Yield what the last step returns."""
        self.patience_seconds = flow.no_progress_seconds
        self._chains = []
        if strikes is None:
            yield from local.run_flow(flow, dict(inputs), self._meter, self._chains)
            return
        witness = LoneWitness(strikes, self._run_uri)
        with witness.listening():
            yield from local.run_flow(flow, dict(inputs), self._meter, self._chains, witness)

    def steps(self) -> dict[str, dict[str, Any]]:
        """Return the counts so far."""
        return self._meter.snapshot()

    def signs(self) -> Hashable:
        """Return what the operators have done."""
        return tuple(chain.work_done() for chain in self._chains)

    def waits_for(self) -> str:
        """Return what is in the hands of which operator."""
        held = [f"{name} has {rows} rows" for chain in self._chains for name, rows in chain.inside().items() if rows]
        return f"in the plain loop, {', '.join(held) or 'no operator has any rows'}"

    def unplaced(self) -> str | None:
        """Return None: there is nothing to wait for."""
        return None

    def gpu_count(self) -> int:
        """Return 1: a plain loop has one worker, which takes the device it is told to."""
        return 1

    def share(self, kind: type[Any], *arguments: Any) -> Shared:
        """Build the object in this process."""
        return LocalShared(kind(*arguments))

    def close(self) -> None:
        """Nothing to give back."""


class RayExecutor:
    """Ray Data; Ray itself is imported and started at the first use, which costs seconds."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._meter: Any = None
        self._lifelines: Any = None
        self._last_steps: dict[str, dict[str, Any]] = {}
        self._started = False
        self._pools: list[Pool] = []
        self.worker_count = 1
        self.patience_seconds = math.inf

    def start(self) -> list[str]:
        """Start or join Ray, and return what is missing in a cluster that was joined.

        Raises:
            ConfigError: no cluster answers, or Ray does not start here.
        """
        if self._started:
            return []
        from pipeline import cluster, connect

        spec = self._spec
        cluster.start_ray(
            cluster.Cluster(
                address=spec.address,
                gpus=spec.gpus,
                object_store_bytes=spec.object_store_mb * 2**20 if spec.object_store_mb else None,
            )
        )
        self._lifelines = cluster.lifelines(is_ours=not spec.address)
        self._meter = connect.RayMeter()
        self.worker_count = spec.workers or max(1, int(cluster.cluster_cpus()))
        self._started = True
        unset = cluster.unset_on_nodes() if spec.address else {}
        if not unset:
            return []
        told = ", ".join(f"{name}={cluster.RAYLET_SETTINGS[name]} (not set on {unset[name]})" for name in unset)
        return [f"nodes of the cluster should be started with {told}: a worker that lacks memory is ended too late"]

    def hold(self, table: pa.Table) -> Any:
        """Return a reference to the table in the object store.

        Raises:
            TransientError: Ray cannot take it.
        """
        from pipeline import connect

        return connect.hold(table)

    def run(self, flow: Flow, inputs: dict[str, list[Any]], strikes: Shared | None = None) -> Iterator[pa.Table]:
        """Yield what the last step returns.

        Raises:
            ConfigError: a worker cannot be built as the spec wants it.
            ServiceLostError: a server that rows wait for is gone.
            WorkersBrokenError: workers die whatever they are given, or fail as soon as they are built.
            TransientError: Ray gave up; another attempt over what is still owed may succeed.
        """
        from pipeline import connect

        self.patience_seconds = flow.no_progress_seconds
        self._pools = connect.pools_of(flow, [name for name, held in inputs.items() if held])
        try:
            yield from connect.run_flow(flow, inputs, self._meter, strikes)
        except connect.RAY_ERRORS as error:
            cause = connect.root_cause(error)
            name, _, message = cause.partition(": ")
            final = FINAL.get(name.rpartition(".")[2])
            raise (final(message) if final else TransientError(cause)) from error

    def steps(self) -> dict[str, dict[str, Any]]:
        """Return the counts so far; the last known ones where Ray cannot be asked, or is gone."""
        meter = self._meter
        if meter is not None:
            self._last_steps = meter.snapshot() or self._last_steps
        return self._last_steps

    def signs(self) -> Hashable:
        """Return what the workers have done; None before Ray is there, and while it is left."""
        meter = self._meter
        if meter is None:
            return None
        try:
            self._lifelines.check()
        except OSError:
            if self._meter is None:
                return None
            raise
        pulses: Pulses = meter.pulses()
        return frozenset((worker, pulse.is_built, pulse.work) for worker, (_, pulse) in pulses.items())

    def waits_for(self) -> str:
        """Return in words where the flow stands."""
        from pipeline import cluster

        return waits_for(self._pools, self.steps(), self._meter.pulses(), cluster.cluster_room())

    def unplaced(self) -> str | None:
        """Return in words which workers the cluster has not started."""
        from pipeline import cluster

        return unplaced(self._pools, self._meter.pulses(), cluster.cluster_room())

    def gpu_count(self) -> int:
        """Return the GPUs of the cluster."""
        from pipeline import cluster

        return cluster.cluster_gpus()

    def share(self, kind: type[Any], *arguments: Any) -> Shared:
        """Build the object in a small actor of its own; it is built again, and remembers nothing, where that dies."""
        from pipeline import connect

        return connect.RayShared(kind, *arguments)

    def close(self) -> None:
        """Leave Ray."""
        if self._started:
            from pipeline import cluster

            # First, so that nobody takes the end of Ray for its loss.
            self._meter = None
            cluster.stop_ray()
            self._started = False
