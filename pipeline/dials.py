"""Options that not every model has: refused where the model has none, and its own default where they are not given."""

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from operators.minicpmv.config import ModelConfig
from operators.minicpmv.family import ClipRule, Family
from operators.minicpmv.packing import RELEASED_PACK, PackedConfig
from operators.minicpmv.slicing import SliceConfig
from operators.minicpmv.temporal import CONFIG_OF_RULE, FramesConfig, StackedConfig
from pipeline.spec import RunSpec
from schemas.errors import ConfigError

CLIPS_OF_RULE: dict[ClipRule, str] = {
    "stacked": "main frames with others on canvases between them",
    "packed": "packs of frames",
    "frames": "single frames",
}

BYTES_PER_SLICE = 448 * 448 * 3 * 1.1

LARGEST_SEGMENT_PIXELS_BYTES = 768 * 2**20
"""One row carries a segment. The largest that the recipe of 4.5 makes, 1080 frames, fits. The decoder's process holds
such a row twice, 1.5 GB of its 3 GB (measured), and Ray's object store, a third of the memory by default, a few of
them; rows that it cannot hold go over the disk (seen with 364 MB in a store of 250), which takes longer."""


def check_dials(spec: RunSpec, family: Family) -> None:
    """Refuse options that the model does not have, and segments that are too large for a row.

    Raises:
        ConfigError: in one line, with the option.
    """
    for option, reason in foreign_dials(spec, family):
        raise ConfigError(f"{family.title} has no {option}: {reason}")
    found = segment_bytes(spec, family)
    if found > LARGEST_SEGMENT_PIXELS_BYTES:
        raise ConfigError(
            f"a video segment would carry {found / 2**20:.0f} MB of pixels, at most "
            f"{LARGEST_SEGMENT_PIXELS_BYTES / 2**20:.0f} fit: lower --segment-seconds, --fps, --max-frames or "
            "--video-max-slices"
        )


def foreign_dials(spec: RunSpec, family: Family) -> Iterator[tuple[str, str]]:
    """Yield each option of `spec` that `family` does not have, and why."""
    sees = f"it sees clips as {CLIPS_OF_RULE[family.clip_rule]}"
    if spec.stack_frames is not None and family.clip_rule != "stacked":
        yield "--stack-frames", sees
    if family.clip_rule != "packed":
        for option, given in (("--packing", spec.packing), ("--max-packing", spec.max_packing)):
            if given is not None:
                yield option, sees
    if spec.thinking and not family.thinks:
        yield "--thinking", "it answers at once"
    if family.connector == "resampler":
        fixed = "each slice becomes a fixed number of visual tokens"
        if spec.downsample is not None:
            yield "--downsample", fixed
        if spec.small_image_upsize is not None:
            yield "--small-image-upsize", fixed


def temporal_config(spec: RunSpec, family: Family | None) -> StackedConfig | PackedConfig | FramesConfig:
    """Return how frames are taken from clips; without a model nothing is, and the options do not matter.

    Raises:
        ConfigError: a number is out of the model's range.
    """
    if family is None:
        return StackedConfig()
    forced = None if spec.packing in (None, "auto") else int(spec.packing)
    asked: dict[str, Any] = {
        "fps": spec.fps,
        "max_frames": spec.max_frames,
        "stack_frames": spec.stack_frames,
        "forced_packing": forced,
        # A packing that is asked for is meant, also above the recipe's own bound.
        "max_packing": spec.max_packing or (max(forced, RELEASED_PACK) if forced else None),
    }
    try:
        return CONFIG_OF_RULE[family.clip_rule](**{name: value for name, value in asked.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{family.title}: --{first['loc'][0]}: {first['msg']}".replace("_", "-")) from error


def clip_max_slices(spec: RunSpec, family: Family | None) -> int:
    """Return the most slices of a video frame."""
    return spec.video_max_slices or temporal_config(spec, family).released_max_slices


def clip_slicing(spec: RunSpec, model: ModelConfig | None) -> SliceConfig:
    """Return how frames are sliced; without a model nothing is."""
    own = model.clip_slicing if model else SliceConfig()
    most = clip_max_slices(spec, model.family if model else None)
    return _changed(own, downsample_mode=spec.downsample, max_slices=most)


def page_slicing(spec: RunSpec, model: ModelConfig | None) -> SliceConfig:
    """Return how pages are sliced; without a model nothing is."""
    own = model.slicing if model else SliceConfig()
    return _changed(
        own,
        downsample_mode=spec.downsample,
        max_slices=spec.max_slices,
        small_image_upsize=spec.small_image_upsize,
    )


def _changed(own: SliceConfig, **chosen: Any) -> SliceConfig:
    return own.model_copy(update={name: value for name, value in chosen.items() if value is not None})


def segment_bytes(spec: RunSpec, family: Family | None) -> float:
    """Return the bytes of pixels that a segment of full length carries at most, about."""
    most = clip_max_slices(spec, family)
    pictures = temporal_config(spec, family).most_pictures(spec.segment_seconds)
    return pictures * (1 + most if most > 1 else 1) * BYTES_PER_SLICE
