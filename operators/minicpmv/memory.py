"""How much memory a model takes: from `config.json` and the headers of its weight files alone, nothing is loaded.

Bytes of a pass are those of its tensors where most are alive at once, from the layers as they are computed here. What
PyTorch allocates lies between half of an estimate and a tenth above it: tests hold both to that.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from operators.minicpmv.config import ModelConfig, read_json, text_settings
from operators.minicpmv.family import Family
from operators.minicpmv.prompt import PromptBuilder, PromptSettings, image_tokens
from operators.minicpmv.slicing import Size, SliceConfig, plan_slices
from operators.minicpmv.temporal import CONFIG_OF_RULE, Timeline, plan_clip
from operators.minicpmv.weights import read_header, weight_files

DTYPE_BYTES: Final = {"bf16": 2, "fp16": 2, "fp32": 4}
FLOAT_TYPES: Final = ("F64", "F32", "F16", "BF16")
"""Types of stored weights that are converted when they are loaded."""

FLOAT32_BYTES: Final = 4
CHANNELS: Final = 3
CHUNK_TOKENS: Final = 64
"""Tokens that a linear-attention layer takes at once in a prefill."""

SPARE: Final = 0.1
"""Share of the free memory that is left alone: fragments, workspaces of libraries, the samples of a step."""

MOST_ROWS: Final = 4096
"""Where the search for the largest batch ends."""


@dataclass(frozen=True)
class Load:
    """What one record asks of a model.

    Attributes:
        prompt_tokens: all of them, those of the pictures included.
        visual_tokens: those of the pictures.
        new_tokens: longest answer.
        slices, patches: of all pictures.
        patches_of_largest: of the largest group of slices that goes through the tower together.
    """

    prompt_tokens: int
    visual_tokens: int
    new_tokens: int
    slices: int
    patches: int
    patches_of_largest: int


@dataclass(frozen=True)
class ModelMemory:
    """Bytes that a model takes.

    Attributes:
        weights: all of them.
        cache_per_token: keys and values of one token in all layers.
        state_per_record: what linear-attention layers keep of a sequence of any length.
        vision_per_patch: of a call of the vision pass at its widest.
        patches_per_call: patches that go through the tower at once.
        prefill_per_token: of a prefill at its widest.
        per_visual_token: of a visual token that waits for the prefill.
        mask_per_pair: of a pair of tokens in the mask of a padded batch.
        logits_per_record: of the scores of one step.
    """

    weights: int
    cache_per_token: int
    state_per_record: int
    vision_per_patch: int
    patches_per_call: int
    prefill_per_token: int
    per_visual_token: int
    mask_per_pair: int
    logits_per_record: int

    def cache(self, load: Load) -> int:
        """Return the bytes that a record keeps to the end of its answer."""
        return (load.prompt_tokens + load.new_tokens) * self.cache_per_token + self.state_per_record

    def vision(self, load: Load, rows: int) -> int:
        """Return the bytes of the widest call of the vision pass for `rows` such records."""
        bound = max(self.patches_per_call, load.patches_of_largest)
        return min(rows * load.patches, bound) * self.vision_per_patch

    def prefill(self, load: Load, rows: int) -> int:
        """Return the bytes of the prefill of `rows` such records at its widest."""
        padded = load.prompt_tokens * self.mask_per_pair if rows > 1 else 0
        tokens = rows * load.prompt_tokens * (self.prefill_per_token + padded)
        return tokens + rows * self.logits_per_record

    def needed(self, load: Load, rows: int) -> int:
        """Return the bytes that a batch of `rows` such records needs at its widest, the weights included."""
        waiting = rows * load.visual_tokens * self.per_visual_token
        widest = max(self.vision(load, rows), self.prefill(load, rows))
        return self.weights + rows * self.cache(load) + waiting + widest

    def widest_pass(self, token_count: int) -> int:
        """Return the bytes of the widest pass beside what is kept: over pictures, or over so many prompt tokens."""
        return max(self.patches_per_call * self.vision_per_patch, token_count * self.prefill_per_token)

    def largest_batch(self, load: Load, free_bytes: int) -> int:
        """Return how many such records fit at once into free memory; 0 when not even one does."""
        room = int(free_bytes * (1 - SPARE))
        low, high = 0, MOST_ROWS
        while low < high:
            middle = (low + high + 1) // 2
            if self.needed(load, middle) <= room:
                low = middle
            else:
                high = middle - 1
        return low


def estimate_memory(model: ModelConfig, dtype: str, patches_per_call: int) -> ModelMemory:
    """Return what the model in a folder takes.

    Args:
        model: its configuration.
        dtype: of weights that are not quantised, and of activations: `bf16`, `fp16` or `fp32`.
        patches_per_call: patches that go through the tower at once.

    Raises:
        ConfigError: a weight file is missing or cut off.
    """
    settings = read_json(model.folder / "config.json")
    text, vision = text_settings(settings, model.family), settings["vision_config"]
    size = DTYPE_BYTES[dtype]
    return ModelMemory(
        weights=weight_bytes(model, size),
        cache_per_token=cache_bytes_per_token(text, model.family, size),
        state_per_record=state_bytes(text, model.family, size),
        vision_per_patch=vision_bytes_per_patch(vision, text, model, size),
        patches_per_call=patches_per_call,
        prefill_per_token=prefill_bytes_per_token(text, model.family, size),
        per_visual_token=text["hidden_size"] * size,
        # A mask of truths, and the numbers that some kernels make of it.
        mask_per_pair=1 + size,
        # The scores, and twice in float32: as they are compared, and what their probabilities are made of.
        logits_per_record=text["vocab_size"] * (size + 2 * FLOAT32_BYTES),
    )


def weight_bytes(model: ModelConfig, dtype_bytes: int) -> int:
    """Return the bytes of all weights that the model uses, quantised ones as they are stored."""
    total = 0
    for path in weight_files(model.folder):
        for name, entry in read_header(path).items():
            if name.startswith(model.family.unused_tensors):
                continue
            if model.quantization is None and entry["dtype"] in FLOAT_TYPES:
                total += math.prod(entry["shape"]) * dtype_bytes
            else:
                start, stop = entry["data_offsets"]
                total += stop - start
    return total


def head_width(text: dict[str, Any]) -> int:
    """Return the width of a head of the text model."""
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def linear_layers(text: dict[str, Any], family: Family) -> int:
    """Return how many layers of the text model keep a state instead of keys and values."""
    if family.backbone != "qwen3_5_text":
        return 0
    layers = int(text["num_hidden_layers"])
    kinds = text.get("layer_types")
    if kinds is None:
        return layers - layers // int(text.get("full_attention_interval", 4))
    return sum(kind == "linear_attention" for kind in kinds)


def linear_widths(text: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return of a linear-attention layer: heads, key width of a head, width of all keys, width of all values."""
    heads, key_heads = int(text["linear_num_value_heads"]), int(text["linear_num_key_heads"])
    key_width = int(text["linear_key_head_dim"])
    return heads, key_width, key_heads * key_width, heads * int(text["linear_value_head_dim"])


