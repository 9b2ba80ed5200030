"""What the files beside the weights say: architecture numbers, special tokens, defaults of the release."""

import json
import re
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from operators.minicpmv.family import FAMILIES, Family, FamilyName, find_family
from operators.minicpmv.slicing import SliceConfig
from schemas.errors import ConfigError

Attention = Literal["sdpa", "eager"]
"""Attention implementations of transformers that every layer of the model has."""

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
"""Of MiniCPM-V 4.6; `token_texts` has those of every member."""

THOUGHT_TOKENS: Final = ("think_start", "think_end")

PAD_KEYS: Final = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
MARKER_KEYS: Final = {
    "image_start_id": "image_start",
    "image_end_id": "image_end",
    "slice_start_id": "slice_start",
    "slice_end_id": "slice_end",
}
"""Keys of `config.json` that repeat ids of the tokenizer."""

SYSTEM_TURN: Final = re.compile(r"<\|im_start\|>system(?:\n|\\n)([^{}+~]*?)<\|im_end\|>")
"""A whole system turn in a chat template's own words: braces and operators would join it to a caller's."""


class SpecialTokens(BaseModel):
    """Ids of the tokens that prompts are built from.

    Attributes:
        think_start, think_end: None where the tokenizer has none.
        newline: of the newline between rows of slices, where its place in the text model's plane matters.
    """

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
    think_start: int | None
    think_end: int | None
    newline: int | None = None


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
    """Everything that slicing, prompts and the engine need to know of a model, without its weights.

    Attributes:
        system_text: text of the system turn that the chat template puts before every conversation; None for none.
        thinks: whether its prompts have a thought to open or to leave empty.
        quantization: method by which the weights are quantised; None for plain ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    family_name: FamilyName
    is_demo: bool
    tokens: SpecialTokens
    stop_ids: tuple[int, ...]
    vocabulary_size: int
    max_positions: int
    slicing: SliceConfig
    use_image_id: bool
    system_text: str | None
    thinks: bool
    quantization: str | None
    generation: GenerationDefaults

    @property
    def family(self) -> Family:
        """Return what tells this model from others of its family."""
        return FAMILIES[self.family_name]

    @property
    def clip_slicing(self) -> SliceConfig:
        """Return the slicing of a clip's pictures: small ones are always enlarged."""
        return self.slicing.model_copy(update={"small_image_upsize": "always"})


def read_model_config(folder: Path) -> ModelConfig:
    """Return the configuration of the model in `folder`.

    Raises:
        ConfigError: the folder is not a supported model, or a file is missing or malformed.
    """
    refuse_gguf(folder)
    config = read_json(folder / "config.json")
    family = require_supported(config, folder)
    preprocessor = read_preprocessor(folder)
    generation = read_json(folder / "generation_config.json", required=False)
    template = read_chat_template(folder)
    # A release of a thinking member may have been trained without thoughts: then its template has none.
    thinks = family.thinks and (not template or TOKEN_TEXTS["think_start"] in template)
    try:
        tokens = read_tokens(folder, config, family, thinks=thinks)
        text = text_settings(config, family)
        model = ModelConfig(
            folder=folder,
            family_name=family.name,
            is_demo=DEMO_MARKER in config,
            tokens=tokens,
            stop_ids=stop_ids(generation, config, tokens),
            vocabulary_size=text["vocab_size"],
            max_positions=text["max_position_embeddings"],
            slicing=read_slicing(config, preprocessor, family),
            use_image_id=preprocessor.get("use_image_id", config.get("use_image_id", True)),
            system_text=system_text(template),
            thinks=thinks,
            quantization=quantization_method(config),
            generation=GenerationDefaults(**generation),
        )
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise ConfigError(f"{folder}: the model's files do not fit together: {one_line(error)}") from error
    largest = max(value for value in tokens.model_dump().values() if value is not None)
    if largest >= model.vocabulary_size:
        raise ConfigError(f"{folder}: token {largest} of the tokenizer is beyond vocab_size {model.vocabulary_size}")
    return model


def require_supported(config: dict[str, Any], folder: Path) -> Family:
    """Return the member of the family that a folder's `config.json` describes.

    Raises:
        ConfigError: it describes none that runs here.
    """
    try:
        family = find_family(config)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    if config.get("drop_vision_last_layer"):
        raise ConfigError(f"{folder}: drop_vision_last_layer is not supported: every layer of the vision tower runs")
    return family


def refuse_gguf(model: str | Path) -> None:
    """Raise `ConfigError` when a file, folder or hub id holds GGUF weights and nothing that could be read here."""
    path = Path(model).expanduser()
    if path.is_dir():
        found = not (path / "config.json").exists() and any(path.glob("*.gguf"))
    else:
        found = str(model).lower().endswith("gguf")
    if found:
        raise ConfigError(
            f"{model}: GGUF weights are read by llama.cpp: serve them there, with their mmproj file, and read with the "
            "endpoint engine; or name the model's safetensors"
        )


