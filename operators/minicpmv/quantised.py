"""Quantised folders: which layers are stored in few bits is read off the files, not off the lists beside them.

The lists differ by tool and by version in how they match, and most of them name layers of the text model alone.
"""

from collections.abc import Iterable
from typing import Any, Final

from schemas.errors import ConfigError

QUANTISED_SUFFIXES: Final = (".qweight", ".weight.absmax", ".SCB")
"""Ends of the tensors that only a quantised layer has: of AWQ and GPTQ, and of bitsandbytes in 4 and in 8 bits."""


def fit_quantisation(
    method: str, settings: dict[str, Any], names: Iterable[str], head: str, dtype: str
) -> dict[str, Any]:
    """Return a `quantization_config` that says of exactly those layers that they are quantised which are.

    Args:
        method: by which they are.
        settings: the `quantization_config` of the model.
        names: every tensor of the files, by its released name.
        head: name of the output layer, which has no tensor of its own where it is tied to the embeddings.
        dtype: of activations, as torch calls it.

    Raises:
        ConfigError: layers outside the text model are quantised by GPTQ, which transformers does not load.
    """
    found = list(names)
    quantised = sorted({name.removesuffix(end) for name in found for end in QUANTISED_SUFFIXES if name.endswith(end)})
    stems = {name.removesuffix(".weight") for name in found if name.endswith(".weight")} | {head}
    plain = sorted(stems - set(quantised))
    if method == "bitsandbytes":
        # In the type that was asked for: files say what their maker's GPU ran best in.
        return settings | {"llm_int8_skip_modules": plain, "bnb_4bit_compute_dtype": dtype}
    if method == "awq":
        return settings | {"modules_to_not_convert": plain}
    return settings | {"block_name_to_quantize": common_block(quantised), "modules_in_block_to_quantize": [quantised]}


def common_block(quantised: list[str]) -> str:
    """Return the name of the list of layers that holds all quantised ones.

    Raises:
        ConfigError: there is none.
    """
    blocks = {name.partition(".layers.")[0] for name in quantised}
    if len(blocks) != 1 or not all(".layers." in name for name in quantised):
        raise ConfigError(f"GPTQ weights are read in the layers of the text model alone, found: {sorted(blocks)}")
    return f"{blocks.pop()}.layers"
