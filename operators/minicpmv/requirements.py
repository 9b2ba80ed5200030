"""What a model must be, and what must be installed, for it to run here: asked before anything is loaded. No torch."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from operators.minicpmv.family import Family
from schemas.errors import ConfigError

HEAD_WIDTH: Final = 128
"""Width of a head of every released resampler."""

PAIR: Final = (2, 2)


@dataclass(frozen=True)
class Quantiser:
    """A way to store weights in few bits.

    Attributes:
        title: the name people know.
        packages: what transformers needs to run it, by the names of pip and of Python, which are the same.
        gpu_dtypes: types of activations that its GPU kernels take; empty: all.
    """

    title: str
    packages: tuple[str, ...]
    gpu_dtypes: tuple[str, ...] = ()


QUANTISERS: Final = {
    "bitsandbytes": Quantiser("bitsandbytes", ("accelerate", "bitsandbytes")),
    "awq": Quantiser("AWQ", ("accelerate", "gptqmodel"), gpu_dtypes=("fp16",)),
    "gptq": Quantiser("GPTQ", ("accelerate", "optimum", "gptqmodel")),
}
"""By the name that `config.json` gives the method.

Source:
    The quantizers of transformers 5.23 (`quantizers/quantizer_bnb_4bit.py`, `quantizer_awq.py`, `quantizer_gptq.py`).
"""


def require_layout(config: dict[str, Any], family: Family, folder: Path) -> None:
    """Raise `ConfigError` where the architecture differs from what the batched pass computes."""
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        raise ConfigError(f"{folder}: config.json describes no vision_config")
    facts = merger_facts(config, vision) if family.connector == "merger" else resampler_facts(config)
    for name, found, holds, wanted in facts:
        if not holds:
            raise ConfigError(f"{folder}: config.json says {name} {found!r}; only {wanted} is supported")


def merger_facts(config: dict[str, Any], vision: dict[str, Any]) -> Iterator[tuple[str, Any, bool, str]]:
    """Yield name and value of each number that the mergers need, whether it will do, and what would."""
    times = config.get("merger_times", 1)
    yield "merger_times", times, times == 1, "1"
    for holder, name in ((config, "merge_kernel_size"), (vision, "window_kernel_size")):
        size = holder.get(name, PAIR)
        yield name, size, isinstance(size, list | tuple) and tuple(size) == PAIR, "[2, 2]"
    after, layers = config.get("insert_layer_id", 6), vision.get("num_hidden_layers", 27)
    in_tower = isinstance(after, int) and isinstance(layers, int) and 0 <= after < layers
    yield "insert_layer_id", after, in_tower, "the number of a layer of the vision tower"


def resampler_facts(config: dict[str, Any]) -> Iterator[tuple[str, Any, bool, str]]:
    """Yield name and value of each number that a resampler needs, whether it will do, and what would."""
    queries = config.get("query_num", 64)
    yield "query_num", queries, isinstance(queries, int) and queries > 0, "a number above 0"
    width = config.get("hidden_size")
    # Positions fill a quarter of the channels each with sines and cosines of rows and columns.
    fits = isinstance(width, int) and width > 0 and width % max(width // HEAD_WIDTH, 1) == 0 and width % 4 == 0
    yield "hidden_size", width, fits, f"a width that divides into heads of about {HEAD_WIDTH} and by 4"


def require_quantiser(method: str | None, folder: Path) -> None:
    """Raise `ConfigError` unless weights that are quantised by `method`, None for plain ones, can be read here."""
    if method is None:
        return
    if method not in QUANTISERS:
        known = ", ".join(quantiser.title for quantiser in QUANTISERS.values())
        raise ConfigError(f"{folder}: weights quantised by {method!r} are not supported; supported: {known}")
    quantiser = QUANTISERS[method]
    missing = [name for name in quantiser.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{folder}: its {quantiser.title} weights need {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def activation_dtype(method: str | None, wanted: str, *, on_gpu: bool) -> str:
    """Return the type of activations, `bf16`, `fp16` or `fp32`.

    Args:
        method: by which the weights are quantised; None for plain ones.
        wanted: one of them, or `auto`.
        on_gpu: whether the model runs on a GPU.

    Raises:
        ConfigError: the kernels of the method do not take the type that is asked for.
    """
    allowed = QUANTISERS[method].gpu_dtypes if on_gpu and method in QUANTISERS else ()
    if wanted == "auto":
        return allowed[0] if allowed else "bf16" if on_gpu else "fp32"
    if allowed and wanted not in allowed:
        title = QUANTISERS[str(method)].title
        raise ConfigError(f"{title} weights do not run in {wanted} on a GPU: use --dtype {allowed[0]} or auto")
    return wanted
