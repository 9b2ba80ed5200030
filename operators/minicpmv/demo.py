"""Tiny checkpoints in the layout of the released model, with random weights.

They run the whole pipeline in seconds and hold no knowledge: what they write means nothing. Each weight is a function
of its name alone, so every machine makes the same model.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from operators.minicpmv.config import DEMO_MARKER, TOKEN_TEXTS

Weights = dict[str, NDArray[np.float32]]

DEMO_VERSION: Final = "1"
"""Raised when the maker's output changes, so that an older cached model is not taken for it."""

PLAIN_ADDED_TOKENS: Final = ("<think>", "</think>")
"""Added tokens that are not special: they stay when an answer is turned into text."""

VISION: Final[dict[str, Any]] = {
    "model_type": "minicpmv4_6_vision",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": 980,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
}
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

CHAT_TEMPLATE: Final = """\
{%- macro body(message) -%}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if not loop.first %}{{ "\\n" }}{% endif -%}
            {%- if part.type in ("image", "video") and message.role == "system" -%}
                {{- raise_exception("a system message holds text only") -}}
            {%- elif part.type == "image" -%}
                {{- "<|image_pad|>" -}}
            {%- elif part.type == "video" -%}
                {{- "<|video_pad|>" -}}
            {%- else -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages | selectattr("role", "equalto", "user") | list | length == 0 -%}
    {{- raise_exception("there is no user message") -}}
{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message.role + "\\n" + (body(message) | trim) + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n<think>\\n" -}}
    {%- if not (enable_thinking is defined and enable_thinking) -%}
        {{- "\\n</think>\\n\\n" -}}
    {%- endif -%}
{%- endif -%}
"""

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


def write_demo_model(folder: Path) -> None:
    """Write the files of a tiny model with random weights into `folder`, which exists."""
    tokenizer = demo_tokenizer()
    vocabulary = tokenizer.get_vocab()
    ids = {name: vocabulary[text] for name, text in TOKEN_TEXTS.items()}
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for name, content in demo_settings(ids, len(vocabulary)).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_file(demo_weights(len(vocabulary), ids), folder / "model.safetensors", {"format": "pt"})


def demo_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer: one token a byte, no merges, and the tokens that prompts need."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(text, special=text not in PLAIN_ADDED_TOKENS, normalized=False)
            for text in ("<|endoftext|>", *sorted(set(TOKEN_TEXTS.values()) - {"<|endoftext|>"}))
        ]
    )
    return tokenizer


def demo_settings(ids: dict[str, int], vocabulary_size: int) -> dict[str, dict[str, Any]]:
    """Return the JSON files of the model by name."""
    attributes = ("image_start", "image_end", "slice_start", "slice_end", "image_id_start", "image_id_end")
    return {
        "config.json": {
            "architectures": ["MiniCPMV4_6ForConditionalGeneration"],
            "model_type": "minicpmv4_6",
            DEMO_MARKER: "random",
            "dtype": "float32",
            "tie_word_embeddings": True,
            "insert_layer_id": 1,
            "image_size": 1120,
            "drop_vision_last_layer": False,
            "image_token_id": ids["image_pad"],
            "video_token_id": ids["video_pad"],
            "eos_token_id": ids["text_end"],
            "vision_config": VISION,
            "text_config": TEXT | {"vocab_size": vocabulary_size},
        },
        "generation_config.json": {
            "bos_token_id": ids["turn_start"],
            "eos_token_id": [ids["text_end"], ids["turn_end"]],
            "pad_token_id": ids["text_end"],
            "do_sample": False,
            "max_new_tokens": 96,
        },
        "preprocessor_config.json": {
            "image_processor_type": "MiniCPMV4_6ImageProcessor",
            "processor_class": "MiniCPMV4_6Processor",
            "max_slice_nums": 9,
            "scale_resolution": 448,
            "patch_size": 14,
            "use_image_id": True,
            "slice_mode": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "padding_side": "left",
            "model_max_length": TEXT["max_position_embeddings"],
            "extra_special_tokens": {
                "image_token": TOKEN_TEXTS["image_pad"],
                "video_token": TOKEN_TEXTS["video_pad"],
                **{f"{name}_token": TOKEN_TEXTS[name] for name in attributes},
            },
        },
    }


def demo_weights(vocabulary_size: int, ids: dict[str, int]) -> Weights:
    """Return every tensor of the model under its published name."""
    weights = {name: fill(name, shape) for name, shape in weight_shapes(vocabulary_size).items()}
    embedding = weights["model.language_model.embed_tokens.weight"]
    # The byte alphabet begins with printable ASCII, in order.
    embedding[ord("~") - ord("!") + 1 :] *= np.float32(UNPRINTABLE_GAIN)
    embedding[ids["turn_end"]] *= np.float32(TURN_END_GAIN / UNPRINTABLE_GAIN)
    return weights


