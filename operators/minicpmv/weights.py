"""Where a model's files are, and which weights exactly they hold. No torch: CPU workers import it for tokenizers."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from operators.minicpmv.config import DEMO_MARKER, read_json, refuse_gguf, require_supported
from operators.minicpmv.demo import DEMO_VERSION, demo_family
from operators.minicpmv.family import FamilyName
from operators.minicpmv.requirements import require_layout
from operators.minicpmv.tiny import write_tiny_model
from schemas.errors import ConfigError
from schemas.ids import digest

WeightsKind = Literal["released", "local", "demo_random", "demo_trained"]

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES: Final = ("*.safetensors", "*.json", "*.jinja")
HUB_SUBFOLDERS: Final = ("*/*",)
"""Other formats, parts and checkpoints of training, none of which is read."""

ONE_FILE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

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
    refuse_adapter(folder)
    config = read_json(folder / "config.json")
    require_layout(config, require_supported(config, folder), folder)
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
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_SUBFOLDERS)
            )
        )
    # The hub's client raises OSError, ValueError and its HTTP library's RuntimeError kin, by version.
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model {model!r} cannot be fetched ({reason}); use `--model demo`, or the path of a local folder"
        ) from error


def refuse_adapter(folder: Path) -> None:
    """Raise `ConfigError` when `folder` holds a LoRA adapter, with or without a model beside it."""
    if not (folder / "adapter_config.json").exists():
        return
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    into = f"its base model, {base}," if base else "its base model"
    raise ConfigError(
        f"{folder} holds a LoRA adapter (adapter_config.json): merge it into {into} with merge_and_unload of peft, "
        "save that, and name the folder it is saved in"
    )


def require_safetensors(folder: Path) -> list[Path]:
    """Return the weight files of `folder`, in the order of their names.

    Raises:
        ConfigError: there are none (other formats are not read, since loading them may run code), or one is missing or
            cut off.
    """
    files = weight_files(folder)
    for path in files:
        read_header(path)
    return files


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of `folder`: the only one, or those that its index names.

    Raises:
        ConfigError: there are none, there is no index for several, or the index names files that are not there.
    """
    if (folder / ONE_FILE).exists():
        return [folder / ONE_FILE]
    if not (folder / INDEX).exists():
        parts = sorted(path.name for path in folder.glob("*.safetensors"))
        if not parts:
            raise ConfigError(f"{folder} holds no .safetensors weights; no other format is loaded")
        raise ConfigError(f"{folder} holds {shortened(parts)}, and neither {ONE_FILE} nor {INDEX}")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ConfigError(f"{folder / INDEX} has no weight_map, which says where each tensor is")
    names = sorted({str(name) for name in places.values()})
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise ConfigError(f"{folder} lacks {len(absent)} of the {len(names)} files of its index: {shortened(absent)}")
    return [folder / name for name in names]


def shortened(names: Sequence[str], most: int = 5) -> str:
    """Return the first of `names`, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_header(path: Path) -> dict[str, Any]:
    """Return what a weight file says of each tensor in it.

    Raises:
        ConfigError: it is not as long as its header says (a copy that broke off is common), or no such file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(header_bytes, size)))
        tensors: dict[str, Any] = {name: entry for name, entry in header.items() if name != "__metadata__"}
        wanted = 8 + header_bytes + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no safetensors file ({size} bytes)") from error
    if size < wanted:
        raise ConfigError(f"{path} is cut off: {size} bytes of {wanted}")
    return tensors


def tensor_names(folder: Path) -> list[str]:
    """Return the name of every tensor in the weight files of `folder`."""
    return [name for path in weight_files(folder) for name in read_header(path)]


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
