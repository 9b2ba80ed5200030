"""The members whose merger turns squares of patches into visual tokens: 4.6, 4.7 and OCR 1.0.

They share one architecture and here even their weights; what differs is in `config.json` and in
`preprocessor_config.json`.
"""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from operators.minicpmv.config import DEMO_MARKER
from operators.minicpmv.family import FamilyName
from operators.minicpmv.tiny.checkpoint import Checkpoint, Weights, noise
from operators.minicpmv.tiny.shapes import (
    VISION,
    Shapes,
    attention_shapes,
    gated_mlp_shapes,
    linear,
    norm,
    tower_shapes,
)
from operators.minicpmv.tiny.templates import PARTS_TEMPLATE
from operators.minicpmv.tiny.tokenizer import MERGER_TOKENS, Ids, byte_tokenizer, ids_of

TEXT: Final[dict[str, Any]] = {
    "model_type": "qwen3_5_text",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_value_head_dim": 16,
    "linear_num_value_heads": 4,
    "attn_output_gate": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
    },
    "tie_word_embeddings": True,
}

CLASSES: Final[dict[FamilyName, tuple[str, str]]] = {
    "minicpmv4_6": ("MiniCPMV4_6", "MiniCPMV4_6"),
    "minicpmv4_7": ("MiniCPMV4_7", "MiniCPMV4_6"),
    "minicpm_ocr": ("MiniCPMOcr", "MiniCPMOcr"),
}
"""How the classes of each member begin, and those of its image processor."""

HEAD_NORM_SHIFT: Final = 1.0
ATTENTION_GAIN: Final = 6.0
"""Sharp and strong attention, so that an answer depends on the pictures although a long text follows them."""

EMBEDDING_GAIN: Final = 0.1
MIXING_GAIN: Final = 2.0
"""With a tied head a token would choose itself again for ever, unless what the layers add outweighs its embedding."""

TURN_END_GAIN: Final = -1.1
"""Length of the end-of-turn embedding, which is also its output row, relative to the others. Found by trying: answers
end after a varied number of tokens; with the other sign most would end at once."""

CONVOLUTION_GAIN: Final = 6.0
DECAY_SHIFT: Final = -2.0
"""Keys of some length and a slow decay: the linear layers then normalise no values near zero, which would enlarge the
rounding of float32 tenfold and let a batch's composition show in an answer."""

UNPRINTABLE_GAIN: Final = 0.3
"""The same for tokens that are no printable ASCII character, so that answers are text that a terminal can show."""


def merger_checkpoint(name: FamilyName) -> Checkpoint:
    """Return the tiny model of a member with a merger."""
    tokenizer = byte_tokenizer(MERGER_TOKENS)
    ids, size = ids_of(tokenizer), tokenizer.get_vocab_size()
    return Checkpoint(
        tokenizer=tokenizer,
        settings={
            "config.json": model_settings(name, ids, tokenizer),
            "generation_config.json": generation_settings(ids),
            "preprocessor_config.json": preprocessor_settings(name),
            "tokenizer_config.json": tokenizer_settings(),
        },
        texts={"chat_template.jinja": PARTS_TEMPLATE},
        weights=merger_weights(size, ids),
        dtype="F32",
    )


def model_settings(name: FamilyName, ids: Ids, tokenizer: Tokenizer) -> dict[str, object]:
    """Return `config.json`."""
    settings: dict[str, object] = {
        "architectures": [f"{CLASSES[name][0]}ForConditionalGeneration"],
        "model_type": name,
        DEMO_MARKER: "random",
        "dtype": "float32",
        "tie_word_embeddings": True,
        "insert_layer_id": 1,
        "image_size": 1120,
        "drop_vision_last_layer": False,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "vision_config": {"model_type": f"{name}_vision", **VISION},
        "text_config": TEXT | {"vocab_size": tokenizer.get_vocab_size()},
    }
    if name == "minicpmv4_7":
        [newline_id] = tokenizer.encode("\n").ids
        settings |= {
            "image_start_id": ids["<image>"],
            "image_end_id": ids["</image>"],
            "slice_start_id": ids["<slice>"],
            "slice_end_id": ids["</slice>"],
            "newline_id": newline_id,
        }
    return settings | ({"downsample_mode": "4x"} if name == "minicpm_ocr" else {})