def cache_bytes_per_token(text: dict[str, Any], family: Family, dtype_bytes: int) -> int:
    """Return the bytes of the keys and values of one token in all layers that have them."""
    layers = int(text["num_hidden_layers"]) - linear_layers(text, family)
    heads = int(text.get("num_key_value_heads") or text["num_attention_heads"])
    return layers * 2 * heads * head_width(text) * dtype_bytes


def state_bytes(text: dict[str, Any], family: Family, dtype_bytes: int) -> int:
    """Return the bytes that linear-attention layers keep of a sequence: states in float32, and the last inputs."""
    layers = linear_layers(text, family)
    if not layers:
        return 0
    _, key_width, keys, values = linear_widths(text)
    recurrent = key_width * values * FLOAT32_BYTES
    convolved = (2 * keys + values) * int(text["linear_conv_kernel_dim"]) * dtype_bytes
    return layers * (recurrent + convolved)


def vision_bytes_per_patch(vision: dict[str, Any], text: dict[str, Any], model: ModelConfig, dtype_bytes: int) -> int:
    """Return the bytes of a patch where the vision pass is widest.

    In the tower that is inside a network of two layers (the sum so far, its norm, both sides of the activation), or in
    attention between slices of different sizes (the sum, its norm, queries, keys and values twice, the result twice).
    In a resampler it is where keys and values are made from what is projected and from that with its place. The pixels
    stay beside all of it.
    """
    width, inner = int(vision["hidden_size"]), int(vision["intermediate_size"])
    pixels = CHANNELS * model.slicing.patch_px**2 * FLOAT32_BYTES
    widest = max(2 * width + 2 * inner, 10 * width)
    if model.family.connector == "resampler":
        widest = max(widest, width + 4 * int(text["hidden_size"]))
    return pixels + widest * dtype_bytes


