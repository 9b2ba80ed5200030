"""`pagereel doctor`: what this machine has, and what is wrong with it."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table

from schemas.errors import ConfigError

if TYPE_CHECKING:
    from operators.minicpmv.config import ModelConfig
    from operators.minicpmv.memory import Load, ModelMemory

PACKAGES = (
    "ray", "torch", "transformers", "tokenizers", "pyarrow", "pymupdf", "pymupdf4llm", "decord", "av", "pillow",
    "onnxruntime", "rapidocr-onnxruntime", "opencv-python-headless", "s3fs", "numpy",
)  # fmt: skip


PAGE_PX: Final = (2339, 1654)
"""Height and width of an A4 page at 200 dpi."""

CLIP_PX: Final = (1080, 1920)
CLIP_SECONDS: Final = 30.0
CLIP_FRAMES_PER_SECOND: Final = 30.0
"""A segment of default length of an ordinary video."""

GIB: Final = 2**30


@dataclass
class Check:
    """One line of the report: `state` is `ok`, `note` or `wrong`."""

    name: str
    state: str
    found: str


@dataclass
class Estimate:
    """What a model takes of the memory where it would run.

    Attributes:
        title: the model.
        place: the card or the host, and `free_bytes` what is free there now.
        dtype: of weights that are not quantised, and of activations.
        memory: bytes of the model.
        loads: what a page and a clip ask of it, by name.
    """

    title: str
    place: str
    free_bytes: int
    dtype: str
    memory: "ModelMemory"
    loads: dict[str, "Load"]

    @property
    def largest_batches(self) -> dict[str, int]:
        """Return how many pages, or clips, fit at once."""
        return {name: self.memory.largest_batch(load, self.free_bytes) for name, load in self.loads.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        batches = self.largest_batches
        loads = {
            name: {**asdict(load), **used_bytes(self.memory, load), "largest_batch": batches[name]}
            for name, load in self.loads.items()
        }
        facts = {"title": self.title, "place": self.place, "free_bytes": self.free_bytes, "dtype": self.dtype}
        return facts | {"model_bytes": asdict(self.memory)} | loads


def used_bytes(memory: "ModelMemory", load: "Load") -> dict[str, int]:
    """Return the bytes that one record takes alone."""
    return {
        "cache_bytes": memory.cache(load),
        "vision_bytes": memory.vision(load, 1),
        "prefill_bytes": memory.prefill(load, 1),
        "needed_bytes": memory.needed(load, 1),
    }


@dataclass
class Report:
    """Everything `doctor` looked at."""

    checks: list[Check] = field(default_factory=list)
    estimate: Estimate | None = None

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
    """Add what the model takes, from its files alone, and then whether it loads; not where its weights do not fit."""
    from operators.minicpmv.config import read_model_config
    from operators.minicpmv.weights import model_folder

    try:
        report.estimate = estimate = estimate_model(read_model_config(model_folder(model)))
    except ConfigError as error:
        report.add("model", "wrong", str(error))
        return
    report.add("memory", *judged(estimate))
    needed, free = estimate.memory.weights, estimate.free_bytes
    if needed > free:
        reason = f"not loaded: its weights take {in_gib(needed)} and {in_gib(free)} are free ({estimate.place})"
        report.add("model", "wrong", reason)
        return
    report.add("model", *loaded(model))


def estimate_model(model: "ModelConfig") -> Estimate:
    """Return what a model takes where it would run: on the first card, or on the host where there is none.

    Raises:
        ConfigError: a weight file is missing or cut off.
    """
    import torch

    from operators.generate import MAX_NEW_TOKENS
    from operators.minicpmv.config import read_json
    from operators.minicpmv.encoder import most_patches
    from operators.minicpmv.memory import clip_load, estimate_memory, page_load
    from operators.minicpmv.requirements import activation_dtype
    from operators.minicpmv.slicing import Size
    from operators.prompts import prompt_for

    on_gpu = torch.cuda.is_available()
    place = torch.cuda.get_device_name(0) if on_gpu else "this machine, no GPU"
    dtype = activation_dtype(model.quantization, "auto", on_gpu=on_gpu)
    new_tokens = model.generation.max_new_tokens or MAX_NEW_TOKENS
    inner_width = read_json(model.folder / "config.json")["vision_config"]["intermediate_size"]
    page, clip = prompt_for("ocr", "pdf").text, prompt_for("caption", "video").text
    return Estimate(
        title=model.family.title,
        place=place,
        free_bytes=torch.cuda.mem_get_info(0)[0] if on_gpu else available_bytes(),
        dtype=dtype,
        memory=estimate_memory(model, dtype, most_patches(inner_width, "cuda" if on_gpu else "cpu")),
        loads={
            "page": page_load(model, Size(*PAGE_PX), page, new_tokens),
            "clip": clip_load(model, Size(*CLIP_PX), CLIP_SECONDS, CLIP_FRAMES_PER_SECOND, clip, new_tokens),
        },
    )


def available_bytes() -> int:
    """Return the memory of the host that a process can still have."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def judged(estimate: Estimate) -> tuple[str, str]:
    """Return state and text of what fits."""
    batches = estimate.largest_batches
    found = f"{in_gib(estimate.free_bytes)} free ({estimate.place}): {batches['page']} pages at once, or "
    found += f"{batches['clip']} clips of {CLIP_SECONDS:g} s"
    return ("ok" if all(batches.values()) else "note" if batches["page"] else "wrong"), found


