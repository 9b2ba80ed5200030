"""One long run through the command line, watched from outside, and what it must not do: grow or leave anything."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.long.inputs import make_clips, make_documents, make_pictures
from tests.long.watch import Held, Process, Sample, Watch, growth, shared_names

SAMPLE_SECONDS = 5.0
GONE_SECONDS = 60.0
LONG_LIVED_SHARE = 0.25
"""Processes that were there at this share of the looks are judged; the others cannot have grown for long."""

RISE_SHARE = 0.10
RISE_BYTES = 32 * 2**20
RISE_DESCRIPTORS = 8
"""What a process may rise over the second half of its life: a tenth of its level or 32 MB, whichever is more, and 8
descriptors. A leak of 2 kB a page would be 50 MB over 25,000 pages."""


@dataclass
class Work:
    """What is read: pages with text layers, pictures for the model, and clips."""

    pages: int = 0
    pictures: int = 0
    clips: int = 0

    @property
    def records(self) -> int:
        """Rows that the run owes."""
        return self.pages + self.pictures + self.clips


class Run:
    """A run of the command line whose progress is read as it comes."""

    def __init__(self, inputs: Path, output: Path, options: list[str]) -> None:
        arguments = ["ocr", str(inputs), "-o", str(output), "--json", "--model", "demo", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.done = 0
        self.phase = "start"
        self.summary: dict[str, Any] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("event") == "progress":
                self.done, self.phase = event["done"], event["phase"]
            elif event.get("event") == "summary":
                self.summary = event

    def wait(self) -> int:
        """Return the status of the command."""
        status = self.process.wait()
        self._reader.join()
        return status


def long_run(
    work: Work, options: list[str], folder: Path | None = None, sample_seconds: float = SAMPLE_SECONDS
) -> dict[str, Any]:
    """Read `work` in one run and return what was seen.

    Args:
        work: what is made and read.
        options: further options of the command.
        folder: where inputs and tables lie; a temporary folder by default.
        sample_seconds: time from one look to the next.
    """
    with tempfile.TemporaryDirectory(prefix="pagereel-long-", dir=folder) as name:
        inputs = Path(name) / "inputs"
        make_documents(inputs, work.pages)
        make_pictures(inputs, work.pictures, work.pages)
        make_clips(inputs, work.clips)
        shared_before = shared_names()
        start = time.monotonic()
        run = Run(inputs, Path(name) / "run", options)
        watch = Watch(run.process.pid)
        samples = watch_run(run, watch, sample_seconds)
        status = run.wait()
        seconds = time.monotonic() - start
        left = wait_until_gone(watch)
        return report(work, samples, run, status, seconds, left, shared_names() - shared_before)


def watch_run(run: Run, watch: Watch, sample_seconds: float) -> list[Sample]:
    """Return the samples that were taken while records were done; the run is looked at until it ends."""
    samples = []
    while run.process.poll() is None:
        sample = watch.look(run.done)
        if run.phase == "run" and run.done:
            samples.append(sample)
            sys.stderr.write(line_of(sample) + "\n")
        time.sleep(sample_seconds)
    return samples


def wait_until_gone(watch: Watch) -> list[Process]:
    """Return the processes that are still there a minute after the run."""
    deadline = time.monotonic() + GONE_SECONDS
    while watch.left_behind() and time.monotonic() < deadline:
        time.sleep(0.5)
    return watch.left_behind()


def report(
    work: Work,
    samples: list[Sample],
    run: Run,
    status: int,
    seconds: float,
    left: list[Process],
    shared_left: set[str],
) -> dict[str, Any]:
    """Return the result: counts, what each role held, by how much its processes rose, and what is wrong."""
    roles = {role: role_report(role, samples) for role in sorted({p.role for sample in samples for p in sample.held})}
    rows = sum(run.summary.get("statuses", {}).values())
    checks = {
        f"the command ended with {status}": status != 0,
        f"{rows} rows of {work.records}": rows != work.records,
        f"{len(samples)} samples, wanted 20": len(samples) < 20,
        f"processes are left: {left}": bool(left),
        f"{sorted(shared_left)} are left in /dev/shm": bool(shared_left),
    }
    run_seconds = run.summary.get("seconds", {}).get("run")
    return {
        "work": asdict(work),
        "rows": rows,
        "statuses": run.summary.get("statuses", {}),
        "seconds": round(seconds, 1),
        "run_seconds": run_seconds,
        "records_per_second": round(rows / run_seconds, 2) if run_seconds else 0.0,
        "samples": len(samples),
        "roles": roles,
        "shared_peak_mb": round(max((sample.shared_bytes for sample in samples), default=0) / 1e6, 1),
        "left_processes": len(left),
        "left_shared": sorted(shared_left),
        "problems": rises(samples) + [name for name, is_wrong in checks.items() if is_wrong],
    }


def lives(samples: list[Sample]) -> dict[Process, list[tuple[int, Held]]]:
    """Return what each process held at each look that found it, with the records that were done then."""
    found: dict[Process, list[tuple[int, Held]]] = {}
    for sample in samples:
        for process, held in sample.held.items():
            found.setdefault(process, []).append((sample.done, held))
    return {process: life for process, life in found.items() if len(life) >= LONG_LIVED_SHARE * len(samples)}


def rise_of(life: list[tuple[int, Held]]) -> tuple[float, float]:
    """Return by how much memory and descriptors rose over the second half of a life, in bytes and in number.

    It is twice what the third and the fourth quarter have in common, by straight lines: a leak goes on in both, and a
    process that is given other work takes one step.
    """
    half = life[len(life) // 2 :]
    quarters = (half[: len(half) // 2], half[len(half) // 2 :])
    memory = [growth(enumerate(held.memory_bytes for _, held in quarter)) for quarter in quarters]
    descriptors = [growth(enumerate(held.descriptors for _, held in quarter)) for quarter in quarters]
    return 2 * min(memory), 2 * min(descriptors)


def rises(samples: list[Sample]) -> list[str]:
    """Return a line for each process that grew by more than it may."""
    problems = []
    for process, life in lives(samples).items():
        memory, descriptors = rise_of(life)
        level = life[-1][1].memory_bytes
        if memory > max(RISE_SHARE * level, RISE_BYTES):
            problems.append(f"{process.role} {process.pid}: memory rose by {memory / 1e6:.0f} to {level / 1e6:.0f} MB")
        if descriptors > RISE_DESCRIPTORS:
            problems.append(f"{process.role} {process.pid}: {descriptors:.0f} more descriptors")
    return problems


def role_report(role: str, samples: list[Sample]) -> dict[str, Any]:
    """Return what the processes of a role held together, and the largest rise of one that lived long."""
    together = [sample.of_role(role) for sample in samples]
    memory = [sum(held.memory_bytes for held in found) for found in together]
    descriptors = [sum(held.descriptors for held in found) for found in together]
    long_lived = [rise_of(life) for process, life in lives(samples).items() if process.role == role]
    return {
        "processes_most": max(len(found) for found in together),
        "processes_seen": len({process for sample in samples for process in sample.held if process.role == role}),
        "memory_median_mb": round(median(memory) / 1e6, 1),
        "memory_peak_mb": round(max(memory) / 1e6, 1),
        "memory_rise_mb": round(max((memory for memory, _ in long_lived), default=0.0) / 1e6, 1),
        "descriptors_peak": max(descriptors),
        "descriptors_rise": round(max((count for _, count in long_lived), default=0.0), 1),
    }


def line_of(sample: Sample) -> str:
    """Return a sample as a line for people."""
    parts = []
    for role in sorted({process.role for process in sample.held}):
        found = sample.of_role(role)
        memory_mb = sum(held.memory_bytes for held in found) / 1e6
        parts.append(f"{role} {len(found)}: {memory_mb:.0f} MB, {sum(held.descriptors for held in found)} open")
    return f"{sample.seconds:.0f} s, {sample.done} done; {'; '.join(parts)}; shared {sample.shared_bytes / 1e6:.0f} MB"
