"""What tells one member of the MiniCPM-V family from another: data, read by everything that differs between them.

No torch and no files here; `config.read_model_config` finds the member that a folder holds.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

from operators.minicpmv.slicing import DownsampleMode
from schemas.errors import ConfigError

FamilyName = Literal[
    "minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "minicpmv4_5", "minicpmv4_0", "minicpmv2_6", "minicpmo2_6"
]
Connector = Literal["merger", "resampler"]
Backbone = Literal["qwen3_5_text", "qwen3", "qwen2", "llama"]
PositionBuckets = Literal["exact", "float32_step"]
ClipRule = Literal["stacked", "packed", "frames"]


@dataclass(frozen=True)
class Family:
    """One member of the family.

    Attributes:
        name: ours, unique.
        title: the name people know.
        connector: `merger` turns squares of patches into visual tokens; `resampler` lets a fixed number of queries
            attend to the patches of a slice, or of a pack of frames.
        backbone: transformers' model type of the text model.
        position_buckets: how a patch finds its row of the position table: `exact`, or with the rounding of a float32
            step, which lands one row low on some grids.
        canvas_positions: whether visual tokens have two-dimensional positions in the text model.
        clip_rule: which frames of a clip the model sees: one a second with the others stacked on a canvas (`stacked`),
            up to six frames a pack with temporal ids (`packed`), or single frames (`frames`).
        numbers_clips: whether a clip may carry an image id.
        separates_frames: whether the pictures of a clip stand in the prompt as images do, apart by a newline and each
            with a number of its own; otherwise they follow each other behind one number.
        thinks: whether the chat template has a thought to open or to leave empty.
        trims_turn: whether the chat template trims the text of a turn.
        downsample_mode: of a merger, where the model's files name none.
        image_pad, video_pad: texts of the placeholder tokens.
        text_end: text of the token that ends a text.
        unused_tensors: prefixes of tensors that files carry and nothing here uses.
    """

    name: FamilyName
    title: str
    connector: Connector
    backbone: Backbone
    position_buckets: PositionBuckets
    clip_rule: ClipRule
    canvas_positions: bool = False
    numbers_clips: bool = True
    separates_frames: bool = False
    thinks: bool = True
    trims_turn: bool = True
    downsample_mode: DownsampleMode = "16x"
    image_pad: str = "<|image_pad|>"
    video_pad: str = "<|video_pad|>"
    text_end: str = "<|endoftext|>"
    unused_tensors: tuple[str, ...] = ()


MULTI_TOKEN_PREDICTION: Final = ("mtp.", "model.mtp.")
SPEECH: Final = ("apm.", "audio_", "tts.")


def _merger(name: FamilyName, title: str, **differences: Any) -> Family:
    return Family(
        name, title, "merger", "qwen3_5_text", "exact", "stacked", unused_tensors=MULTI_TOKEN_PREDICTION, **differences
    )


def _resampler(name: FamilyName, title: str, backbone: Backbone, **differences: Any) -> Family:
    own: dict[str, Any] = {"clip_rule": "frames", "thinks": False} | differences
    return Family(
        name,
        title,
        "resampler",
        backbone,
        "float32_step",
        separates_frames=True,
        trims_turn=False,
        image_pad="<unk>",
        video_pad="<unk>",
        **own,
    )


FAMILIES: Final[dict[FamilyName, Family]] = {
    family.name: family
    for family in (
        _merger("minicpmv4_6", "MiniCPM-V 4.6"),
        _merger("minicpmv4_7", "MiniCPM-V 4.7", canvas_positions=True, numbers_clips=False),
        _merger("minicpm_ocr", "MiniCPM-OCR 1.0", downsample_mode="4x"),
        _resampler("minicpmv4_5", "MiniCPM-V 4.5", "qwen3", clip_rule="packed", thinks=True),
        _resampler("minicpmv4_0", "MiniCPM-V 4.0", "llama", text_end="</s>"),
        _resampler("minicpmv2_6", "MiniCPM-V 2.6", "qwen2"),
        _resampler("minicpmo2_6", "MiniCPM-o 2.6", "qwen2", unused_tensors=SPEECH),
    )
}

VERSIONS: Final[dict[tuple[str, tuple[int, ...]], FamilyName]] = {
    ("minicpmv", (2, 6)): "minicpmv2_6",
    ("minicpmv", (4, 0)): "minicpmv4_0",
    ("minicpmv", (4, 5)): "minicpmv4_5",
    ("minicpmo", (2, 6)): "minicpmo2_6",
}
"""Members that share a `model_type` and differ by `version`."""

EARLIER_VERSIONS: Final = ((), (2, 0), (2, 5))
"""Of `minicpmv`: their files name these versions, or none."""


def find_family(config: dict[str, Any]) -> Family:
    """Return the member that a `config.json` describes.

    Raises:
        ConfigError: its `model_type`, or the `version` beside it, is none that runs here.
    """
    model_type = config.get("model_type")
    if model_type in FAMILIES and FAMILIES[model_type].connector == "merger":
        return FAMILIES[model_type]
    titles = ", ".join(family.title for family in FAMILIES.values())
    if model_type not in {known for known, _ in VERSIONS}:
        raise ConfigError(f"model_type {model_type!r} is not supported; supported: {titles}")
    version = read_version(config.get("version"))
    if model_type == "minicpmv" and version in EARLIER_VERSIONS:
        raise ConfigError(f"MiniCPM-V 2.0 and 2.5 are not supported; supported: {titles}")
    if (model_type, version) not in VERSIONS:
        raise ConfigError(
            f"model_type {model_type!r} of version {config.get('version')!r} is not supported; supported: {titles}"
        )
    return FAMILIES[VERSIONS[model_type, version]]


def read_version(value: object) -> tuple[int, ...]:
    """Return the numbers of a version that is written as a number or a text; empty when it is neither."""
    try:
        numbers = tuple(int(part) for part in str(value).split("."))
    except ValueError:
        return ()
    return numbers if len(numbers) > 1 else (*numbers, 0)
