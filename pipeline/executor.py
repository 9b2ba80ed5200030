"""Where a flow runs: on Ray, started only when there is something to do, or as a plain loop."""

import socket
from collections.abc import Iterator
from typing import Any, Protocol

import pyarrow as pa

from pipeline import local
from pipeline.metrics import Meter
from pipeline.shared import LocalShared, Shared
from pipeline.spec import RunSpec
from pipeline.step import Flow
from schemas.errors import ConfigError, ServiceLostError, TransientError

ADDRESS_TIMEOUT_SECONDS = 3.0


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
    """

    worker_count: int

    def start(self) -> None:
        """Take what it needs; calling it again does nothing."""

    def hold(self, table: pa.Table) -> Any:
        """Return a small handle to `table`, which leaves the driver's memory where it can."""

    def run(self, flow: Flow, inputs: dict[str, list[Any]]) -> Iterator[pa.Table]:
        """Yield what the last step returns for the held tables of each head."""

    def steps(self) -> dict[str, dict[str, Any]]:
        """Return the counts of each step so far."""

    def gpu_count(self) -> int:
        """Return the GPUs there are."""

    def share(self, kind: type[Any], *arguments: Any) -> Shared:
        """Build an object of `kind` that every worker of a flow reaches."""

    def close(self) -> None:
        """Give everything back."""


class LocalExecutor:
    """A plain loop in this process."""

    worker_count = 1

    def __init__(self) -> None:
        self._meter = Meter()

    def start(self) -> None:
        """Nothing to start."""

    def hold(self, table: pa.Table) -> pa.Table:
        """Return the table itself."""
        return table

    def run(self, flow: Flow, inputs: dict[str, list[Any]]) -> Iterator[pa.Table]:
        """Yield what the last step returns."""
        yield from local.run_flow(flow, dict(inputs), self._meter)

    def steps(self) -> dict[str, dict[str, Any]]:
        """Return the counts so far."""
        return self._meter.snapshot()

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
        self._last_steps: dict[str, dict[str, Any]] = {}
        self._started = False
        self.worker_count = 1

    def start(self) -> None:
        """Start or join Ray.

        Raises:
            ConfigError: no cluster answers, or Ray does not start here.
        """
        if self._started:
            return
        from pipeline import connect

        spec = self._spec
        connect.start_ray(
            connect.Cluster(
                address=spec.address,
                gpus=spec.gpus,
                object_store_bytes=spec.object_store_mb * 2**20 if spec.object_store_mb else None,
            )
        )
        self._meter = connect.RayMeter()
        self.worker_count = spec.workers or max(1, int(connect.cluster_cpus()))
        self._started = True

    def hold(self, table: pa.Table) -> Any:
        """Return a reference to the table in the object store."""
        from pipeline import connect

        return connect.hold(table)

    def run(self, flow: Flow, inputs: dict[str, list[Any]]) -> Iterator[pa.Table]:
        """Yield what the last step returns.

        Raises:
            ConfigError: a worker cannot be built as the spec wants it.
            ServiceLostError: a server that rows wait for is gone.
            TransientError: Ray gave up; another attempt over what is still owed may succeed.
        """
        from pipeline import connect

        try:
            yield from connect.run_flow(flow, inputs, self._meter)
        except connect.RAY_ERRORS as error:
            cause = connect.root_cause(error)
            name, _, message = cause.partition(": ")
            if name.rpartition(".")[2] == ServiceLostError.__name__:
                raise ServiceLostError(message) from error
            if name.rpartition(".")[2] == ConfigError.__name__:
                # A worker that cannot be built, as for weights that do not load, will not be at the next attempt.
                raise ConfigError(message) from error
            raise TransientError(cause) from error

    def steps(self) -> dict[str, dict[str, Any]]:
        """Return the counts so far; the last ones once Ray is gone."""
        meter = self._meter
        if meter is not None:
            self._last_steps = meter.snapshot()
        return self._last_steps

    def gpu_count(self) -> int:
        """Return the GPUs of the cluster."""
        from pipeline import connect

        return connect.cluster_gpus()

    def share(self, kind: type[Any], *arguments: Any) -> Shared:
        """Build the object in a small actor of its own; it is built again, and remembers nothing, where that dies."""
        from pipeline import connect

        return connect.RayShared(kind, *arguments)

    def close(self) -> None:
        """Leave Ray."""
        if self._started:
            from pipeline import connect

            self._meter = None
            connect.stop_ray()
            self._started = False
