"""Where a model's files are, and which weights exactly they hold. No torch: CPU workers import it for tokenizers."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from operators.minicpmv.config import DEMO_MARKER, read_json, refuse_gguf, require_supported
from operators.minicpmv.demo import DEMO_VERSION, demo_family
from operators.minicpmv.family import FamilyName
from operators.minicpmv.tiny import write_tiny_model
from schemas.errors import ConfigError
from schemas.ids import digest

WeightsKind = Literal["released", "local", "demo_random", "demo_trained"]

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES: Final = ("*.safetensors", "*.json", "*.jinja")

NAMES_OF_OLDER_FILES: Final = {
    r"^model\.vpm\.": "model.vision_tower.",
    r"^model\.vit_merger\.": "model.vision_tower.vit_merger.",
}
"""Tensor names that other writers of the same model use, as patterns, and the released names."""

HASHED_SETTINGS: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""Files beside the weights that determine an answer."""

UNUSED_TENSORS: Final = ("mtp.", "model.mtp.")
"""Prefixes of tensors that a file may carry for multi-token prediction, which nothing here uses."""


@dataclass(frozen=True)
class ModelRef:
    """A model that is on this machine.

    Attributes:
        folder: where its files are.
        model_id: the name it was asked by.
        revision: commit of the hub, or the sha256 of its files.
        weights_kind: whether its answers mean something: `demo_random` ones do not.
    """

    folder: Path
    model_id: str
    revision: str
    weights_kind: WeightsKind


def resolve_model(model: str, revision: str | None = None) -> ModelRef:
    """Return the model named `model`, made or fetched where it is not here yet.

    Args:
        model: `demo`, `demo:` and a member such as `minicpmv4_5`, a local folder, or a hub id such as
            `openbmb/MiniCPM-V-4.6`.
        revision: branch, tag or commit of a hub id.

    Raises:
        ConfigError: there is no such model, it cannot be fetched, or it is of a type that does not run here.
    """
    folder = model_folder(model, revision)
    config = read_json(folder / "config.json")
    require_supported(config, folder)
    require_safetensors(folder)
    if Path(model).expanduser().is_dir() or demo_family(model):
        return ModelRef(folder, model, hash_weights(folder), kind_of_local(config))
    return ModelRef(folder, model, folder.name, "released")


def locate_model(folder: str, model: str | None, revision: str | None, kind: WeightsKind | None) -> ModelRef:
    """Return on a worker the model that a driver has resolved; what is None is found out again.

    Args:
        folder: where the driver found the files.
        model: the name the model was asked by, for a machine that lacks the folder.
        revision: the revision that the driver found.
        kind: the kind that the driver found.

    Raises:
        ConfigError: the model is neither in the folder nor to be had by its name.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        if model is None:
            raise ConfigError(f"the model folder {folder} does not exist on this machine")
        found = resolve_model(model, revision if kind == "released" else None)
        if revision is not None and found.revision != revision:
            raise ConfigError(f"model {model!r} has revision {found.revision} here, the job names {revision}")
        return found
    if kind is None:
        kind = kind_of_local(read_json(path / "config.json"))
    return ModelRef(path.resolve(), model or str(path), revision or hash_weights(path), kind)


def kind_of_local(config: dict[str, Any]) -> WeightsKind:
    """Return what kind of weights a folder with this `config.json` holds."""
    if DEMO_MARKER not in config:
        return "local"
    return "demo_trained" if config[DEMO_MARKER] == "trained" else "demo_random"


def model_folder(model: str, revision: str | None = None) -> Path:
    """Return the folder of a model's files, made or fetched where it is not here yet; nothing is hashed.

    Raises:
        ConfigError: there is no such model, it cannot be fetched, or it holds GGUF weights.
    """
    refuse_gguf(model)
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    family = demo_family(model)
    if family:
        return demo_folder(family)
    if not HUB_ID.fullmatch(model):
        raise ConfigError(f"model {model!r} is neither a folder nor a hub id; `demo` needs no download")
    return fetch_from_hub(model, revision)


def cache_folder() -> Path:
    """Return where made models and hashes are kept: `$PAGEREEL_CACHE`, or `~/.cache/pagereel`."""
    named = os.environ.get("PAGEREEL_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "pagereel"


def demo_folder(family: FamilyName) -> Path:
    """Return the folder of the demo model of a member, made now if it is not there.

    Several processes may make it at once: each writes a folder of its own, the first rename wins.

    Raises:
        ConfigError: the cache folder cannot be written.
    """
    final = cache_folder() / f"demo-{family}-{DEMO_VERSION}"
    if any(final.glob("*.safetensors")):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".demo-", dir=final.parent))
    except OSError as error:
        raise ConfigError(f"the cache folder {final.parent} cannot be written: {error}") from error
    try:
        write_tiny_model(fresh, family)
        # Temporary folders are private; a model in a shared cache must be readable.
        fresh.chmod(0o755)
        with contextlib.suppress(OSError):
            fresh.rename(final)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    if not any(final.glob("*.safetensors")):
        raise ConfigError(f"{final} is in the way of the demo model: remove it")
    return final


def fetch_from_hub(model: str, revision: str | None) -> Path:
    """Return the folder of a hub model's snapshot; weights as safetensors only, no code.

    Raises:
        ConfigError: the hub or the model cannot be reached.
    """
    # Imported here: local runs need no network client.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(HUB_FILES)))
    # The hub's client raises OSError, ValueError and its HTTP library's RuntimeError kin, by version.
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model {model!r} cannot be fetched ({reason}); use `--model demo`, or the path of a local folder"
        ) from error


def require_safetensors(folder: Path) -> list[Path]:
    """Return the weight files of `folder`, in the order of their names.

    Raises:
        ConfigError: there are none (other formats are not read, since loading them may run code), or one is cut off.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} holds no .safetensors weights; no other format is loaded")
    for path in files:
        require_whole(path)
    return files


def require_whole(path: Path) -> None:
    """Raise `ConfigError` unless a weight file is as long as its header says: a copy that broke off is common."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(header_bytes, size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        wanted = 8 + header_bytes + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no safetensors file ({size} bytes)") from error
    if size < wanted:
        raise ConfigError(f"{path} is cut off: {size} bytes of {wanted}")


def hash_weights(folder: Path) -> str:
    """Return one hash of everything in `folder` that determines an answer: weights, config and tokenizer."""
    files = [folder / name for name in HASHED_SETTINGS if (folder / name).exists()]
    parts = [part for path in [*files, *require_safetensors(folder)] for part in (path.name, hash_file(path))]
    return digest(*parts)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, remembered by its path, size and modification time."""
    facts = path.stat()
    key = f"{path.resolve()}|{facts.st_size}|{facts.st_mtime_ns}"
    remembered = cache_folder() / "hashes" / f"{digest(str(path.resolve()))}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(remembered.read_text(encoding="utf-8"))
        if known["key"] == key:
            return str(known["sha256"])
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    # A read-only cache costs time, not correctness.
    with contextlib.suppress(OSError):
        remembered.parent.mkdir(parents=True, exist_ok=True)
        fresh = remembered.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps({"key": key, "sha256": sha256}), encoding="utf-8")
        fresh.replace(remembered)
    return sha256
