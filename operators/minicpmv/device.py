"""Where a model runs, and in which number format."""

from typing import Final, Literal

import torch

from operators.minicpmv.requirements import activation_dtype
from schemas.errors import ConfigError

DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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


def choose_devices(wanted: Literal["auto", "cuda", "cpu"], count: int) -> tuple[torch.device, ...]:
    """Return the devices that share one model.

    Args:
        wanted: where; `auto` is CUDA where there is one.
        count: GPUs; a CPU is one device whatever the count.

    Raises:
        ConfigError: CUDA is asked for and there is none, or there are fewer GPUs than asked for.
    """
    device = choose_device(wanted)
    if device.type == "cpu" or count == 1:
        return (device,)
    here = torch.cuda.device_count()
    if count > here:
        raise ConfigError(f"one model is to be spread over {count} GPUs, and torch finds {here}")
    return tuple(torch.device("cuda", index) for index in range(count))


def choose_dtype(
    wanted: Literal["auto", "bf16", "fp16", "fp32"], device: torch.device, quantization: str | None = None
) -> torch.dtype:
    """Return the type of weights and activations.

    Args:
        wanted: which; `auto` is bf16 on a GPU and fp32 on a CPU, where the weights run in it.
        device: where they are.
        quantization: method by which the weights are quantised; None for plain ones.

    Raises:
        ConfigError: quantised weights do not run in the type that is asked for.
    """
    return DTYPES[activation_dtype(quantization, wanted, on_gpu=device.type == "cuda")]
