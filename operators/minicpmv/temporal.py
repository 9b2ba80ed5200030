"""A clip becomes a list of pictures: which frames the model sees, in which order, and which of them belong together.

Members of the family differ in the rule: frames one by one with others stacked on a canvas between them, packs of
frames, or frames alone. Times are seconds from the start of the clip unless a name says otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from operators.minicpmv.family import ClipRule
from operators.minicpmv.packing import (
    TEMPORAL_UNIT_SECONDS,
    PackedConfig,
    choose_packing,
    in_packs,
    time_ids,
    uniform_places,
)

GAP_PX: Final = 6
"""Black pixels between the frames of a composite."""

LONG_CLIP_STEP: Final = 0.1
"""Distance of the candidates of a clip with more periods than `max_frames`, in periods."""

CLOCK_TOLERANCE_SECONDS: Final = 0.001
"""Largest rounding of presentation times that is forgiven; containers with millisecond clocks round by half of it."""


class StackedConfig(BaseModel):
    """Main frames, and the frames between them on canvases; the defaults are those of the released model."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sampling_policy: ClassVar[str] = "minicpmv4_6"
    released_max_slices: ClassVar[int] = 1

    kind: Literal["stacked"] = "stacked"
    fps: Annotated[
        float, Field(gt=0, le=60, description="Main frames a second; more see faster motion and cost more tokens.")
    ] = 1.0
    max_frames: Annotated[
        int, Field(ge=1, le=4096, description="Upper bound on main frames; a longer clip is sampled more thinly.")
    ] = 128
    stack_frames: Annotated[
        int,
        Field(ge=1, le=16, description="Frames a period with the main one; above 1 the others share a canvas."),
    ] = 1

    @property
    def packing(self) -> str:
        """Return `stack` when frames share a canvas, otherwise `none`."""
        return "stack" if self.stack_frames > 1 else "none"

    def most_pictures(self, duration_seconds: float) -> int:
        """Return how many main frames and canvases a clip of this length has at most."""
        mains = min(self.max_frames, math.ceil(duration_seconds * self.fps))
        return mains * (2 if self.stack_frames > 1 else 1)


