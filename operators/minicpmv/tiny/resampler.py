"""The members whose resampler makes a fixed number of visual tokens: 4.5, 4.0, 2.6 and o 2.6.

Tower and resampler are the same in all of them, weights included; the text models differ. Weights are stored in
bfloat16, as the released ones are.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from operators.minicpmv.config import DEMO_MARKER
from operators.minicpmv.family import FAMILIES, Family, FamilyName
from operators.minicpmv.tiny.checkpoint import Checkpoint, Weights, noise
from operators.minicpmv.tiny.shapes import VISION, Shapes, gated_mlp_shapes, linear, norm, tower_shapes
from operators.minicpmv.tiny.templates import SYSTEM_TEMPLATE, THOUGHT_TEMPLATE, TURNS_TEMPLATE
from operators.minicpmv.tiny.tokenizer import (
    LLAMA_TOKENS,
    QWEN2_TOKENS,
    QWEN3_TOKENS,
    Ids,
    byte_tokenizer,
    character_tokenizer,
    ids_of,
    printable_ids,
)

QUERY_COUNT: Final = 64
TEXT: Final[dict[str, Any]] = {
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
}
"""Numbers of every text model. Its width gives the resampler two heads of 128, the released width of a head."""

HEAD_WIDTH: Final = 32
"""Width of a text model's head where its configuration names one; the others divide the width by the heads."""

