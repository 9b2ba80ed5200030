"""A Ray cluster of several hosts on one machine: each node in a network namespace of its own, on a bridge between them.

A node has its own address, its own folder under Ray's temporary folder, and processes that nobody else's death or end
touches, so that it can be killed or cut off as a machine is. It needs root and `ip` of iproute2.
"""

import contextlib
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

GCS_PORT = 6379
DASHBOARD_PORT = 8265
MOST_CLUSTERS = 4000
START_SECONDS = 240
MEND_SECONDS = 30
HEALTH = {
    # A node that is cut off is given up after some seconds, and not after half a minute.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    # All nodes share this machine's memory: what the others need is no reason to kill a worker.
    "RAY_memory_monitor_refresh_ms": "0",
    # As pagereel wants them on every node.
    "RAY_task_oom_retries": "3",
    "RAY_memory_usage_threshold": "0.9",
    # Three nodes that start at once on two cores take longer than one does.
    "RAY_raylet_start_wait_time_s": "150",
}

ALIVE_PROBE = """
import sys, time
from ray._raylet import GcsClient
address, wanted, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
deadline = time.monotonic() + seconds
alive = None
while time.monotonic() < deadline:
    try:
        alive = sum(node.state == 0 for node in GcsClient(address=address).get_all_node_info(timeout=5).values())
    except Exception as error:
        alive = repr(error)
    if alive == wanted:
        sys.exit(0)
    time.sleep(0.2)
sys.exit(f"{alive} nodes alive, wanted {wanted}")
"""

IN_OWN_FOLDER = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'


@dataclass
class Node:
    """One host.

    Attributes:
        name: of its namespace, and of its folder.
        address: its IP address.
        link: the end of its cable at the bridge.
        process: the leader of its processes; None while it is down.
    """

    name: str
    address: str
    link: str
    cpus: int
    gpus: int
    process: subprocess.Popen[bytes] | None = None

    def pids(self) -> list[int]:
        """Return every process of the host."""
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]