def loaded(model: str) -> tuple[str, str]:
    """Return state and text of whether a model loads."""
    from operators.generate import Generate, GenerateConfig
    from operators.minicpmv.weights import resolve_model

    try:
        found = resolve_model(model, None)
        Generate(GenerateConfig(model_folder=str(found.folder))).close()
    except ConfigError as error:
        return "wrong", str(error)
    return "ok", f"{found.model_id} ({found.weights_kind}, revision {found.revision[:12]}) loads"


def in_gib(count: float) -> str:
    """Return bytes as people read them."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            share = count / size
            return f"{share:,.0f} {unit}" if share >= 100 else f"{share:.3g} {unit}"
    return f"{count:.0f} bytes"


def memory_table(estimate: Estimate) -> Table:
    """Return what a page and a clip take, and how many fit."""
    memory, batches = estimate.memory, estimate.largest_batches
    state = f" and {in_gib(memory.state_per_record)} a record" if memory.state_per_record else ""
    table = Table(
        title=f"{estimate.title} in {estimate.dtype}: weights {in_gib(memory.weights)}, "
        f"cache {memory.cache_per_token:,} bytes a token{state}",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("page, A4 at 200 dpi", justify="right")
    table.add_column(f"clip of {CLIP_SECONDS:g} s", justify="right")
    used = {name: used_bytes(memory, load) for name, load in estimate.loads.items()}

    def add(title: str, pick: Any) -> None:
        table.add_row(title, *(pick(name, load) for name, load in estimate.loads.items()))

    add("slices", lambda _, load: f"{load.slices:,}")
    add("patches", lambda _, load: f"{load.patches:,}")
    add("prompt tokens", lambda _, load: f"{load.prompt_tokens:,}")
    add("longest answer, tokens", lambda _, load: f"{load.new_tokens:,}")
    add("cache to the end of the answer", lambda name, _: in_gib(used[name]["cache_bytes"]))
    add("vision pass at its widest", lambda name, _: in_gib(used[name]["vision_bytes"]))
    add("prefill at its widest", lambda name, _: in_gib(used[name]["prefill_bytes"]))
    add("one alone, weights included", lambda name, _: in_gib(used[name]["needed_bytes"]))
    add(f"largest batch in {in_gib(estimate.free_bytes)}", lambda name, _: f"{batches[name]:,}")
    return table


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
        if report.estimate:
            value["memory"] = report.estimate.as_dict()
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
        return
    table = Table(box=None, show_header=False)
    styles = {"ok": "green", "note": "yellow", "wrong": "red"}
    for check in report.checks:
        table.add_row(check.name, f"[{styles[check.state]}]{check.state}[/]", check.found)
    Console().print(table)
    if report.estimate:
        Console().print(memory_table(report.estimate))
    sys.stdout.write("this machine can run pagereel\n" if report.healthy else "mend what is marked wrong\n")
