"""`pagereel doctor`: what this machine has, and what is wrong with it."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from schemas.errors import ConfigError

PACKAGES = (
    "ray", "torch", "transformers", "tokenizers", "pyarrow", "pymupdf", "pymupdf4llm", "decord", "av", "pillow",
    "onnxruntime", "rapidocr-onnxruntime", "opencv-python-headless", "s3fs", "numpy",
)  # fmt: skip


@dataclass
class Check:
    """One line of the report: `state` is `ok`, `note` or `wrong`."""

    name: str
    state: str
    found: str


@dataclass
class Report:
    """Everything `doctor` looked at."""

    checks: list[Check] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """True when nothing is wrong; notes are not wrong."""
        return all(check.state != "wrong" for check in self.checks)

    def add(self, name: str, state: str, found: str) -> None:
        """Add one line."""
        self.checks.append(Check(name, state, found))


def examine(model: str | None, endpoint: str | None = None) -> Report:
    """Return what this machine has; loads `model` when one is given, or asks the server at `endpoint` for an answer."""
    report = Report()
    _platform(report)
    _packages(report)
    _gpu(report)
    _decoders(report)
    _disk(report)
    if endpoint:
        _endpoint(report, endpoint, model)
    elif model:
        _model(report, model)
    return report


def _platform(report: Report) -> None:
    version = sys.version_info[:2]
    supported = sys.platform == "linux" and platform.machine() == "x86_64" and (3, 11) <= version <= (3, 13)
    found = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    report.add(
        "platform", "ok" if supported else "wrong", found + ("" if supported else ": wanted Linux x86_64, 3.11-13")
    )
    cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    state = "ok" if cores >= 2 and memory >= 6 else "note"
    report.add("machine", state, f"{cores} cores, {memory:.0f} GiB of memory")


def _packages(report: Report) -> None:
    for name in PACKAGES:
        try:
            report.add(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            report.add(name, "wrong", "not installed")
    if _installed("torchvision"):
        report.add("torchvision", "note", "installed: beside a CPU build of torch it breaks transformers' imports")
    if _installed("opencv-python"):
        report.add(
            "opencv-python", "note", "installed: its Qt needs system libraries; opencv-python-headless is enough"
        )


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _gpu(report: Report) -> None:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        report.add("GPU", "note", f"none for torch {torch.__version__}: --engine cpu reads pages, --model runs slowly")
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        report.add(f"GPU {index}", "ok", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")


def _decoders(report: Report) -> None:
    """Ask each decoder library for a sign of life, in a process of its own: a broken one may crash."""
    for name, code in (
        ("PyMuPDF", "import pymupdf; d = pymupdf.open(); d.new_page(); d[0].get_pixmap()"),
        ("PyAV", "import av; av.codec.Codec('h264', 'r')"),
        ("decord", "import decord"),
        ("RapidOCR", "import cv2, onnxruntime, rapidocr_onnxruntime"),
    ):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        report.add(
            f"{name} works", "ok" if done.returncode == 0 else "wrong", "yes" if done.returncode == 0 else last[0]
        )


def _disk(report: Report) -> None:
    for name, folder in (
        ("temporary folder", Path(os.environ.get("TMPDIR", "/tmp"))),
        ("shared memory", Path("/dev/shm")),
    ):
        if folder.exists():
            free = shutil.disk_usage(folder).free / 2**30
            report.add(name, "ok" if free >= 2 else "note", f"{folder}: {free:.1f} GiB free")


def _model(report: Report, model: str) -> None:
    from operators.generate import Generate, GenerateConfig
    from operators.minicpmv.weights import resolve_model

    try:
        found = resolve_model(model, None)
        Generate(GenerateConfig(model_folder=str(found.folder))).close()
    except ConfigError as error:
        report.add("model", "wrong", str(error))
        return
    report.add("model", "ok", f"{found.model_id} ({found.weights_kind}, revision {found.revision[:12]}) loads")


def _endpoint(report: Report, endpoint: str, model: str | None) -> None:
    from operators.endpoint.address import endpoint_url
    from operators.endpoint.question import Sampling
    from pipeline.endpoint import server_key, try_server

    try:
        server = try_server(endpoint_url(endpoint), server_key(), model, Sampling())
    except ConfigError as error:
        report.add("endpoint", "wrong", str(error))
        return
    told = "tells" if server.gives_logprobs else "does not tell"
    report.add("endpoint", "ok", f"{server.model_id} answers at {server.url}, and {told} probabilities")


def print_report(report: Report, *, as_json: bool) -> None:
    """Print the report on standard output."""
    if as_json:
        value: dict[str, Any] = {"healthy": report.healthy, "checks": [vars(check) for check in report.checks]}
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
        return
    table = Table(box=None, show_header=False)
    styles = {"ok": "green", "note": "yellow", "wrong": "red"}
    for check in report.checks:
        table.add_row(check.name, f"[{styles[check.state]}]{check.state}[/]", check.found)
    Console().print(table)
    sys.stdout.write("this machine can run pagereel\n" if report.healthy else "mend what is marked wrong\n")