def generation_settings(ids: Ids) -> dict[str, object]:
    """Return `generation_config.json`."""
    return {
        "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": [ids["<|endoftext|>"], ids["<|im_end|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "do_sample": False,
        "max_new_tokens": 192,
    }


def preprocessor_settings(name: FamilyName) -> dict[str, object]:
    """Return `preprocessor_config.json`."""
    settings: dict[str, object] = {
        "image_processor_type": f"{CLASSES[name][1]}ImageProcessor",
        "processor_class": f"{CLASSES[name][0]}Processor",
        "max_slice_nums": 9,
        "scale_resolution": 448,
        "patch_size": 14,
        "use_image_id": True,
        "slice_mode": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return settings | ({"downsample_mode": "4x", "small_image_upsize": "always"} if name == "minicpm_ocr" else {})


def tokenizer_settings() -> dict[str, object]:
    """Return `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "model_max_length": TEXT["max_position_embeddings"],
        "extra_special_tokens": {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "image_start_token": "<image>",
            "image_end_token": "</image>",
            "slice_start_token": "<slice>",
            "slice_end_token": "</slice>",
            "image_id_start_token": "<image_id>",
            "image_id_end_token": "</image_id>",
        },
    }


def merger_weights(vocabulary_size: int, ids: Ids) -> Weights:
    """Return every tensor of the model under its published name."""
    weights = {name: fill(name, shape) for name, shape in merger_member_shapes(vocabulary_size).items()}
    embedding = weights["model.language_model.embed_tokens.weight"]
    # The byte alphabet begins with printable ASCII, in order.
    embedding[ord("~") - ord("!") + 1 :] *= np.float32(UNPRINTABLE_GAIN)
    embedding[ids["<|im_end|>"]] *= np.float32(TURN_END_GAIN / UNPRINTABLE_GAIN)
    return weights


def fill(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the values of the tensor `name`."""
    values = noise(name, shape)
    if name.endswith("embed_tokens.weight"):
        return values * np.float32(EMBEDDING_GAIN)
    if name.endswith("position_embedding.weight"):
        return values * np.float32(0.5)
    if len(shape) > 1:
        return values * np.float32(gain(name) / math.sqrt(math.prod(shape[1:])))
    if name.endswith("A_log"):
        return values * np.float32(0.1) + np.float32(DECAY_SHIFT)
    if name.endswith("bias"):
        return values * np.float32(0.1)
    # Norms of the text model add one to their weight; those of the vision tower and the gated norm do not.
    zero_centred = "language_model" in name and "linear_attn" not in name
    shift = HEAD_NORM_SHIFT if name.endswith(("q_norm.weight", "k_norm.weight")) else 0.0
    return values * np.float32(0.05) + np.float32(shift if zero_centred else 1)


def gain(name: str) -> float:
    """Return the size of a matrix relative to one that keeps the size of what it multiplies."""
    if name.endswith("o_proj.weight"):
        return ATTENTION_GAIN
    if "language_model" in name and name.endswith(("out_proj.weight", "down_proj.weight")):
        return MIXING_GAIN
    return CONVOLUTION_GAIN if name.endswith("conv1d.weight") else 1.0


def merger_member_shapes(vocabulary_size: int) -> Shapes:
    """Return the shape of every tensor, by its published name."""
    tower = "model.vision_tower"
    return (
        tower_shapes(tower)
        | window_merger_shapes(f"{tower}.vit_merger")
        | merger_shapes()
        | text_shapes(vocabulary_size)
    )


def window_merger_shapes(merger: str) -> Shapes:
    """Return the tensors of the vision tower's own merger."""
    width, inner = VISION["hidden_size"], VISION["intermediate_size"]
    return {
        **attention_shapes(f"{merger}.self_attn", width),
        **norm(f"{merger}.layer_norm1", width),
        **norm(f"{merger}.pre_norm", 4 * width),
        **linear(f"{merger}.linear_1", 4 * inner, 4 * width),
        **linear(f"{merger}.linear_2", width, 4 * inner),
    }


def merger_shapes() -> Shapes:
    """Return the tensors that turn merged patches into visual tokens."""
    merged = 4 * VISION["hidden_size"]
    return {
        **norm("model.merger.mlp.0.pre_norm", merged),
        **linear("model.merger.mlp.0.linear_1", merged, merged),
        **linear("model.merger.mlp.0.linear_2", TEXT["hidden_size"], merged),
    }


def text_shapes(vocabulary_size: int) -> Shapes:
    """Return the tensors of the text model; its embedding is also its head."""
    width = TEXT["hidden_size"]
    shapes: Shapes = {
        "model.language_model.embed_tokens.weight": (vocabulary_size, width),
        "model.language_model.norm.weight": (width,),
    }
    for index, kind in enumerate(TEXT["layer_types"]):
        layer = f"model.language_model.layers.{index}"
        mixer = linear_attention_shapes() if kind == "linear_attention" else full_attention_shapes()
        shapes |= {f"{layer}.{name}": shape for name, shape in mixer.items()}
        shapes |= gated_mlp_shapes(layer, width, TEXT["intermediate_size"])
    return shapes


def linear_attention_shapes() -> Shapes:
    """Return the tensors of a gated delta net."""
    width, heads = TEXT["hidden_size"], TEXT["linear_num_value_heads"]
    keys = TEXT["linear_num_key_heads"] * TEXT["linear_key_head_dim"]
    values = heads * TEXT["linear_value_head_dim"]
    return {
        "linear_attn.in_proj_qkv.weight": (2 * keys + values, width),
        "linear_attn.in_proj_z.weight": (values, width),
        "linear_attn.in_proj_a.weight": (heads, width),
        "linear_attn.in_proj_b.weight": (heads, width),
        "linear_attn.conv1d.weight": (2 * keys + values, 1, TEXT["linear_conv_kernel_dim"]),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm.weight": (TEXT["linear_value_head_dim"],),
        "linear_attn.out_proj.weight": (width, values),
    }


def full_attention_shapes() -> Shapes:
    """Return the tensors of an attention layer; its query projection carries the output gate too."""
    width, head = TEXT["hidden_size"], TEXT["head_dim"]
    queries, keys = TEXT["num_attention_heads"] * head, TEXT["num_key_value_heads"] * head
    return {
        "self_attn.q_proj.weight": (2 * queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, queries),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
    }