class FramesConfig(BaseModel):
    """Frames alone, each an ordinary image; the defaults are those of the released models."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    packing: ClassVar[str] = "none"
    sampling_policy: ClassVar[str] = "minicpmv2_6"
    released_max_slices: ClassVar[int] = 2

    kind: Literal["frames"] = "frames"
    fps: Annotated[
        float, Field(gt=0, le=60, description="Frames a second; more see faster motion and cost more tokens.")
    ] = 1.0
    max_frames: Annotated[
        int, Field(ge=1, le=4096, description="Upper bound on frames; a longer clip is sampled more thinly.")
    ] = 64

    def most_pictures(self, duration_seconds: float) -> int:
        """Return how many frames a clip of this length has at most."""
        # A step of whole frames: every second one of 2.9 a period is 1.45 a period.
        return min(self.max_frames, math.ceil(duration_seconds * self.fps * 1.5))


TemporalConfig = Annotated[StackedConfig | PackedConfig | FramesConfig, Field(discriminator="kind")]
"""How frames are taken from a clip, by the rule of the model."""

CONFIG_OF_RULE: Final[dict[ClipRule, type[StackedConfig] | type[PackedConfig] | type[FramesConfig]]] = {
    "stacked": StackedConfig,
    "packed": PackedConfig,
    "frames": FramesConfig,
}


@dataclass(frozen=True)
class Timeline:
    """The frames of a clip as they are shown.

    Attributes:
        frame_seconds: presentation times, ascending, from the start of the clip; the first may be negative, when the
            frame on display at the start was first shown before it.
        duration_seconds: length of the clip.
        frame_rate: average frames a second of the stream.
        tick_seconds: resolution of the stream's clock.
    """

    frame_seconds: NDArray[np.float64]
    duration_seconds: float
    frame_rate: float
    tick_seconds: float

    @property
    def tolerance_seconds(self) -> float:
        """How far a presentation time may lie from its exact value."""
        return min(self.tick_seconds / 2, CLOCK_TOLERANCE_SECONDS) + 1e-9

    def is_constant_rate(self) -> bool:
        """Return whether frame k is shown at k / frame_rate, but for rounding of the clock."""
        if self.frame_rate <= 0:
            return False
        exact = np.arange(len(self.frame_seconds)) / self.frame_rate
        # A tick too many or too few is rounding by the writer of the file.
        return bool(np.all(np.abs(self.frame_seconds - exact) <= self.tolerance_seconds * 2))

    def is_gapless(self) -> bool:
        """Return whether frames come at a constant rate over the whole clip, as in a file of its own.

        A picture that stays to the end of a clip is no frame of a constant rate.
        """
        if not self.is_constant_rate():
            return False
        missing_seconds = abs(len(self.frame_seconds) / self.frame_rate - self.duration_seconds)
        return missing_seconds <= 1 / self.frame_rate + self.tolerance_seconds

    def frames_at(self, seconds: Sequence[float] | NDArray[np.float64]) -> list[int]:
        """Return, for each time, the position of the frame on display then; the first frame before any is shown.

        At a constant rate it is the released processor's truncated product, which in floating point is sometimes one
        frame early (4.1 s at 30 frames a second is its frame 122).
        """
        last = len(self.frame_seconds) - 1
        if self.is_constant_rate():
            return [min(int(time * self.frame_rate), last) for time in seconds]
        found = np.searchsorted(self.frame_seconds, np.asarray(seconds) + self.tolerance_seconds, side="right") - 1
        return [max(int(position), 0) for position in found]


@dataclass(frozen=True)
class ClipImage:
    """One entry of a clip as the model sees it: a frame, a pack of frames, or a canvas of frames.

    Attributes:
        positions: places of its frames in the timeline; a pack may show a frame twice.
        temporal_ids: place in time of each frame, in tenths of a second from the start of the clip.
        is_composite: whether the frames share a canvas.
    """

    positions: tuple[int, ...]
    temporal_ids: tuple[int, ...]
    is_composite: bool = False


def thinned(values: list[float], limit: int) -> list[float]:
    """Return at most `limit` of `values`, evenly, the first and the last among them."""
    if len(values) <= limit:
        return values
    return [values[index] for index in np.linspace(0, len(values) - 1, limit, dtype=int)]


def main_periods(period_count: float, config: StackedConfig) -> list[float]:
    """Return the times of the main frames, in periods of 1 / fps seconds.

    Args:
        period_count: length of the clip in periods, possibly fractional.
        config: sampling.

    Source:
        transformers `models/minicpmv4_6/video_processing_minicpmv4_6.py`, `sample_frames`, where a period is a second.
    """
    if period_count <= config.max_frames:
        return [float(index) for index in range(math.ceil(period_count))]
    candidates = [round(index * LONG_CLIP_STEP, 1) for index in range(int(period_count / LONG_CLIP_STEP))]
    return thinned(candidates, config.max_frames)


def sub_periods(period_count: float, config: StackedConfig) -> list[float]:
    """Return the times of the frames between main frames, in periods; none unless frames are stacked."""
    inner = config.stack_frames - 1
    times = [
        period + step / config.stack_frames
        for period in range(math.ceil(period_count))
        for step in range(1, config.stack_frames)
    ]
    return thinned([time for time in times if time < period_count], config.max_frames * inner) if inner else []


def plan_clip(timeline: Timeline, config: StackedConfig | PackedConfig | FramesConfig) -> list[ClipImage]:
    """Return the entries of a clip in the order in which the model sees them.

    Args:
        timeline: the frames; none gives no entries.
        config: the rule, and its numbers.
    """
    if not len(timeline.frame_seconds) or timeline.duration_seconds <= 0:
        return []
    if config.kind == "stacked":
        return plan_stacked(timeline, config)
    return plan_packed(timeline, config) if config.kind == "packed" else plan_frames(timeline, config)


def plan_stacked(timeline: Timeline, config: StackedConfig) -> list[ClipImage]:
    """Return main frames, and behind them the canvases of the frames between.

    Composite k follows main frame k. In a clip of more periods than `max_frames` main frame k is not in period k any
    more, but the pairing stays by number, and composites beyond the last main frame are not used: the released
    processor does so.
    """
    period_count = timeline.duration_seconds * config.fps
    groups: dict[int, list[float]] = {}
    for time in sub_periods(period_count, config):
        groups.setdefault(int(time), []).append(time)
    images: list[ClipImage] = []
    for number, time in enumerate(main_periods(period_count, config)):
        images.append(shown_at([time / config.fps], timeline))
        if number in groups:
            images.append(shown_at([time / config.fps for time in groups[number]], timeline, is_composite=True))
    return images


def plan_packed(timeline: Timeline, config: PackedConfig) -> list[ClipImage]:
    """Return packs of frames.

    A clip at a constant rate is treated as the recipe treats a file. Otherwise the frames are those on display in the
    middle of equal shares of the clip, which is the recipe's choice without its rounding to whole frames, and the ids
    are of these moments: a picture that stays is seen to stay.
    """
    rate = timeline.frame_rate if timeline.frame_rate > 0 else math.inf
    if timeline.is_gapless():
        count = len(timeline.frame_seconds)
        duration_seconds = count / rate
        chosen = choose_packing(duration_seconds, rate, config)
        positions = uniform_places(count, chosen.frame_count)
        seconds = np.asarray(positions, np.float64) / rate
    else:
        duration_seconds = timeline.duration_seconds
        chosen = choose_packing(duration_seconds, rate, config)
        shares = np.arange(chosen.frame_count, dtype=np.float64) + 0.5
        seconds = shares * duration_seconds / chosen.frame_count
        positions = timeline.frames_at(seconds)
    ids = time_ids(seconds, duration_seconds)
    packs = in_packs(list(zip(positions, ids, strict=True)), chosen.frames_per_pack)
    return [ClipImage(tuple(place for place, _ in pack), tuple(number for _, number in pack)) for pack in packs]


def plan_frames(timeline: Timeline, config: FramesConfig) -> list[ClipImage]:
    """Return single frames: at a constant rate every so many frames, otherwise those on display at equal intervals.

    Source:
        The model cards of MiniCPM-V 2.6 and 4.0, recipe for videos, where a period is a second.
    """
    if timeline.is_gapless():
        step = max(round(timeline.frame_rate / config.fps), 1)
        positions = list(range(0, len(timeline.frame_seconds), step))
    else:
        count = math.ceil(timeline.duration_seconds * config.fps)
        positions = timeline.frames_at([number / config.fps for number in range(count)])
    if len(positions) > config.max_frames:
        positions = [positions[place] for place in uniform_places(len(positions), config.max_frames)]
    ids = temporal_ids(timeline.frame_seconds[positions])
    return [ClipImage((position,), (number,)) for position, number in zip(positions, ids, strict=True)]


def shown_at(seconds: list[float], timeline: Timeline, *, is_composite: bool = False) -> ClipImage:
    """Return the entry of the frames on display at these times."""
    positions = timeline.frames_at(seconds)
    return ClipImage(tuple(positions), tuple(temporal_ids(timeline.frame_seconds[positions])), is_composite)


def temporal_ids(seconds: Sequence[float] | NDArray[np.float64]) -> list[int]:
    """Return the places in time of frames, in tenths of a second from the start of the clip, never negative.

    For models that are told no times: a column, and nothing else.
    """
    # Half a nanosecond keeps 0.3 / 0.1 from truncating to 2.
    return [max(int(time / TEMPORAL_UNIT_SECONDS + 5e-9), 0) for time in seconds]


def composite_layout(frame_count: int, height_px: int, width_px: int) -> tuple[int, int]:
    """Return rows and columns of a composite of frames of this size.

    Four frames make a square; two or three stand in the row or the column whose canvas is nearer to a square; any
    other number makes a row.

    Source:
        transformers `models/minicpmv4_6/video_processing_minicpmv4_6.py`, `concat_frames_as_image`.
    """
    if frame_count == 4:
        return 2, 2
    if frame_count not in (2, 3):
        return 1, frame_count
    row = abs(canvas_side(frame_count, width_px) / height_px - 1.0)
    column = abs(width_px / canvas_side(frame_count, height_px) - 1.0)
    if row == column and frame_count == 2:
        return (1, 2) if width_px >= height_px else (2, 1)
    return (1, frame_count) if row <= column else (frame_count, 1)


def canvas_side(frame_count: int, side_px: int) -> int:
    """Return the length of `frame_count` sides with gaps between them."""
    return frame_count * side_px + (frame_count - 1) * GAP_PX


def composite(frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return the frames on one black canvas, in reading order.

    Shapes:
        frames: each (height, width, 3) uint8, all of one size.
        result: (rows * height + gaps, cols * width + gaps, 3) uint8.
    """
    height_px, width_px = frames[0].shape[:2]
    rows, cols = composite_layout(len(frames), height_px, width_px)
    canvas = np.zeros((canvas_side(rows, height_px), canvas_side(cols, width_px), 3), np.uint8)
    for index, frame in enumerate(frames):
        top = index // cols * (height_px + GAP_PX)
        left = index % cols * (width_px + GAP_PX)
        canvas[top : top + height_px, left : left + width_px] = frame
    return canvas
