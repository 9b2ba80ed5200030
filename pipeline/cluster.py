"""The Ray that flows run on: started or joined, what it has, and whether it is still there."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.watchdog import GoneError, Room
from schemas.errors import ConfigError, TransientError, one_line

logger = logging.getLogger(__name__)

_joined = False
"""Whether the Ray of this process is a cluster that goes on without it."""

RAYLET_SETTINGS: Final = {"RAY_task_oom_retries": "3", "RAY_memory_usage_threshold": "0.9"}
"""What every node must be started with, because a driver cannot set it later: by default a task that runs out of memory
is run again for ever, and native decoders take the last memory of a machine before Ray steps in."""

SETTINGS_SECONDS: Final = 20.0
"""Time for the nodes of a cluster to say how they were started."""

GOODBYE_SECONDS: Final = 10.0
"""Time for a Ray of our own to end; what is left of it then goes with this process."""

HEAD_SECONDS: Final = 900
"""Time without the head of the cluster after which Ray ends this process; the watch of the run ends it before."""

ANSWER_SECONDS: Final = 5.0
"""Time for the head to take a connection."""


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
        TransientError: Ray's processes did not come up in time.
    """
    global _joined
    _joined = cluster.address is not None
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
    except Exception as error:
        # Ray's word, in this very class, when its own processes are too slow to come up on a busy machine.
        if type(error) is not Exception:
            raise
        raise TransientError(f"Ray did not start in time: {one_line(error)}") from error
    if threading.current_thread() is threading.main_thread():
        # Ray would go on to end the process with status 15 and no word.
        signal.signal(signal.SIGTERM, ours)


def leave_and_exit(status: int) -> None:
    """End this process with `status` if it is connected to Ray; returns where it is not.

    Ray says goodbye to whatever it knew, lost nodes included, and where that takes too long it ends the process itself,
    with status 1 and no word. A cluster that was joined notices the end of a driver without it; a Ray of our own gets
    some seconds to end in good order.
    """
    if not ray.is_initialized():
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    logging.shutdown()
    if _joined:
        os._exit(status)
    threading.Timer(GOODBYE_SECONDS, os._exit, [status]).start()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        for descriptor in (1, 2):
            os.dup2(nowhere.fileno(), descriptor)
    ray.shutdown()
    os._exit(status)


def stop_ray() -> None:
    """Leave the cluster; a Ray that this process started ends."""
    ray.shutdown()


def quiet_ray() -> None:
    """Keep Ray's own chatter out of the terminal; it stays in Ray's session logs."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    # Ray ends a driver without a word and with status 1 when the head has been gone for 60 s (seen).
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(HEAD_SECONDS))
    # What no dashboard shows, Ray's head would remember all the same: 3.6 kB a call of an actor (measured).
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    for name, value in RAYLET_SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def cluster_cpus() -> float:
    """Return the logical CPUs of the cluster."""
    return float(ray.cluster_resources().get("CPU", 1))


def steady_cpus() -> float:
    """Return the logical CPUs that are left of the cluster when the largest of several nodes is lost."""
    of_nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    left = sum(of_nodes) - max(of_nodes, default=0.0)
    return float(left or cluster_cpus())


@dataclass(frozen=True)
class Lifelines:
    """What a driver cannot do without: addresses of the head of its cluster and of the node that it runs on.

    Attributes:
        is_ours: whether the cluster goes with this process; its head is not replaced then.
    """

    head: tuple[str, int]
    node: tuple[str, int]
    is_ours: bool

    def check(self) -> None:
        """Do nothing where both take connections.

        They are asked in this way because a call to a head that is gone holds its thread for as long as Ray waits.

        Raises:
            GoneError: one of them is gone for good. Ray would end this process within seconds, without a word.
            OSError: the head does not answer now.
        """
        for name, address in (("node of this driver", self.node), ("head of the cluster", self.head)):
            try:
                socket.create_connection(address, timeout=ANSWER_SECONDS).close()
            except ConnectionRefusedError as error:
                if address == self.node or self.is_ours:
                    raise GoneError(f"the {name} is gone: nobody listens at {address[0]}:{address[1]}") from error
                raise


def lifelines(*, is_ours: bool) -> Lifelines:
    """Return the addresses of the head and of the node of this driver."""
    context = ray.get_runtime_context()
    host, _, port = str(context.gcs_address).rpartition(":")
    [mine] = [node for node in ray.nodes() if node["NodeID"] == context.get_node_id()]
    return Lifelines((host.strip("[]"), int(port)), (mine["NodeManagerAddress"], mine["NodeManagerPort"]), is_ours)


def living_nodes() -> list[str]:
    """Return the ids of the nodes that are up."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def unset_on_nodes() -> dict[str, int]:
    """Return for each of `RAYLET_SETTINGS` on how many nodes it is not set; nodes that do not answer count as set."""
    look = ray.remote(num_cpus=0, max_retries=0)(_unset_here)
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in living_nodes()
    ]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=SETTINGS_SECONDS)
    try:
        return dict(Counter(name for names in ray.get(answered) for name in names))
    except ray.exceptions.RayError as error:
        logger.debug("the nodes were not asked: %r", error)
        return {}


def _unset_here() -> list[str]:
    # A worker has the environment of the node that started it.
    return [name for name in RAYLET_SETTINGS if name not in os.environ]


def cluster_room() -> Room:
    """Return what the cluster has, and how much of it is free."""
    total, free = ray.cluster_resources(), ray.available_resources()
    return Room(
        cpus=float(total.get("CPU", 0)),
        free_cpus=float(free.get("CPU", 0)),
        gpus=float(total.get("GPU", 0)),
        free_gpus=float(free.get("GPU", 0)),
        nodes=len(living_nodes()),
    )


def cluster_gpus() -> int:
    """Return the GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))