def prefill_bytes_per_token(text: dict[str, Any], family: Family, dtype_bytes: int) -> int:
    """Return the bytes of a token where the prefill is widest.

    In a layer with keys and values that is inside its gated network: the embeddings, the sum, its norm, and three
    tensors of the inner width. A linear-attention layer without kernels of its own computes in float32.
    """
    width, inner = int(text["hidden_size"]), int(text["intermediate_size"])
    queries = int(text["num_attention_heads"]) * head_width(text)
    widest = (4 * width + max(3 * inner, 5 * queries)) * dtype_bytes
    if linear_layers(text, family):
        heads, key_width, keys, values = linear_widths(text)
        projected = (4 * width + 2 * keys + 2 * values) * dtype_bytes
        chunked = (6 * heads * key_width + 5 * values + 4 * heads * CHUNK_TOKENS) * FLOAT32_BYTES
        widest = max(widest, projected + chunked)
    return widest


def page_load(model: ModelConfig, size: Size, text: str, new_tokens: int) -> Load:
    """Return what a page of this size asks of a model, with the model's own limits on slicing.

    Args:
        model: the model.
        size: of the rendered page.
        text: the instruction.
        new_tokens: longest answer.
    """
    settings = PromptSettings(kind="image", use_image_id=model.use_image_id)
    return _load(model, [(size, 1)], model.slicing, text, settings, new_tokens)


def clip_load(model: ModelConfig, size: Size, seconds: float, frame_rate: float, text: str, new_tokens: int) -> Load:
    """Return what a clip asks of a model, with the frames, packs and slices of the model's own recipe.

    Args:
        model: the model.
        size: of a frame.
        seconds: length of the clip.
        frame_rate: frames a second that the clip has.
        text: the instruction.
        new_tokens: longest answer.
    """
    config = CONFIG_OF_RULE[model.family.clip_rule]()
    times = np.arange(round(seconds * frame_rate)) / frame_rate
    pictures = plan_clip(Timeline(times, seconds, frame_rate, 1 / 90_000), config)
    frames = [(size, 1 if picture.is_composite else len(picture.positions)) for picture in pictures]
    slicing = model.clip_slicing.model_copy(update={"max_slices": config.released_max_slices})
    return _load(model, frames, slicing, text, PromptSettings(kind="video", use_image_id=False), new_tokens)


def _load(
    model: ModelConfig,
    pictures: list[tuple[Size, int]],
    slicing: SliceConfig,
    text: str,
    settings: PromptSettings,
    new_tokens: int,
) -> Load:
    """Return the load of pictures, or of packs of so many frames."""
    plans = [plan_slices(size.height_px, size.width_px, slicing) for size, _ in pictures]
    packs = [frames for _, frames in pictures]
    shapes = [
        shape for plan, frames in zip(plans, packs, strict=True) for shape in plan.shapes() for _ in range(frames)
    ]
    packed = packs if model.family.connector == "resampler" else None
    images = image_tokens(shapes, [plan.grid for plan in plans], slicing, frame_counts=packed)
    prompt_ids = PromptBuilder(model).build(text, images, settings)
    patches = [shape.height_px * shape.width_px // slicing.patch_px**2 for shape in shapes]
    return Load(
        prompt_tokens=len(prompt_ids),
        visual_tokens=sum(sum(image.counts) for image in images),
        new_tokens=new_tokens,
        slices=len(shapes),
        patches=sum(patches),
        patches_of_largest=max(patches) * max(packs),
    )
