"""How each kind of fault is injected."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

from tests.chaos.call import DECODER, DRIVER, WORKER, Call, Injector
from tests.chaos.processes import Process, is_alive, send
from tests.chaos.schedules import Fault
from tests.cluster.namespaces import Cluster, Node
from tests.s3.faulty_proxy import FaultyProxy

RAYLET = "raylet/raylet"
FULL_FACTOR = 4.0
SPILL_KILOBYTES = 40 * 1024
POWER_SECONDS = 3.0
CUT_FACTOR = 4.0
FILL_STORE = """
import sys, time
import numpy, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
kept, deadline = [], time.monotonic() + float(sys.argv[2])
while time.monotonic() < deadline:
    try:
        kept.append(ray.put(numpy.random.bytes(10_000_000)))
    except Exception as error:
        print("full:", type(error).__name__)
    time.sleep(0.05)
"""
CLOCK_HOURS = (-30.0, -2.0, 2.0, 30.0)


class KillDriver(Injector):
    """SIGKILL of the process that the user started."""

    def strike(self, call: Call) -> bool:
        """Kill it."""
        assert call.driver is not None
        call.driver.kill()
        return True


class KillProcess(Injector):
    """SIGKILL of one of the processes whose command contains a word."""

    word = ""

    def strike(self, call: Call) -> bool:
        """Kill one of them."""
        victim = chosen(call, self.fault, self.word)
        return victim is not None and send(victim, signal.SIGKILL)


class KillDecoder(KillProcess):
    """A decoder child dies, as when the kernel is out of memory."""

    word = DECODER


class KillWorker(KillProcess):
    """A worker of the flow dies, with everything that it holds."""

    word = WORKER


class KillRaylet(KillProcess):
    """A node of one machine dies under its driver."""

    word = RAYLET


class Pause(Injector):
    """The driver, a worker or a decoder stands still for a while, as when a machine swaps or sleeps."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.victim: Process | None = None
        self.until = 0.0

    def strike(self, call: Call) -> bool:
        """Stop it, and let it go on when its time has come."""
        if self.victim is None:
            words = (WORKER, DECODER, DRIVER) if call.scene.has_workers else (DECODER, DRIVER)
            self.victim = chosen(call, self.fault, words[int(self.fault.choice * len(words))])
            self.until = time.monotonic() + self.fault.length_seconds
            if self.victim is not None and not send(self.victim, signal.SIGSTOP):
                self.victim = None
            return False
        if time.monotonic() < self.until:
            return False
        self.relent(call)
        return True

    def relent(self, call: Call) -> None:
        """Let it go on; it may be the one that the call waited for, or have ended."""
        if self.victim is None:
            return
        self.struck = True
        if is_alive(self.victim):
            send(self.victim, signal.SIGCONT)


class SecondDriver(Injector):
    """The same command once more, while the first is at work; half of the time on a host whose clock is ahead.

    To that one the first driver seems to have been silent for hours, so it takes the run over.
    """

    def strike(self, call: Call) -> bool:
        """Start it."""
        environment = dict(call.environment)
        if self.fault.choice > 0.5:
            clock = call.scene.folder / "clock-ahead"
            clock.write_text("+3h\n")
            environment |= clock_environment(clock)
        call.others.append(call.start(environment))
        return True


