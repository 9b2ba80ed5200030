"""Folders in four bits as transformers and bitsandbytes write them, and the same numbers in plain ones."""

import shutil
from pathlib import Path

import bitsandbytes
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from operators.minicpmv.config import read_json
from operators.minicpmv.family import find_family
from operators.minicpmv.network import network_class, network_config
from tests.operators.members import change_json

OFFICIAL = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": ["out_proj", "kv_proj", "lm_head"],
}
"""What the published int4 folders of the family are said to be made with."""


def write_four_bits(source: Path, packed: Path, plain: Path) -> None:
    """Write the model in `source` quantised into `packed`, and what its layers stand for into `plain`."""
    transformers_logging.disable_progress_bar()
    settings = read_json(source / "config.json")
    family = find_family(settings)
    whole = network_class(family).from_pretrained(
        source,
        config=network_config(family, settings),
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(**OFFICIAL),
    )
    for folder in (packed, plain):
        shutil.copytree(source, folder, dirs_exist_ok=True)
    whole.save_pretrained(packed)
    shutil.copy(source / "config.json", packed)
    change_json(packed / "config.json", quantization_config=OFFICIAL | {"quant_method": "bitsandbytes"})
    values = load_file(packed / "model.safetensors")
    for name, module in whole.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            values[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    kept = {name: value.float().contiguous() for name, value in values.items() if ".weight." not in name}
    save_file(kept, plain / "model.safetensors", {"format": "pt"})
