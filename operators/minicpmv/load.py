"""Safetensors in a folder become a network; tensors that are missing or do not belong are named.

Plain weights are mapped from their files, not read: one that keeps its type takes no memory of its own, and one that
changes its type is converted alone. So a model never takes its size twice.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from operators.minicpmv.config import Attention, quantization_method, read_json, require_supported
from operators.minicpmv.family import Family
from operators.minicpmv.network import HEADS, Network, network_class, network_config, parts_of
from operators.minicpmv.quantised import fit_quantisation
from operators.minicpmv.requirements import require_layout, require_quantiser
from operators.minicpmv.spread import spread_network
from operators.minicpmv.weights import (
    NAMES_OF_OLDER_FILES,
    refuse_adapter,
    require_safetensors,
    shortened,
    tensor_names,
)
from schemas.errors import ConfigError

LISTED: Final = 10
"""Names of tensors that a message shows of each kind."""

CPU: Final = (torch.device("cpu"),)

UNREADABLE: Final = (
    OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip
"""What transformers and the libraries below it raise for a `config.json` or weights that they cannot read."""


def load_network(
    folder: Path, dtype: torch.dtype, attention: Attention, devices: Sequence[torch.device] = CPU
) -> Network:
    """Return the network in `folder`.

    Args:
        folder: config and safetensors.
        dtype: of activations, and of weights that are not quantised.
        attention: attention implementation of the text model.
        devices: where it goes; several share the layers of the text model.

    Raises:
        ConfigError: the model is none that runs here, its weights are not safetensors or do not match it, or a package
            that reads them is not installed.
    """
    refuse_adapter(folder)
    settings = read_json(folder / "config.json")
    family = require_supported(settings, folder)
    require_layout(settings, family, folder)
    require_safetensors(folder)
    quantised = quantised_options(folder, settings, family, dtype, devices)
    try:
        with quiet():
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
                **quantised,
            )
    except UNREADABLE as error:
        refuse(folder, f"cannot be loaded: {one_line(error)}", error)
    require_all(folder, family, found)
    if quantised:
        cast_plain(whole, dtype)
        unpack_on_cpu(whole)
    network = parts_of(whole.eval(), family)
    if len(devices) > 1:
        spread_network(network, devices)
    elif not quantised:
        network.whole.to(devices[0])
    return network


def quantised_options(
    folder: Path, settings: dict[str, Any], family: Family, dtype: torch.dtype, devices: Sequence[torch.device]
) -> dict[str, Any]:
    """Return what loading quantised weights needs besides, and put into `settings` which layers are; {} for plain ones.

    Raises:
        ConfigError: they cannot be read here, or not on several devices.
    """
    method = quantization_method(settings)
    if method is None:
        return {}
    require_quantiser(method, folder)
    if len(devices) > 1:
        refuse(folder, f"weights quantised by {method} are not spread over {len(devices)} GPUs: give a worker one")
    names = tensor_names(folder)
    if family.connector == "merger":
        names = [released_name(name) for name in names]
    compute = str(dtype).removeprefix("torch.")
    try:
        fitted = fit_quantisation(method, settings["quantization_config"], names, HEADS[family.connector], compute)
    except ConfigError as error:
        refuse(folder, str(error), error)
    settings["quantization_config"] = fitted
    device = devices[0]
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    # Their kernels are chosen by the device, and packed for it.
    return {"device_map": {"": device}}


def cast_plain(whole: Any, dtype: torch.dtype) -> None:
    """Give the weights that are not quantised the type that was asked for: beside others, transformers leaves them."""
    for parameter in whole.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(dtype)


def unpack_on_cpu(whole: Any) -> None:
    """Let 4-bit layers of bitsandbytes unpack their weights on a CPU, one layer at a time.

    Its kernel for CPUs with bfloat16 instructions, which it would take, fails on widths that are no multiples of 64,
    and the tower of every member has one of 4304 (bitsandbytes 0.50).
    """
    for module in whole.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def released_name(name: str) -> str:
    """Return the released name of a tensor of a merger member."""
    for older, released in NAMES_OF_OLDER_FILES.items():
        name = re.sub(older, released, name)
    return name


def require_all(folder: Path, family: Family, found: dict[str, Any]) -> None:
    """Raise `ConfigError` when tensors are missing, do not belong, or have another shape."""
    unused = [name for name in found["unexpected_keys"] if not name.startswith(family.unused_tensors)]
    problems = {
        "missing": sorted(found["missing_keys"]),
        "unexpected": sorted(unused),
        "of another shape": sorted(str(entry[0]) for entry in found["mismatched_keys"]),
    }
    prefix = shared_prefix(problems["missing"], problems["unexpected"])
    if prefix:
        refuse(folder, f"every tensor's name begins with {prefix!r}: save the model itself, not what wraps it")
    listed = [f"{len(names)} {kind}: {shortened(names, LISTED)}" for kind, names in problems.items() if names]
    if listed:
        refuse(folder, f"tensors do not match {family.title}; {'; '.join(listed)}")


def shared_prefix(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Return what stands before every unexpected name that makes a missing one of the rest; empty for no such thing."""
    ends = [wanted for wanted in missing if unexpected and unexpected[0].endswith("." + wanted)]
    prefix = unexpected[0].removesuffix(ends[0]) if ends else ""
    rest = {name.removeprefix(prefix) for name in unexpected}
    return prefix if rest <= set(missing) else ""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing bars, which a worker has no terminal for, and tables of tensors that we name."""
    transformers_logging.disable_progress_bar()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)


def is_error(record: logging.LogRecord) -> bool:
    """Return whether a log record is more than a warning."""
    return record.levelno >= logging.ERROR


def one_line(error: Exception) -> str:
    """Return what `error` says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def refuse(folder: Path, reason: str, cause: Exception | None = None) -> NoReturn:
    """Raise `ConfigError` for the model in `folder`."""
    raise ConfigError(f"{folder}: {reason}") from cause