class FullDisk(Injector):
    """The disk of the run folder is full before the run is done."""

    def prepare(self, call: Call) -> None:
        """Leave less room than the run needs."""
        folder = disk_of(call)
        facts = os.statvfs(folder)
        # What whole blocks hold: a disk cannot be made smaller than that.
        used = (facts.f_blocks - facts.f_bfree) * facts.f_frsize
        room = int(call.scene.expected_bytes * self.fault.choice)
        remount(folder, max(64, (used + room) // 1024 + 4))

    def strike(self, call: Call) -> bool:
        """Nothing more to do."""
        return True

    def relent(self, call: Call) -> None:
        """Make room."""
        remount(disk_of(call), 512 * 1024)


class FullStore(Injector):
    """Somebody else's objects fill the object store, and what is spilled the disk that is there for that."""

    def prepare(self, call: Call) -> None:
        """Give Ray a small disk."""
        self.folder = Path(call.environment["RAY_TMPDIR"])
        if not self.folder.is_mount():
            mount(self.folder, SPILL_KILOBYTES)
        remount(self.folder, SPILL_KILOBYTES)

    def strike(self, call: Call) -> bool:
        """Join the Ray of the run and fill its store."""
        raylet = chosen(call, self.fault, RAYLET)
        found = re.search(r"--gcs-address=(\S+)", raylet.command) if raylet else None
        if found is None:
            return False
        seconds = str(FULL_FACTOR * self.fault.length_seconds)
        call.guests.append(call.start_guest([sys.executable, "-c", FILL_STORE, found.group(1), seconds]))
        return True

    def relent(self, call: Call) -> None:
        """Make room."""
        remount(self.folder, 512 * 1024)


class FaultyStore(Injector):
    """The S3 server breaks some of its answers."""

    def prepare(self, call: Call) -> None:
        """Put a proxy before the server."""
        assert call.scene.s3_url is not None
        rate = 0.02 + 0.18 * self.fault.choice
        seed = int(self.fault.choice * 2**31)
        self.proxy = FaultyProxy(upstream=call.scene.s3_url, seed=seed, rate=rate, hang_seconds=5.0)
        self.proxy.start()
        call.environment["AWS_ENDPOINT_URL"] = self.proxy.url

    def strike(self, call: Call) -> bool:
        """Return whether an answer was broken yet."""
        return self.proxy.broken.total() > 0

    def relent(self, call: Call) -> None:
        """Take the proxy away."""
        self.proxy.stop()


class NodeFault(Injector):
    """Something happens to a node of a cluster that is not the head."""

    def strike(self, call: Call) -> bool:
        """Strike a node on which the run is at work."""
        cluster = call.scene.cluster
        assert cluster is not None
        workers = {process.pid for process in call.scene.processes() if WORKER in process.command}
        busy = [node for node in cluster.nodes[1:] if workers & set(node.pids())]
        if not busy:
            return False
        self.hit(cluster, busy[int(self.fault.choice * len(busy))])
        return True

    def hit(self, cluster: Cluster, node: Node) -> None:
        """Do it."""
        raise NotImplementedError

    def relent(self, call: Call) -> None:
        """Make the cluster whole."""
        assert call.scene.cluster is not None
        call.scene.cluster.mend()


class KillNode(NodeFault):
    """SIGKILL of every process of a node, half of the time without a word to the others."""

    def hit(self, cluster: Cluster, node: Node) -> None:
        """Kill it."""
        cluster.kill(node, power=self.fault.length_seconds > POWER_SECONDS)


class CutNode(NodeFault):
    """A node cannot be reached for a while: the others may or may not give it up."""

    def hit(self, cluster: Cluster, node: Node) -> None:
        """Take its cable out, and put it back later."""
        cluster.cut(node)
        threading.Timer(CUT_FACTOR * self.fault.length_seconds, cluster.heal, [node]).start()


class JumpingClock(Injector):
    """The time of day of every process of the call jumps by hours; the time since boot does not."""

    def prepare(self, call: Call) -> None:
        """Start the call with a clock that can be set."""
        self.file = call.scene.folder / f"clock-{id(self)}"
        self.file.write_text("+0\n")
        call.environment |= clock_environment(self.file)

    def strike(self, call: Call) -> bool:
        """Set it."""
        hours = CLOCK_HOURS[int(self.fault.choice * len(CLOCK_HOURS))]
        self.file.write_text(f"{hours:+g}h\n")
        return True


def clock_environment(file: Path) -> dict[str, str]:
    """Return variables with which the clock of a process is what `file` says."""
    spec = find_spec("libfaketime")
    assert spec is not None, "libfaketime is not installed"
    [library] = Path(spec.origin or "").parent.rglob("libfaketime.so.1")
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        # Reading the file at every look at the clock made Ray start in 11 s and not 3 (seen).
        "FAKETIME_CACHE_DURATION": "1",
    }


def chosen(call: Call, fault: Fault, word: str) -> Process | None:
    """Return one process of the run whose command contains `word`, None where there is none now."""
    found = sorted((p for p in call.scene.processes() if word in p.command), key=lambda p: (p.start, p.pid))
    return found[int(fault.choice * len(found))] if found else None


def disk_of(call: Call) -> Path:
    """Return where the small disk of a schedule is mounted."""
    return call.scene.folder / "disk"


def mount(folder: Path, kilobytes: int) -> None:
    """Mount a disk of its own, in memory, at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True)


def remount(folder: Path, kilobytes: int) -> None:
    """Change the size of a disk that `mount` made."""
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(folder)], check=True)


def unmount(folder: Path) -> None:
    """Take a disk away; one that is still in use goes when it is not."""
    subprocess.run(["umount", "--lazy", str(folder)], check=False)


INJECTORS: dict[str, type[Injector]] = {
    "driver_kill": KillDriver,
    "worker_kill": KillWorker,
    "decoder_kill": KillDecoder,
    "raylet_kill": KillRaylet,
    "pause": Pause,
    "second_driver": SecondDriver,
    "disk_full": FullDisk,
    "clock_jump": JumpingClock,
    "store_full": FullStore,
    "s3_faults": FaultyStore,
    "node_kill": KillNode,
    "node_cut": CutNode,
}
