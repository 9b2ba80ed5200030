"""Safetensors in a folder become a network; tensors that are missing or do not belong are named."""

from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from transformers.utils import logging as transformers_logging

from operators.minicpmv.config import Attention, read_json
from operators.minicpmv.family import Family, find_family
from operators.minicpmv.network import Network, network_class, network_config, parts_of
from operators.minicpmv.weights import NAMES_OF_OLDER_FILES, require_safetensors
from schemas.errors import ConfigError

LISTED: Final = 20
"""Names of tensors that a message shows of each kind."""


def load_network(folder: Path, dtype: torch.dtype, attention: Attention) -> Network:
    """Return the network in `folder`, on the CPU.

    Raises:
        ConfigError: the weights are not safetensors, or do not match the model.
    """
    require_safetensors(folder)
    settings = read_json(folder / "config.json")
    family = find_family(settings)
    # A worker has no terminal: its bars would be lines in somebody's log.
    transformers_logging.disable_progress_bar()
    try:
        whole, found = network_class(family).from_pretrained(
            folder,
            config=network_config(family, settings),
            dtype=dtype,
            attn_implementation=attention,
            key_mapping=NAMES_OF_OLDER_FILES if family.connector == "merger" else None,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            # Reported here, and refused below with all other differences at once.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        refuse(folder, f"cannot be loaded: {error}", error)
    require_all(folder, family, found)
    return parts_of(whole.eval(), family)


def require_all(folder: Path, family: Family, found: dict[str, Any]) -> None:
    """Raise `ConfigError` when tensors are missing, do not belong, or have another shape."""
    unused = [name for name in found["unexpected_keys"] if not name.startswith(family.unused_tensors)]
    problems = {
        "missing": sorted(found["missing_keys"]),
        "unexpected": sorted(unused),
        "of another shape": sorted(str(entry[0]) for entry in found["mismatched_keys"]),
    }
    listed = [f"{kind}: {', '.join(names[:LISTED])} ({len(names)})" for kind, names in problems.items() if names]
    if listed:
        refuse(folder, "tensors do not match the model; " + "; ".join(listed))


def refuse(folder: Path, reason: str, cause: Exception | None = None) -> NoReturn:
    """Raise `ConfigError` for the model in `folder`."""
    raise ConfigError(f"{folder}: {reason}") from cause
