"""Where a model runs, and in which number format."""

from typing import Final, Literal

import torch

from schemas.errors import ConfigError

DTYPES: Final = {"bf16": torch.bfloat16, "fp32": torch.float32}


def choose_device(wanted: Literal["auto", "cuda", "cpu"]) -> torch.device:
    """Return the device to run on.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device cuda is asked for, and torch {torch.__version__} finds none")
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)


def choose_dtype(wanted: Literal["auto", "bf16", "fp32"], device: torch.device) -> torch.dtype:
    """Return the type of weights and activations."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[wanted]
