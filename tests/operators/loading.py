"""Folders of weights to be loaded or changed, and what their networks answer."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from operators.minicpmv.encoder import VisionEncoder
from operators.minicpmv.family import FAMILIES
from operators.minicpmv.load import load_network
from operators.minicpmv.slicing import Size
from operators.minicpmv.visual import Visual
from schemas.errors import ConfigError
from tests.operators.members import RESAMPLERS

CPU = torch.device("cpu")
META = torch.device("meta")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load(folder, dtype=torch.float32):
    return load_network(folder, dtype, "sdpa")


def rewrite(folder, change):
    """Put `change` of its tensors into the one file of a folder."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def renamed(pairs):
    def change(values):
        names = {name: name for name in values}
        for old, new in pairs:
            names = {name: new + known.removeprefix(old) if known.startswith(old) else known
                     for name, known in names.items()}  # fmt: skip
        return {names[name]: value for name, value in values.items()}

    return change


def refusal(folder):
    """Return the one line in which a folder is refused."""
    with pytest.raises(ConfigError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message


def logits_of(network, dtype=torch.float32):
    ids = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        embedded = network.embed(ids).to(dtype)
        return network.logits(network.text(inputs_embeds=embedded).last_hidden_state).float()


def features_of(network, name):
    pixels = np.random.default_rng(0).integers(0, 256, 448 * 560 * 3, dtype=np.uint8)
    encoder = VisionEncoder(network, FAMILIES[name], 14, CPU)
    with torch.inference_mode():
        [found] = encoder.encode([Visual(pixels, (Size(448, 560),))], [0 if name in RESAMPLERS else 2])
    return found.float()