def fill(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the values of the tensor `name`, drawn from a generator that its name seeds."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if name.endswith("embed_tokens.weight"):
        return noise * np.float32(EMBEDDING_GAIN)
    if name.endswith("position_embedding.weight"):
        return noise * np.float32(0.5)
    if len(shape) > 1:
        return noise * np.float32(gain(name) / math.sqrt(math.prod(shape[1:])))
    if name.endswith("A_log"):
        return noise * np.float32(0.1) + np.float32(DECAY_SHIFT)
    if name.endswith("bias"):
        return noise * np.float32(0.1)
    # Norms of the text model add one to their weight; those of the vision tower and the gated norm do not.
    zero_centred = "language_model" in name and "linear_attn" not in name
    shift = HEAD_NORM_SHIFT if name.endswith(("q_norm.weight", "k_norm.weight")) else 0.0
    return noise * np.float32(0.05) + np.float32(shift if zero_centred else 1)


def gain(name: str) -> float:
    """Return the size of a matrix relative to one that keeps the size of what it multiplies."""
    if name.endswith("o_proj.weight"):
        return ATTENTION_GAIN
    if "language_model" in name and name.endswith(("out_proj.weight", "down_proj.weight")):
        return MIXING_GAIN
    return CONVOLUTION_GAIN if name.endswith("conv1d.weight") else 1.0


def weight_shapes(vocabulary_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor, by its published name."""
    return vision_shapes() | merger_shapes() | text_shapes(vocabulary_size)


def linear(name: str, width_out: int, width_in: int) -> dict[str, tuple[int, ...]]:
    """Return the two tensors of a linear layer with a bias."""
    return {f"{name}.weight": (width_out, width_in), f"{name}.bias": (width_out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    """Return the two tensors of a layer norm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vision_shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors of the vision tower, its own merger included."""
    width, inner, patch = VISION["hidden_size"], VISION["intermediate_size"], VISION["patch_size"]
    tower = "model.vision_tower"
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}.embeddings.patch_embedding.weight": (width, VISION["num_channels"], patch, patch),
        f"{tower}.embeddings.patch_embedding.bias": (width,),
        f"{tower}.embeddings.position_embedding.weight": ((VISION["image_size"] // patch) ** 2, width),
        **norm(f"{tower}.post_layernorm", width),
        **norm(f"{tower}.vit_merger.layer_norm1", width),
        **norm(f"{tower}.vit_merger.pre_norm", 4 * width),
        **linear(f"{tower}.vit_merger.linear_1", 4 * inner, 4 * width),
        **linear(f"{tower}.vit_merger.linear_2", width, 4 * inner),
    }
    layers = [f"{tower}.encoder.layers.{index}" for index in range(VISION["num_hidden_layers"])]
    for layer in (*layers, f"{tower}.vit_merger"):
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{projection}", width, width)
    for layer in layers:
        shapes |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        shapes |= linear(f"{layer}.mlp.fc1", inner, width) | linear(f"{layer}.mlp.fc2", width, inner)
    return shapes


def merger_shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors that turn merged patches into visual tokens."""
    merged = 4 * VISION["hidden_size"]
    return {
        **norm("model.merger.mlp.0.pre_norm", merged),
        **linear("model.merger.mlp.0.linear_1", merged, merged),
        **linear("model.merger.mlp.0.linear_2", TEXT["hidden_size"], merged),
    }


def text_shapes(vocabulary_size: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of the text model; its embedding is also its head."""
    width, inner = TEXT["hidden_size"], TEXT["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.language_model.embed_tokens.weight": (vocabulary_size, width),
        "model.language_model.norm.weight": (width,),
    }
    for index, kind in enumerate(TEXT["layer_types"]):
        layer = f"model.language_model.layers.{index}"
        mixer = linear_attention_shapes() if kind == "linear_attention" else full_attention_shapes()
        shapes |= {f"{layer}.{name}": shape for name, shape in mixer.items()}
        shapes |= {
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
            f"{layer}.mlp.gate_proj.weight": (inner, width),
            f"{layer}.mlp.up_proj.weight": (inner, width),
            f"{layer}.mlp.down_proj.weight": (width, inner),
        }
    return shapes


def linear_attention_shapes() -> dict[str, tuple[int, ...]]:
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


def full_attention_shapes() -> dict[str, tuple[int, ...]]:
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
