"""A clip becomes a list of images: which frames the model sees, in which order, and which of them share a canvas.

Times are seconds from the start of the clip unless a name says otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

GAP_PX: Final = 6
"""Black pixels between the frames of a composite."""

LONG_CLIP_STEP: Final = 0.1
"""Distance of the candidates of a clip with more periods than `max_num_frames`, in periods."""

CLOCK_TOLERANCE_SECONDS: Final = 0.001
"""Largest rounding of presentation times that is forgiven; containers with millisecond clocks round by half of it."""

TEMPORAL_UNIT_SECONDS: Final = 0.1


class TemporalConfig(BaseModel):
    """How frames are taken from a clip; the defaults are those of the released model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fps: Annotated[
        float, Field(gt=0, le=60, description="Main frames a second; more see faster motion and cost more tokens.")
    ] = 1.0
    max_num_frames: Annotated[
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

    def frames_at(self, seconds: Sequence[float]) -> list[int]:
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
    """One image that the model sees: a main frame, or a canvas of the frames between two main frames.

    Attributes:
        times: requested times of its frames.
        positions: places of these frames in the timeline.
        is_composite: whether the frames share a canvas.
    """

    times: tuple[float, ...]
    positions: tuple[int, ...]
    is_composite: bool


def thinned(values: list[float], limit: int) -> list[float]:
    """Return at most `limit` of `values`, evenly, the first and the last among them."""
    if len(values) <= limit:
        return values
    return [values[index] for index in np.linspace(0, len(values) - 1, limit, dtype=int)]


def main_periods(period_count: float, config: TemporalConfig) -> list[float]:
    """Return the times of the main frames, in periods of 1 / fps seconds.

    Args:
        period_count: length of the clip in periods, possibly fractional.
        config: sampling.

    Source:
        transformers `models/minicpmv4_6/video_processing_minicpmv4_6.py`, `sample_frames`, where a period is a second.
    """
    if period_count <= config.max_num_frames:
        return [float(index) for index in range(math.ceil(period_count))]
    candidates = [round(index * LONG_CLIP_STEP, 1) for index in range(int(period_count / LONG_CLIP_STEP))]
    return thinned(candidates, config.max_num_frames)


def sub_periods(period_count: float, config: TemporalConfig) -> list[float]:
    """Return the times of the frames between main frames, in periods; none unless frames are stacked."""
    inner = config.stack_frames - 1
    times = [
        period + step / config.stack_frames
        for period in range(math.ceil(period_count))
        for step in range(1, config.stack_frames)
    ]
    return thinned([time for time in times if time < period_count], config.max_num_frames * inner) if inner else []


def plan_clip(timeline: Timeline, config: TemporalConfig) -> list[ClipImage]:
    """Return the images of a clip in the order in which the model sees them.

    Composite k follows main frame k. In a clip of more periods than `max_num_frames` main frame k is not in period k
    any more, but the pairing stays by number, and composites beyond the last main frame are not used: the released
    processor does so.

    Args:
        timeline: the frames; none gives no images.
        config: sampling.
    """
    if not len(timeline.frame_seconds) or timeline.duration_seconds <= 0:
        return []
    period_count = timeline.duration_seconds * config.fps
    mains = main_periods(period_count, config)
    groups: dict[int, list[float]] = {}
    for time in sub_periods(period_count, config):
        groups.setdefault(int(time), []).append(time)
    images: list[ClipImage] = []
    for number, time in enumerate(mains):
        images.append(clip_image([time], timeline, config, is_composite=False))
        if number in groups:
            images.append(clip_image(groups[number], timeline, config, is_composite=True))
    return images


def clip_image(periods: list[float], timeline: Timeline, config: TemporalConfig, *, is_composite: bool) -> ClipImage:
    """Return the image of the frames on display at these times, given in periods."""
    times = [period / config.fps for period in periods]
    return ClipImage(tuple(times), tuple(timeline.frames_at(times)), is_composite)


def temporal_ids(seconds: Sequence[float]) -> list[int]:
    """Return the places in time of frames, in tenths of a second from the start of the clip, never negative."""
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
