"""Who reads the pages: the model, a server, or the CPU engine; decided before anything starts, and said aloud."""

import glob
import shutil
from dataclasses import dataclass
from pathlib import Path

from operators.minicpmv.config import ModelConfig, read_model_config
from operators.minicpmv.requirements import activation_dtype, require_quantiser
from operators.minicpmv.weights import resolve_model
from operators.read import MODEL_ID
from pipeline.dials import check_dials
from pipeline.endpoint import Server, find_server
from pipeline.spec import RunSpec
from schemas.errors import ConfigError

DEFAULT_MODEL = "openbmb/MiniCPM-V-4.6"


@dataclass(frozen=True)
class Reading:
    """What answers the records that have no trustworthy text of their own.

    Attributes:
        engine: `torch`, `endpoint`, or `cpu`.
        reason: why it was chosen, for the first line of the run.
        model: numbers and defaults of the model; None for the other engines.
        server: what is asked; None for the other engines.
        model_id, model_revision, weights_kind: which model, and whether its answers mean something.
        uses_gpu: True when a worker takes a GPU.
    """

    engine: str
    reason: str
    model: ModelConfig | None = None
    server: Server | None = None
    model_id: str | None = None
    model_revision: str | None = None
    weights_kind: str | None = None
    uses_gpu: bool = False

    @property
    def asks_model(self) -> bool:
        """Whether a model answers, here or on a server."""
        return self.model is not None or self.server is not None

    def sentence(self, task: str) -> str:
        """Return the first line of a run."""
        if self.server is not None:
            return f"{task} with {self.model_id} at {self.server.url}: {self.reason}"
        if self.model is None:
            return f"{task} with the CPU engine ({MODEL_ID}): {self.reason}"
        where = "GPU" if self.uses_gpu else "CPU"
        marked = " - random weights: what the model writes has no meaning" if self.weights_kind == "demo_random" else ""
        return f"{task} with {self.model_id} on the {where}: {self.reason}{marked}"


def choose_reading(spec: RunSpec) -> Reading:
    """Return who reads, with the model's files looked at.

    Raises:
        ConfigError: no engine can do the task here, the model or the server is not there, or it lacks an option that
            was given.
    """
    if spec.engine == "endpoint" or (spec.engine == "auto" and spec.endpoint):
        server = find_server(spec)
        return Reading(engine="endpoint", reason="an endpoint was given", server=server, model_id=server.model_id)
    if spec.endpoint:
        raise ConfigError(f"--engine {spec.engine} asks no server: leave out --endpoint, or --engine")
    has_gpu = spec.address is not None or gpu_is_here()
    if spec.device == "cuda" and not has_gpu:
        raise ConfigError("device cuda was asked for, and no GPU is here: use --device cpu or --engine cpu")
    if spec.engine == "cpu" and spec.model:
        raise ConfigError("--engine cpu reads with RapidOCR and takes no --model")
    if spec.engine == "cpu" or (spec.engine == "auto" and not spec.model and not has_gpu):
        return _cpu_reading(spec)
    model = spec.model or DEFAULT_MODEL
    found = resolve_model(model, spec.revision)
    config = read_model_config(found.folder)
    check_dials(spec, config.family)
    uses_gpu = has_gpu and spec.device != "cpu"
    activation_dtype(config.quantization, spec.dtype, on_gpu=uses_gpu)
    if spec.address is None:
        # The machines of a cluster may have packages that this one lacks; their workers ask again.
        require_quantiser(config.quantization, found.folder)
    reason = "it was named" if spec.model else "a GPU is here and no model was named"
    return Reading(
        engine="torch",
        reason=reason,
        model=config,
        model_id=found.model_id,
        model_revision=found.revision,
        weights_kind=found.weights_kind,
        uses_gpu=uses_gpu,
    )


def _cpu_reading(spec: RunSpec) -> Reading:
    reason = "it was asked for" if spec.engine == "cpu" else "no model was named and no GPU is here"
    if spec.task == "caption":
        raise ConfigError(f"captions need a model, and {reason}: name one with --model, or try --model demo")
    if spec.prompt:
        raise ConfigError("a prompt needs a model: name one with --model")
    return Reading(engine="cpu", reason=reason, model_id=MODEL_ID, weights_kind="released")


def gpu_is_here() -> bool:
    """Return whether this machine has an NVIDIA GPU, without importing torch."""
    if glob.glob("/dev/nvidia[0-9]*"):
        return True
    # Under WSL there are no device files of that name.
    return Path("/dev/dxg").exists() and shutil.which("nvidia-smi") is not None