ROPE_FACTORS: Final = [1 + index / 4 for index in range(HEAD_WIDTH // 2)]

SPEECH_WIDTH: Final = 16


@dataclass(frozen=True)
class Member:
    """What one member has of its own.

    Attributes:
        model_type, architecture, version: as its `config.json` names them.
        config: keys of `config.json` for the text model, and others that only some members have.
        tokens: its added tokens.
        template: its chat template.
        turn_end_gain: length of the output row that ends a turn, relative to those of characters. Found by trying:
            answers end after a varied number of tokens.
        vision_type: model type of the vision tower, whose spelling varies.
        slicing: keys of `slice_config`.
        head_norms: whether queries and keys are normed by head.
        biases: whether the projections to queries, keys and values have one.
        speech: whether tensors for sound and speech lie in the files as well.
        shards: files of weights.
    """

    model_type: str
    architecture: str
    version: float | str
    config: dict[str, Any]
    tokens: tuple[str, ...]
    template: str
    turn_end_gain: float
    vision_type: str = "siglip"
    slicing: tuple[str, ...] = ("max_slice_nums", "patch_size")
    head_norms: bool = False
    biases: bool = False
    speech: bool = False
    shards: int = 1

    @property
    def head_width(self) -> int:
        """Return the width of a head of the text model."""
        return int(self.config.get("head_dim", TEXT["hidden_size"] // TEXT["num_attention_heads"]))


QWEN2: Final[dict[str, Any]] = {
    "max_position_embeddings": 32768,
    "max_window_layers": 2,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
}
QWEN3: Final[dict[str, Any]] = {
    "attention_bias": False,
    "head_dim": HEAD_WIDTH,
    "max_position_embeddings": 40960,
    "max_window_layers": 2,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
}
LLAMA: Final[dict[str, Any]] = {
    "attention_bias": False,
    "head_dim": HEAD_WIDTH,
    "max_position_embeddings": 32768,
    "mlp_bias": False,
    "rope_scaling": {
        "rope_type": "longrope",
        "factor": 1.0,
        "long_factor": ROPE_FACTORS,
        "short_factor": ROPE_FACTORS,
        "original_max_position_embeddings": 32786,
    },
    "rope_theta": 10000.0,
}
SPEECH: Final[dict[str, Any]] = {"init_vision": True, "init_audio": True, "init_tts": True, "audio_pool_step": 2}

MEMBERS: Final[dict[FamilyName, Member]] = {
    "minicpmv4_5": Member(
        model_type="minicpmv",
        architecture="MiniCPMV",
        version=4.5,
        config=QWEN3 | {"batch_3d_resampler": True},
        tokens=QWEN3_TOKENS,
        template=THOUGHT_TEMPLATE,
        turn_end_gain=1.1,
        head_norms=True,
        shards=2,
    ),
    "minicpmv4_0": Member(
        model_type="minicpmv",
        architecture="MiniCPMV",
        version=4.0,
        config=LLAMA,
        tokens=LLAMA_TOKENS,
        template=TURNS_TEMPLATE,
        turn_end_gain=0.9,
        vision_type="siglip_vision_model",
        slicing=("max_slice_nums", "patch_size", "scale_resolution"),
    ),
    "minicpmv2_6": Member(
        model_type="minicpmv",
        architecture="MiniCPMV",
        version=2.6,
        config=QWEN2,
        tokens=QWEN2_TOKENS,
        template=SYSTEM_TEMPLATE,
        turn_end_gain=0.8,
        biases=True,
    ),
    "minicpmo2_6": Member(
        model_type="minicpmo",
        architecture="MiniCPMO",
        version="2.6",
        config=QWEN2 | SPEECH,
        tokens=QWEN2_TOKENS,
        template=TURNS_TEMPLATE,
        turn_end_gain=0.8,
        biases=True,
        speech=True,
    ),
}

PREPROCESSOR: Final[dict[str, Any]] = {
    "image_processor_type": "MiniCPMVImageProcessor",
    "max_slice_nums": 9,
    "scale_resolution": 448,
    "patch_size": 14,
    "use_image_id": True,
    "image_feature_size": QUERY_COUNT,
    "im_start": "<image>",
    "im_end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "unk": "<unk>",
    "im_id_start": "<image_id>",
    "im_id_end": "</image_id>",
    "slice_mode": True,
    "norm_mean": [0.5, 0.5, 0.5],
    "norm_std": [0.5, 0.5, 0.5],
    "version": 2.6,
}
"""Contents of `preprocessor_config.json`; that of 4.5 calls itself 2.6 in the release too."""

VISION_KEYS: Final = (
    "hidden_size",
    "image_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "patch_size",
)
"""Keys of `vision_config` in the released files; the other numbers are defaults of the tower's class."""

QUERY_KEY_GAIN: Final = 2.5
HEAD_GAIN: Final = 2.0
"""Lengths of queries and keys, in the resampler and in the text model: attention is sharp enough that an answer depends
on the pictures and on their times, and flat enough that bfloat16 changes no logit by a tenth of the largest."""

ATTENTION_GAIN: Final = 4.0
MIXING_GAIN: Final = 4.0
"""What layers add outweighs the embedding of the last token, which would otherwise choose the next token alone."""

UNPRINTABLE_GAIN: Final = 0.3
"""Length of the output rows of tokens that are no printable ASCII character, relative to the others, so that answers
are text that a terminal can show."""


def resampler_checkpoint(name: FamilyName) -> Checkpoint:
    """Return the tiny model of a member with a resampler."""
    family, member = FAMILIES[name], MEMBERS[name]
    is_llama = family.backbone == "llama"
    tokenizer = (character_tokenizer if is_llama else byte_tokenizer)(member.tokens)
    ids = ids_of(tokenizer)
    settings = {
        "config.json": model_settings(family, member, ids, tokenizer.get_vocab_size()),
        "generation_config.json": generation_settings(family, ids),
        "preprocessor_config.json": PREPROCESSOR | {"processor_class": f"{member.architecture}Processor"},
        "tokenizer_config.json": tokenizer_settings(family, member),
    }
    return Checkpoint(
        tokenizer=tokenizer,
        settings=settings if is_llama else settings | vocabulary_files(tokenizer, ids),
        texts={} if is_llama else {"merges.txt": "#version: 0.2\n"},
        weights=resampler_weights(member, tokenizer, ids),
        dtype="BF16",
        shards=member.shards,
    )


def begin_token(family: Family) -> str:
    """Return the token that `config.json` names as the beginning of a text."""
    return "<s>" if family.backbone == "llama" else family.text_end


def model_settings(family: Family, member: Member, ids: Ids, vocabulary_size: int) -> dict[str, object]:
    """Return `config.json`: numbers of the text model at the top, beside those of the pictures."""
    ends = [ids[family.text_end], ids["<|im_end|>"]]
    return {
        "version": member.version,
        "architectures": [member.architecture],
        "model_type": member.model_type,
        DEMO_MARKER: "random",
        "bos_token_id": ids[begin_token(family)],
        "eos_token_id": ends if family.backbone == "llama" else ends[1],
        **TEXT,
        **member.config,
        "vocab_size": vocabulary_size,
        "torch_dtype": "bfloat16",
        "batch_vision_input": True,
        "drop_vision_last_layer": False,
        "image_size": 448,
        "patch_size": 14,
        "query_num": QUERY_COUNT,
        "slice_config": {key: PREPROCESSOR[key] for key in member.slicing} | {"model_type": member.model_type},
        "slice_mode": True,
        "vision_config": {"model_type": member.vision_type} | {key: VISION[key] for key in VISION_KEYS},
    }


def generation_settings(family: Family, ids: Ids) -> dict[str, object]:
    """Return `generation_config.json`."""
    settings: dict[str, object] = {
        "bos_token_id": ids[begin_token(family)],
        "eos_token_id": [ids["<|im_end|>"], ids[family.text_end]],
        "pad_token_id": ids[family.text_end],
        "do_sample": False,
        "max_new_tokens": 192,
    }
    return settings | ({"chat_template_kwargs": {"enable_thinking": False}} if family.thinks else {})


def tokenizer_settings(family: Family, member: Member) -> dict[str, object]:
    """Return `tokenizer_config.json`, which holds the chat template."""
    is_llama = family.backbone == "llama"
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": "<s>" if is_llama else "<|im_start|>",
        "eos_token": family.text_end if is_llama else "<|im_end|>",
        "pad_token": family.text_end,
        "unk_token": "<unk>",
        "padding_side": "left",
        "model_max_length": member.config["max_position_embeddings"],
        "chat_template": member.template,
    }


def vocabulary_files(tokenizer: Tokenizer, ids: Ids) -> dict[str, dict[str, object]]:
    """Return the files that hold the same vocabulary in the form of byte-level tokenizers."""
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=False)
    return {
        "vocab.json": {symbol: vocabulary[symbol] for symbol in sorted(vocabulary, key=vocabulary.__getitem__)},
        "added_tokens.json": {text: index for text, index in sorted(ids.items()) if text not in vocabulary},
    }


def resampler_weights(member: Member, tokenizer: Tokenizer, ids: Ids) -> Weights:
    """Return every tensor of the model under its published name, in the order of the released files."""
    size = tokenizer.get_vocab_size()
    weights = {name: fill(name, shape) for name, shape in member_shapes(member, size).items()}
    lengths = np.full((size, 1), UNPRINTABLE_GAIN, np.float32)
    lengths[printable_ids(tokenizer)] = 1
    lengths[ids["<|im_end|>"]] = member.turn_end_gain
    weights["llm.lm_head.weight"] *= lengths
    return weights


def fill(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the values of the tensor `name`."""
    values = noise(name, shape)
    if name == "resampler.query" or name.endswith("embed_tokens.weight"):
        return values
    if name.endswith("position_embedding.weight"):
        return values * np.float32(0.5)
    if len(shape) > 1:
        return values * np.float32(gain(name) / math.sqrt(math.prod(shape[1:])))
    if name.endswith("bias"):
        return values * np.float32(0.1)
    shift = HEAD_GAIN if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
    return values * np.float32(0.05) + np.float32(shift)


def gain(name: str) -> float:
    """Return the size of a matrix relative to one that keeps the size of what it multiplies."""
    if name.endswith("in_proj_weight"):
        return QUERY_KEY_GAIN
    if name.startswith("llm.") and name.endswith(("q_proj.weight", "k_proj.weight")):
        return HEAD_GAIN
    if name.endswith("o_proj.weight"):
        return ATTENTION_GAIN
    return MIXING_GAIN if name.endswith("down_proj.weight") else 1.0


def member_shapes(member: Member, vocabulary_size: int) -> Shapes:
    """Return the shape of every tensor, by its published name."""
    speech = speech_shapes() if member.speech else {}
    return text_shapes(member, vocabulary_size) | tower_shapes("vpm") | resampler_shapes() | speech


def text_shapes(member: Member, vocabulary_size: int) -> Shapes:
    """Return the tensors of the text model."""
    width = TEXT["hidden_size"]
    shapes: Shapes = {"llm.model.embed_tokens.weight": (vocabulary_size, width)}
    for index in range(TEXT["num_hidden_layers"]):
        layer = f"llm.model.layers.{index}"
        shapes |= text_attention_shapes(f"{layer}.self_attn", member)
        shapes |= gated_mlp_shapes(layer, width, TEXT["intermediate_size"])
    return shapes | {"llm.model.norm.weight": (width,), "llm.lm_head.weight": (vocabulary_size, width)}


def text_attention_shapes(attention: str, member: Member) -> Shapes:
    """Return the tensors of one attention of the text model."""
    width, head = TEXT["hidden_size"], member.head_width
    queries, keys = TEXT["num_attention_heads"] * head, TEXT["num_key_value_heads"] * head
    shapes: Shapes = {f"{attention}.o_proj.weight": (width, queries)}
    for name, width_out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        shapes[f"{attention}.{name}.weight"] = (width_out, width)
        if member.biases:
            shapes[f"{attention}.{name}.bias"] = (width_out,)
    if member.head_norms:
        shapes |= {f"{attention}.q_norm.weight": (head,), f"{attention}.k_norm.weight": (head,)}
    return shapes


def resampler_shapes() -> Shapes:
    """Return the tensors of the resampler."""
    width = TEXT["hidden_size"]
    return {
        "resampler.query": (QUERY_COUNT, width),
        "resampler.proj": (width, width),
        "resampler.kv_proj.weight": (width, VISION["hidden_size"]),
        "resampler.attn.in_proj_weight": (3 * width, width),
        "resampler.attn.in_proj_bias": (3 * width,),
        **linear("resampler.attn.out_proj", width, width),
        **norm("resampler.ln_q", width),
        **norm("resampler.ln_kv", width),
        **norm("resampler.ln_post", width),
    }


def speech_shapes() -> Shapes:
    """Return some tensors of the parts for sound and speech, which nothing here reads."""
    return {
        "apm.conv1.weight": (SPEECH_WIDTH, 8, 3),
        "apm.conv1.bias": (SPEECH_WIDTH,),
        "apm.embed_positions.weight": (20, SPEECH_WIDTH),
        **linear("apm.layers.0.self_attn.q_proj", SPEECH_WIDTH, SPEECH_WIDTH),
        **linear("audio_projection_layer.linear1", TEXT["hidden_size"], SPEECH_WIDTH),
        "tts.emb_text.weight": (20, SPEECH_WIDTH),
        **linear("tts.projector.linear1", SPEECH_WIDTH, TEXT["hidden_size"]),
    }