def text_settings(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Return the numbers of the text model, which some members list at the top level."""
    settings: dict[str, Any] = config["text_config"] if family.connector == "merger" else config
    return settings


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """Return the settings of the image processor, which newer files nest in those of the whole processor."""
    nested = read_json(folder / "processor_config.json", required=False).get("image_processor")
    return nested if isinstance(nested, dict) else read_json(folder / "preprocessor_config.json", required=False)


def read_slicing(config: dict[str, Any], preprocessor: dict[str, Any], family: Family) -> SliceConfig:
    """Return the limits on slicing that the files propose."""
    settings = (config.get("slice_config") or {}) | preprocessor
    resampled = family.connector == "resampler"
    return SliceConfig(
        max_slices=settings.get("max_slice_nums", 9) if settings.get("slice_mode", True) else 1,
        slice_side_px=settings.get("scale_resolution", 448),
        patch_px=settings.get("patch_size", 14),
        downsample_mode=config.get("downsample_mode") or settings.get("downsample_mode") or family.downsample_mode,
        query_count=config.get("query_num", 64) if resampled else None,
        small_image_upsize=settings.get("small_image_upsize", "always"),
    )


def token_texts(family: Family) -> dict[str, str]:
    """Return the text of each special token of a member."""
    own = {"image_pad": family.image_pad, "video_pad": family.video_pad, "text_end": family.text_end}
    return TOKEN_TEXTS | own


def read_tokens(folder: Path, config: dict[str, Any], family: Family, *, thinks: bool) -> SpecialTokens:
    """Return the special token ids of the tokenizer in `folder`.

    Raises:
        ConfigError: `tokenizer.json` is missing, lacks one of the tokens, or contradicts `config.json`.
    """
    require_tokenizer(folder)
    ids = {token["content"]: token["id"] for token in read_json(folder / "tokenizer.json").get("added_tokens", [])}
    texts = token_texts(family)
    needed = [text for name, text in texts.items() if thinks or name not in THOUGHT_TOKENS]
    missing = sorted({text for text in needed if text not in ids})
    if missing:
        raise ConfigError(f"{folder}/tokenizer.json lacks tokens of {family.title}: {', '.join(missing)}")
    found = {name: ids.get(text) for name, text in texts.items()}
    repeated = (PAD_KEYS if family.connector == "merger" else {}) | (MARKER_KEYS if family.canvas_positions else {})
    for key, name in repeated.items():
        if config.get(key) != found[name]:
            raise ConfigError(f"{folder}: config.json says {key} {config.get(key)}, the tokenizer says {found[name]}")
    if not family.canvas_positions:
        return SpecialTokens.model_validate(found)
    if config.get("newline_id") is None:
        raise ConfigError(f"{folder}: config.json lacks newline_id, which {family.title} needs")
    return SpecialTokens.model_validate(found | {"newline": config["newline_id"]})


def require_tokenizer(folder: Path) -> None:
    """Raise `ConfigError` unless the tokenizer is there in the one format that is read."""
    if (folder / "tokenizer.json").exists():
        return
    others = [name for name in ("vocab.json", "merges.txt", "tokenizer.model") if (folder / name).exists()]
    found = f": {', '.join(others)} alone will not do" if others else ""
    raise ConfigError(f"{folder} lacks tokenizer.json{found}; copy it from the released model")


def stop_ids(generation: dict[str, Any], config: dict[str, Any], tokens: SpecialTokens) -> tuple[int, ...]:
    """Return the ids that end an answer, in ascending order; the ends of a turn and of a text are always among them."""
    named = generation.get("eos_token_id", config.get("eos_token_id"))
    listed = named if isinstance(named, list) else [] if named is None else [named]
    return tuple(sorted({*listed, tokens.turn_end, tokens.text_end}))


def system_text(template: str) -> str | None:
    """Return the text of the system turn that a chat template adds by itself; None when it adds none.

    Source:
        `chat_template` in the published `tokenizer_config.json` of MiniCPM-V 2.6, which adds one; those of 4.0, 4.5
        and 4.6 add none.
    """
    found = SYSTEM_TURN.search(template)
    return found.group(1).replace("\\n", "\n") if found else None


def read_chat_template(folder: Path) -> str:
    """Return the chat template in `folder`, wherever it is kept; empty when there is none."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(folder / name, required=False).get("chat_template")
        if isinstance(template, str):
            return template
    return ""


def quantization_method(config: dict[str, Any]) -> str | None:
    """Return the name of the method by which the weights are quantised; None for plain weights."""
    settings = config.get("quantization_config")
    if not settings:
        return None
    # Files of early quantisers name no method; only this one writes keys of this kind.
    early = "bitsandbytes" if any(key.lstrip("_").startswith("load_in_") for key in settings) else "unnamed"
    return str(settings.get("quant_method") or early)


def one_line(error: Exception) -> str:
    """Return what `error` says, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


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
