"""What the files beside the weights say: architecture numbers, special tokens, defaults of the release."""

import json
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from operators.minicpmv.slicing import SliceConfig
from schemas.errors import ConfigError

Attention = Literal["sdpa", "eager"]
"""Attention implementations of transformers that every layer of the model has."""

SUPPORTED_MODEL_TYPES: Final = ("minicpmv4_6",)

DEMO_MARKER: Final = "pagereel_demo"
"""Key of `config.json` that marks weights which were never trained on documents."""

TOKEN_TEXTS: Final[dict[str, str]] = {
    "image_start": "<image>",
    "image_end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "image_id_start": "<image_id>",
    "image_id_end": "</image_id>",
    "image_pad": "<|image_pad|>",
    "video_pad": "<|video_pad|>",
    "turn_start": "<|im_start|>",
    "turn_end": "<|im_end|>",
    "text_end": "<|endoftext|>",
    "think_start": "<think>",
    "think_end": "</think>",
}


class SpecialTokens(BaseModel):
    """Ids of the tokens that prompts are built from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_start: int
    image_end: int
    slice_start: int
    slice_end: int
    image_id_start: int
    image_id_end: int
    image_pad: int
    video_pad: int
    turn_start: int
    turn_end: int
    text_end: int
    think_start: int
    think_end: int


class GenerationDefaults(BaseModel):
    """What `generation_config.json` proposes; None where it says nothing."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


class ModelConfig(BaseModel):
    """Everything that slicing, prompts and the engine need to know of a model, without its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    model_type: Literal["minicpmv4_6"]
    is_demo: bool
    tokens: SpecialTokens
    stop_ids: tuple[int, ...]
    vocabulary_size: int
    max_positions: int
    slicing: SliceConfig
    use_image_id: bool
    generation: GenerationDefaults


def read_model_config(folder: Path) -> ModelConfig:
    """Return the configuration of the model in `folder`.

    Raises:
        ConfigError: the folder is not a supported model, or a file is missing or malformed.
    """
    config = read_json(folder / "config.json")
    require_supported(config, folder)
    preprocessor = read_json(folder / "preprocessor_config.json", required=False)
    generation = read_json(folder / "generation_config.json", required=False)
    tokens = read_tokens(folder)
    for name, pad in (("image_token_id", tokens.image_pad), ("video_token_id", tokens.video_pad)):
        if config.get(name) != pad:
            raise ConfigError(f"{folder}: config.json says {name} {config.get(name)}, the tokenizer says {pad}")
    try:
        return ModelConfig(
            folder=folder,
            model_type=config["model_type"],
            is_demo=DEMO_MARKER in config,
            tokens=tokens,
            stop_ids=stop_ids(generation, config, tokens),
            vocabulary_size=config["text_config"]["vocab_size"],
            max_positions=config["text_config"]["max_position_embeddings"],
            slicing=SliceConfig(
                max_slices=preprocessor.get("max_slice_nums", 9),
                slice_side_px=preprocessor.get("scale_resolution", 448),
                patch_px=preprocessor.get("patch_size", 14),
                downsample_mode=config.get("downsample_mode", "16x"),
            ),
            use_image_id=preprocessor.get("use_image_id", True),
            generation=GenerationDefaults(**generation),
        )
    except (KeyError, ValidationError) as error:
        raise ConfigError(f"{folder}: the model's files do not fit together: {error}") from error


def require_supported(config: dict[str, Any], folder: Path) -> None:
    """Raise `ConfigError` unless `config` names a model type that runs here."""
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        raise ConfigError(f"{folder}: model_type {model_type!r} is not supported; supported: {supported}")


def read_tokens(folder: Path) -> SpecialTokens:
    """Return the special token ids of the tokenizer in `folder`.

    Raises:
        ConfigError: `tokenizer.json` is missing, or lacks one of the tokens.
    """
    added = read_json(folder / "tokenizer.json").get("added_tokens", [])
    ids = {token["content"]: token["id"] for token in added}
    missing = [text for text in TOKEN_TEXTS.values() if text not in ids]
    if missing:
        raise ConfigError(f"{folder}/tokenizer.json lacks the tokens {missing}")
    return SpecialTokens(**{name: ids[text] for name, text in TOKEN_TEXTS.items()})


def stop_ids(generation: dict[str, Any], config: dict[str, Any], tokens: SpecialTokens) -> tuple[int, ...]:
    """Return the ids that end an answer, in ascending order; the end of a turn is always one of them."""
    named = generation.get("eos_token_id", config.get("eos_token_id"))
    listed = named if isinstance(named, list) else [] if named is None else [named]
    return tuple(sorted({*listed, tokens.turn_end}))


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where an optional file is absent.

    Raises:
        ConfigError: the file is required and missing, or does not hold one JSON object.
    """
    if not required and not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {type(value).__name__}, wanted an object")
    return value
