"""What the benchmark of the engine runs: a network with random weights, and requests of many lengths."""

import json
import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

from jobs.bench.vision_work import fill
from operators.engine.request import Request, SamplingParams
from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.prompt import PromptBuilder, PromptSettings, image_tokens
from operators.minicpmv.slicing import Size, SliceConfig
from operators.minicpmv.tiny import write_tiny_model
from operators.minicpmv.visual import Visual
from schemas.image import Grid

TEXT: Final[dict[str, dict[str, Any]]] = {
    "middle": {
        "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "linear_num_key_heads": 8, "linear_num_value_heads": 8,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64, "full_attention_interval": 4,
    },
    "full": {
        "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "full_attention_interval": 4, "vocab_size": 248094,
    },
}  # fmt: skip
VISION: Final[dict[str, dict[str, Any]]] = {
    "middle": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4},
    "full": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
}
PICTURES: Final = ((28, 40), (40, 28), (32, 32), (36, 28))
"""Rows and columns of patches of an overview or slice."""

GRIDS: Final = ((0, 0), (1, 2), (2, 2), (2, 3), (3, 3))
MEAN_LOG_TOKENS: Final = 5.6
SPREAD_LOG_TOKENS: Final = 1.1
"""Answers of OCR: a half below 270 tokens, a tenth above 1,100."""


class EndlessModel(MiniCPMV):
    """A model that no token ends: each answer is as long as its request says."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return none."""
        return ()


def write_model(
    folder: Path, scale: str, device: torch.device, dtype: torch.dtype, vocabulary: int | None = None
) -> None:
    """Write a network of this scale with random weights in the official layout; `vocabulary` tokens where given."""
    write_tiny_model(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"] |= TEXT[scale] | {"layer_types": None}
    if vocabulary:
        settings["text_config"]["vocab_size"] = vocabulary
    settings["vision_config"] |= VISION[scale]
    settings["insert_layer_id"] = 6 if scale == "full" else 1
    settings["text_config"].pop("layer_types")
    config = MiniCPMV4_6Config(**settings)
    with torch.device(device):
        network = MiniCPMV4_6ForConditionalGeneration(config)
    fill(network, device)
    network.to(dtype).save_pretrained(folder)


def answer_lengths(count: int, longest: int, seed: int = 46) -> list[int]:
    """Return lengths of answers spread like those of OCR, 16 to `longest` tokens."""
    drawn = np.random.default_rng(seed).lognormal(MEAN_LOG_TOKENS, SPREAD_LOG_TOKENS, count)
    return [int(length) for length in np.clip(drawn, 16, longest)]


def make_requests(model: MiniCPMV, count: int, longest: int, max_slices: int) -> list[Request[Visual | None]]:
    """Return pages of many shapes and some clips, each with an answer of its own length."""
    generator = np.random.default_rng(45)
    builder = PromptBuilder(model.config)
    requests: list[Request[Visual | None]] = []
    for number, length in enumerate(answer_lengths(count, longest)):
        is_clip = number % 6 == 5
        rows, cols = PICTURES[int(generator.integers(len(PICTURES)))]
        size = Size(rows * 14, cols * 14)
        known = [grid for grid in GRIDS if math.prod(grid) <= max_slices]
        grids = [Grid(0, 0)] * 4 if is_clip else [Grid(*known[int(generator.integers(len(known)))])]
        shapes = [size for grid in grids for _ in range(1 + grid.rows * grid.cols)]
        pixels = generator.integers(0, 256, sum(size.height_px * size.width_px * 3 for size in shapes), np.uint8)
        settings = PromptSettings(kind="video" if is_clip else "image", use_image_id=not is_clip)
        ids = builder.build("Read this.", image_tokens(shapes, grids, SliceConfig()), settings)
        requests.append(Request(tuple(ids), SamplingParams(max_new_tokens=length), Visual(pixels, tuple(shapes))))
    return requests