@dataclass
class Cluster:
    """Ray on several hosts; use it as a context manager.

    Args:
        folder: a short path, for Ray's sockets and logs.
        cpus: of each worker node.
        gpus: of each worker node, which need not exist.
        head_cpus: of the head; 0 keeps work off it.
        dashboard: True for `ray job submit`.
        object_store_mb: of each node.
        variables: of every process of the cluster, besides Ray's own; `{host}` in them becomes the address of this
            machine on the bridge.
    """

    folder: Path
    cpus: Sequence[int] = (2, 2)
    gpus: Sequence[int] = ()
    head_cpus: int = 0
    dashboard: bool = False
    object_store_mb: int = 150
    variables: dict[str, str] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)

    def __enter__(self) -> "Cluster":
        try:
            self._build()
            self._start_all()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def head(self) -> Node:
        """The node that must not die."""
        return self.nodes[0]

    @property
    def address(self) -> str:
        """The address of the cluster for `--address`."""
        return f"{self.head.address}:{GCS_PORT}"

    @property
    def dashboard_url(self) -> str:
        """The address of the dashboard, for `ray job submit`."""
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    @property
    def host(self) -> str:
        """The address of this machine on the bridge, where the nodes find a server of ours."""
        return f"{self._subnet}.254"

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every process that speaks to the cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        given = {name: value.replace("{host}", self.host) for name, value in self.variables.items()}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}
        return kept | HEALTH | token | {"OMP_NUM_THREADS": "1"} | given

    def prefix(self, node: Node) -> list[str]:
        """Return what stands before a command to run it on a node.

        Raises:
            RuntimeError: the node is down.
        """
        if node.process is None:
            raise RuntimeError(f"{node.name} is down")
        return ["nsenter", "-t", str(node.process.pid), "-m", "-n", "--"]

    def start(self, node: Node) -> None:
        """Start Ray on a node, new or killed before."""
        is_head = node is self.head
        options = ["--head", f"--port={GCS_PORT}"] if is_head else [f"--address={self.address}"]
        if is_head:
            options += [f"--include-dashboard={str(self.dashboard).lower()}", f"--dashboard-host={node.address}"]
        folder = self.folder / node.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
        command += [f"--node-ip-address={node.address}", f"--num-cpus={node.cpus}", f"--num-gpus={node.gpus}"]
        command += [f"--object-store-memory={self.object_store_mb * 2**20}", "--block", "--disable-usage-stats"]
        command += [f"--temp-dir={self.folder / 'ray'}"]
        with (self.folder / f"{node.name}.log").open("ab") as log:
            node.process = subprocess.Popen(
                ["ip", "netns", "exec", node.name, "sh", "-c", IN_OWN_FOLDER, "sh", str(folder),
                 str(self.folder / "ray"), *command],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def kill(self, node: Node, *, power: bool = False) -> None:
        """End a node by SIGKILL of every process.

        Args:
            node: not the head, if the run is to go on.
            power: True takes the cable out first, so that nobody is told.
        """
        if power:
            self.cut(node)
        while pids := node.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if node.process is not None:
                node.process.poll()
            time.sleep(0.05)
        if node.process is not None:
            node.process.wait()
        node.process = None

    def cut(self, node: Node) -> None:
        """Take the cable of a node out: packets are lost, and nobody is told."""
        ip("link", "set", node.link, "down")

    def heal(self, node: Node) -> None:
        """Put the cable back."""
        ip("link", "set", node.link, "up")

    def wait_for(self, count: int, seconds: float = START_SECONDS) -> None:
        """Wait until the cluster sees `count` nodes alive.

        Raises:
            RuntimeError: it does not, in time.
        """
        done = subprocess.run(
            [sys.executable, "-c", ALIVE_PROBE, self.address, str(count), str(seconds)],
            env=self.environment, capture_output=True, text=True, check=False, timeout=seconds + 60,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{done.stderr.strip()[-500:]}; {self.logs()}")

    def mend(self) -> None:
        """Put every cable back, and start every node that is down, or goes down because it was away for too long.

        Raises:
            RuntimeError: they do not all come up.
        """
        for node in self.nodes:
            self.heal(node)
        deadline = time.monotonic() + START_SECONDS
        while True:
            for node in self.nodes:
                if node.process is not None and node.process.poll() is not None:
                    self.kill(node)
                if node.process is None:
                    self.start(node)
            try:
                return self.wait_for(len(self.nodes), MEND_SECONDS)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise

    def logs(self) -> str:
        """Return the last words of every node."""
        return " / ".join(
            f"{node.name}: {(self.folder / f'{node.name}.log').read_text(errors='replace')[-300:]}"
            for node in self.nodes
            if (self.folder / f"{node.name}.log").exists()
        )

    def driver_logs(self) -> str:
        """Return what Ray's own part of the drivers on the head logged last, which they print nowhere else."""
        found = sorted((self.folder / self.head.name).glob("session_*/logs/python-core-driver-*.log"))
        return " / ".join(path.read_text(errors="replace")[-1500:] for path in found[-2:])

    def close(self) -> None:
        """End every node, and remove namespaces, cables and the bridge."""
        for node in self.nodes:
            with contextlib.suppress(subprocess.CalledProcessError):
                self.kill(node)
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", node.name)
        self.nodes.clear()
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", self._bridge)

    def _build(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "ray").mkdir(exist_ok=True)
        self._token = secrets.token_hex(16)
        number = _new_bridge()
        self._bridge = f"prb{number}"
        self._subnet = f"10.{200 + number // 256}.{number % 256}"
        ip("addr", "add", f"{self.host}/24", "dev", self._bridge)
        ip("link", "set", self._bridge, "up")
        gpus = [*self.gpus, *[0] * len(self.cpus)]
        wanted = [(self.head_cpus, 0), *zip(self.cpus, gpus, strict=False)]
        for index, (cpus, gpu_count) in enumerate(wanted):
            node = Node(f"prb{number}-{index}", f"{self._subnet}.{index + 1}", f"prb{number}v{index}", cpus, gpu_count)
            self.nodes.append(node)
            self._connect(node)

    def _connect(self, node: Node) -> None:
        inner = f"{node.link}i"
        ip("netns", "add", node.name)
        ip("link", "add", node.link, "type", "veth", "peer", "name", inner)
        ip("link", "set", inner, "netns", node.name)
        ip("link", "set", node.link, "master", self._bridge, "up")
        ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", inner)
        ip("-n", node.name, "link", "set", inner, "up")
        ip("-n", node.name, "link", "set", "lo", "up")

    def _start_all(self) -> None:
        self.start(self.head)
        self.wait_for(1)
        for node in self.nodes[1:]:
            self.start(node)
        self.wait_for(len(self.nodes))


def ip(*arguments: str) -> str:
    """Run `ip` and return what it prints.

    Raises:
        subprocess.CalledProcessError: it refused, with its words as a note.
    """
    try:
        return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
    except subprocess.CalledProcessError as error:
        error.add_note(error.stderr)
        raise


def _new_bridge() -> int:
    """Make a bridge whose number nobody else has, and return the number."""
    for _ in range(50):
        number = random.SystemRandom().randrange(MOST_CLUSTERS)
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "add", f"prb{number}", "type", "bridge")
            return number
    raise RuntimeError("no bridge can be made")


def can_build() -> str:
    """Return why no cluster can be built here, empty where one can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        return "ip (iproute2) and nsenter (util-linux) are not installed"
    return ""


def must_build() -> bool:
    """Return whether a place that cannot build one is at fault."""
    return bool(os.environ.get("CI")) or os.environ.get("PAGEREEL_EXPECT_ROOT") == "1"


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """Yield a new folder with a short path, removed afterwards: the path of a socket may have 107 bytes."""
    folder = Path("/tmp") / f"prb-{secrets.token_hex(3)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
