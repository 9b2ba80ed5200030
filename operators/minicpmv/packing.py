"""How frames of a clip are chosen and packed, on plain numbers: the published recipe of MiniCPM-V 4.5.

A clip of N frames at f frames a second is d = N / f seconds long. The recipe knows three numbers: the wish (frames a
second), the budget (packs a clip) and the largest pack. Up to the budget every frame is a pack of its own; beyond it
packs grow, so that the number of visual tokens stays and more frames are seen; where the largest pack is not enough,
frames are left out.
"""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Final, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

TEMPORAL_UNIT_SECONDS: Final = 0.1
"""A temporal id counts these."""

LARGEST_PACK: Final = 6
RELEASED_PACK: Final = 3
"""Largest pack that the recipe calls valid: 96 patches become one visual token."""

HIGHEST_FPS: Final = 10.0
"""A temporal id a frame: faster ones would share it."""

T = TypeVar("T")


class PackedConfig(BaseModel):
    """Packs of frames that share one set of visual tokens; the defaults are those of the released model.

    One differs: the recipe stops at packs of three and leaves frames out from there, though packs of six are valid.
    Here packs grow to six before a frame is left out. Where three are enough both say the same, and beyond that the
    budget in tokens is the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    packing: ClassVar[str] = "3d_resampler"
    sampling_policy: ClassVar[str] = "minicpmv4_5"
    released_max_slices: ClassVar[int] = 1

    kind: Literal["packed"] = "packed"
    fps: Annotated[
        float,
        Field(gt=0, le=HIGHEST_FPS, description="Frames a second; more see faster motion and fill packs sooner."),
    ] = 3.0
    max_frames: Annotated[
        int, Field(ge=1, le=4096, description="Packs a clip may have before its frames share packs; 64 tokens each.")
    ] = 180
    max_packing: Annotated[
        int, Field(ge=1, le=LARGEST_PACK, description="Most frames a pack; more see more of a long clip, less sharply.")
    ] = RELEASED_PACK
    forced_packing: Annotated[
        int | None,
        Field(ge=1, le=LARGEST_PACK, description="Frames a pack, whatever the budget; null: as few as it allows."),
    ] = None

    def most_pictures(self, duration_seconds: float) -> int:
        """Return how many frames a clip of this length has at most."""
        return choose_packing(duration_seconds, math.inf, self).frame_count


class Packing(NamedTuple):
    """How many frames of a clip the model sees, and how many of them share a pack."""

    frame_count: int
    frames_per_pack: int


def choose_packing(duration_seconds: float, frame_rate: float, config: PackedConfig) -> Packing:
    """Return the number of frames and their packing for a clip.

    Where frames are packed, the wish may ask for more frames than the clip has; it then shows some of them twice.

    Args:
        duration_seconds: length of the clip.
        frame_rate: frames a second that there are; `math.inf` when that is no bound.
        config: wish and budget.

    Source:
        The model card of MiniCPM-V 4.5, recipe for videos. It fails where its count rounds to no frame; such a clip
        has one here.
    """
    wish, budget = config.fps, config.max_frames
    if wish * int(duration_seconds) <= budget:
        frames_per_pack = 1
        frame_count = round(min(wish, whole_rate(frame_rate)) * min(budget, duration_seconds))
    else:
        frames_per_pack = math.ceil(duration_seconds * wish / budget)
        frame_count = round(duration_seconds * wish)
        if frames_per_pack > config.max_packing:
            frames_per_pack = config.max_packing
            frame_count = budget * config.max_packing
    if config.forced_packing is not None:
        frames_per_pack = min(config.forced_packing, config.max_packing)
    return Packing(max(frame_count, 1), frames_per_pack)


def whole_rate(frame_rate: float) -> float:
    """Return the frame rate as a whole number, as the recipe bounds the wish; below one half, the rate itself."""
    return frame_rate if frame_rate < 0.5 or math.isinf(frame_rate) else round(frame_rate)


def uniform_places(count: int, wanted: int) -> list[int]:
    """Return `wanted` of `count` places, each the middle of an equal share; some twice when there are fewer."""
    gap = count / wanted
    return [int(number * gap + gap / 2) for number in range(wanted)]


def time_ids(seconds: Sequence[float] | NDArray[np.float64], duration_seconds: float) -> list[int]:
    """Return the temporal ids of frames of a packed clip.

    An id is the nearest tenth of a second within the clip, the earlier of two, divided by a tenth and truncated. In
    floating point that is one too few for some tenths (4.3 / 0.1 is 42.99...); the recipe does so.

    Args:
        seconds: times of the frames from the start of the clip.
        duration_seconds: length of the clip.
    """
    tenths = np.arange(0, duration_seconds, TEMPORAL_UNIT_SECONDS)
    times = np.asarray(seconds, np.float64)
    after = np.searchsorted(tenths, times).clip(0, len(tenths) - 1)
    before = (after - 1).clip(0)
    nearest = np.where(times - tenths[before] <= tenths[after] - times, before, after)
    ids: list[int] = (tenths[nearest] / TEMPORAL_UNIT_SECONDS).astype(np.int32).tolist()
    return ids


def in_packs(values: Sequence[T], frames_per_pack: int) -> list[Sequence[T]]:
    """Return consecutive `values` in packs; the last may be shorter."""
    return [values[start : start + frames_per_pack] for start in range(0, len(values), frames_per_pack)]
