"""What a benchmark ran on, and how much memory its processes took."""

import importlib.metadata
import os
import platform
import threading
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "transformers", "pyarrow", "pymupdf", "decord", "av", "pillow", "onnxruntime")
SAMPLE_SECONDS = 0.25


def machine_facts() -> dict[str, Any]:
    """Return processor, cores, memory and versions, as results are committed with them."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "versions": versions,
    }


class MemoryWatch:
    """Samples the proportional memory of a process and all below it; `with` it around the work.

    Proportional set size counts a page shared by n processes once, so the object store is not counted for every
    worker that maps it.

    Args:
        root_pid: the process at the top.
    """

    def __init__(self, root_pid: int) -> None:
        self._root = root_pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0
        self.peak_single_bytes = 0

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            sizes = [_pss_bytes(pid) for pid in process_tree(self._root)]
            self.peak_bytes = max(self.peak_bytes, sum(sizes))
            self.peak_single_bytes = max(self.peak_single_bytes, max(sizes, default=0))


def process_tree(root: int) -> list[int]:
    """Return the ids of `root` and every process below it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        fields = _lines(f"/proc/{entry.name}/stat")
        if fields:
            # The command may hold spaces and brackets: the parent is the second field after the last bracket.
            parent = int(fields[0].rsplit(")", 1)[1].split()[1])
            parents.setdefault(parent, []).append(int(entry.name))
    tree, todo = [], [root]
    while todo:
        pid = todo.pop()
        tree.append(pid)
        todo += parents.get(pid, [])
    return tree


def _pss_bytes(pid: int) -> int:
    for line in _lines(f"/proc/{pid}/smaps_rollup"):
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
