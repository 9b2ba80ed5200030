"""Segments of a video: the frames that the model sees of each time range, reduced as they come.

`decode_segments` is a generator function for `operators.decode.box`: it runs in a process of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from operators.decode.child import error_fields
from operators.decode.demux import OpenVideo, open_video
from operators.decode.frames import DecordFailedError, FrameReader, PyavReader, choose_reader
from operators.decode.packet_index import PacketIndex, index_range
from operators.decode.video_options import SegmentOptions
from operators.minicpmv.slicing import SlicedImage, slice_image
from operators.minicpmv.temporal import ClipImage, Timeline, composite, plan_clip
from schemas.errors import DecodeError, PrepareError, RecordError

DECORD_MAX_PICTURES: Final = 128
"""decord decodes ahead of a reader that takes its time, by more and more: over 600 frames of 1080p it came to 2.5 GB,
where PyAV took 0.85 GB and less time (measured)."""


@dataclass
class _Entry:
    """What has been made of one entry of a clip: of a pack, each frame that came; of a canvas, the canvas.

    Attributes:
        places: which frames of the entry came, ascending.
        images: the reduced frames in this order, or the one canvas.
    """

    places: list[int] = field(default_factory=list)
    images: list[SlicedImage] = field(default_factory=list)

    def slices(self) -> list[NDArray[np.uint8]]:
        """Return the overviews of all frames, then the first slice of all frames, and so on."""
        return [part for same_cell in zip(*(image.slices for image in self.images), strict=True) for part in same_cell]


@dataclass
class _Clip:
    """What has been made of a segment so far, by number of the entry; only reduced images are kept."""

    entries: dict[int, _Entry] = field(default_factory=dict)
    byte_count: int = 0


def decode_segments(
    path: str, segments: Sequence[dict[str, Any]], options: SegmentOptions | dict[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield one dict for each segment, in order.

    Args:
        path: a local file.
        segments: `segment_index`, `start_seconds`, `stop_seconds` of each: ascending, for a single pass.
        options: `SegmentOptions`, or its fields.

    Yields:
        The columns of `SEGMENT_FACTS` that decoding knows, `pixels` (one-dimensional uint8 array), `slice_shapes`,
        `slice_grids`, and `damage` with `damage_code`: None, or what was lost of a segment that still has frames. A
        segment without any frame has `failure` instead, as `operators.decode.child.error_fields` gives it.

    Raises:
        DecodeError: the file cannot be opened.
    """
    chosen = SegmentOptions.model_validate(options or {})
    video = open_video(path, chosen.limits)
    try:
        start_seconds = min(segment["start_seconds"] for segment in segments)
        stop_seconds = max(segment["stop_seconds"] for segment in segments)
        index = index_range(video, start_seconds, stop_seconds)
        longest_seconds = max(segment["stop_seconds"] - segment["start_seconds"] for segment in segments)
        is_dense = chosen.temporal.most_pictures(longest_seconds) > DECORD_MAX_PICTURES
        reader = choose_reader(video, index, "pyav" if is_dense else chosen.decoder)
        for segment in segments:
            facts = {name: segment[name] for name in ("segment_index", "start_seconds", "stop_seconds")}
            try:
                try:
                    made = decode_segment(video, index, reader, segment, chosen)
                except DecordFailedError:
                    reader = PyavReader(video, index)
                    made = decode_segment(video, index, reader, segment, chosen)
            except RecordError as error:
                made = {"failure": error_fields(error)}
            yield facts | made
            del made
    finally:
        video.close()


@dataclass(frozen=True)
class SegmentFrames:
    """Where a segment lies among the frames of the index.

    Attributes:
        first: position of its first frame, which may be the frame on display when it starts.
        own_start: position of the first frame shown at or after its start.
        own_stop: position after its last frame.
        timeline: the frames from `first` on.
        lost: what the stream lacks of the segment; None when nothing.
    """

    first: int
    own_start: int
    own_stop: int
    timeline: Timeline
    lost: str | None


def segment_frames(video: OpenVideo, index: PacketIndex, start_seconds: float, stop_seconds: float) -> SegmentFrames:
    """Return the frames of a half-open time range.

    Raises:
        DecodeError: `truncated_stream` or `no_frames` when there are none.
    """
    seconds = (index.ticks - video.start_ticks) * video.tick_seconds
    rate = video.frame_rate or 25.0
    # Boundaries are rounded to float64 and, in plans, to the container's clock.
    own_start, own_stop = (
        int(place) for place in np.searchsorted(seconds, np.array([start_seconds, stop_seconds]) - 1e-6)
    )
    end_seconds = max(video.seconds(index.end_ticks), float(seconds[-1]) + 1 / rate if len(seconds) else 0.0)
    lost = None
    if index.reaches_end and end_seconds + max(3 / rate, 0.25) < stop_seconds:
        lost = f"the stream ends at {end_seconds:.3f} s, before the segment does at {stop_seconds:.3f} s"
        if end_seconds <= start_seconds or not len(seconds):
            raise DecodeError(lost, code="truncated_stream", stage="sample")
        # A tick less, so that rounding of the last time does not ask for one frame more.
        stop_seconds = end_seconds - min(video.tick_seconds, 0.5 / rate)
    if not len(seconds) or own_stop == 0:
        raise DecodeError(f"no frame is shown from {start_seconds:.3f} s on", code="no_frames", stage="sample")
    starts_on_frame = own_start < own_stop and seconds[own_start] <= start_seconds + 1e-3
    first = own_start if starts_on_frame else max(own_start - 1, 0)
    timeline = Timeline(
        np.asarray(seconds[first:own_stop] - start_seconds, np.float64),
        stop_seconds - start_seconds,
        video.frame_rate,
        video.tick_seconds,
    )
    return SegmentFrames(first, own_start, own_stop, timeline, lost)


def decode_segment(
    video: OpenVideo, index: PacketIndex, reader: FrameReader, segment: dict[str, Any], options: SegmentOptions
) -> dict[str, Any]:
    """Return the frames of one segment, reduced, with what is known about them.

    Raises:
        DecodeError: no frame could be decoded.
        PrepareError: `too_large` when the pixels would exceed `max_segment_bytes`.
    """
    frames = segment_frames(video, index, segment["start_seconds"], segment["stop_seconds"])
    plan = plan_clip(frames.timeline, options.temporal)
    clip = _Clip()
    problems = decode_entries(reader, frames, plan, clip, options)
    if not clip.entries:
        code = "damaged" if problems else "no_frames"
        raise DecodeError(problems[0] if problems else "no frame was sampled", code=code, stage="sample")
    damage = problems[0] if problems else frames.lost
    duration_seconds = frames.timeline.duration_seconds
    single_count = sum(len(entry.places) for number, entry in clip.entries.items() if not plan[number].is_composite)
    return {
        "start_frame": index.first_number + frames.own_start,
        "stop_frame": index.first_number + frames.own_stop,
        "sampling_policy": options.temporal.sampling_policy,
        "target_fps": options.temporal.fps,
        "sampled_fps": single_count / duration_seconds,
        "packing": options.temporal.packing,
        "decoder": reader.name,
        "damage": damage,
        "damage_code": None if damage is None else "truncated_stream" if frames.lost else "damaged",
        **clip_columns(clip, plan, frames.timeline, segment["start_seconds"]),
    }


def decode_entries(
    reader: FrameReader, frames: SegmentFrames, plan: list[ClipImage], clip: _Clip, options: SegmentOptions
) -> list[str]:
    """Fill `clip` in one ascending pass over the frames, and return what was damaged.

    Only the frames of composites that are not complete yet are held at full size.
    """
    users: dict[int, list[tuple[int, int]]] = {}
    for number, entry in enumerate(plan):
        for place, position in enumerate(entry.positions):
            users.setdefault(position, []).append((number, place))
    held: dict[int, dict[int, NDArray[np.uint8]]] = {}
    problems: list[str] = []
    for position in sorted(users):
        try:
            rgb = reader.read(frames.first + position)
        except DecodeError as error:
            problems.append(str(error))
            rgb = None
        singles = [(number, place) for number, place in users[position] if not plan[number].is_composite]
        if singles and rgb is not None:
            # A frame that stays on display is shown several times.
            sliced = slice_image(rgb, options.slicing)
            for number, place in singles:
                keep_image(clip, number, sliced, [place], options)
        for number, place in users[position]:
            if not plan[number].is_composite:
                continue
            if rgb is not None:
                held.setdefault(number, {})[place] = rgb
            if place == len(plan[number].positions) - 1 and number in held:
                parts = held.pop(number)
                sliced = slice_image(composite([parts[place] for place in sorted(parts)]), options.slicing)
                keep_image(clip, number, sliced, sorted(parts), options)
    return problems


def keep_image(clip: _Clip, number: int, sliced: SlicedImage, places: list[int], options: SegmentOptions) -> None:
    """Add a reduced frame, or a canvas of the frames at `places`, to an entry of the clip.

    Raises:
        PrepareError: `too_large`.
    """
    entry = clip.entries.setdefault(number, _Entry())
    entry.places += places
    entry.images.append(sliced)
    clip.byte_count += sum(part.nbytes for part in sliced.slices)
    if clip.byte_count > options.max_segment_bytes:
        raise PrepareError(
            f"the pixels of the segment exceed {options.max_segment_bytes} bytes after {len(clip.entries)} images",
            code="too_large",
        )


def clip_columns(clip: _Clip, plan: list[ClipImage], timeline: Timeline, start_seconds: float) -> dict[str, Any]:
    """Return the columns that follow from the images, in the order in which the model sees them."""
    order = sorted(clip.entries)
    entries = [clip.entries[number] for number in order]
    positions = [plan[number].positions[place] for number in order for place in clip.entries[number].places]
    overviews = [
        image.slices[0] for number in order if not plan[number].is_composite for image in clip.entries[number].images
    ]
    slices = [part for entry in entries for part in entry.slices()]
    return {
        "frame_count_sampled": len(positions),
        "frame_timestamps_seconds": [start_seconds + float(timeline.frame_seconds[position]) for position in positions],
        "temporal_ids": [
            [plan[number].temporal_ids[place] for place in clip.entries[number].places] for number in order
        ],
        "pack_count": len(order),
        "motion_score": motion_score(overviews),
        "pixels": np.concatenate([part.reshape(-1) for part in slices]),
        "slice_shapes": [{"height_px": part.shape[0], "width_px": part.shape[1]} for part in slices],
        "slice_grids": [entry.images[0].grid._asdict() for entry in entries],
    }


def motion_score(overviews: list[NDArray[np.uint8]]) -> float | None:
    """Return the mean absolute difference of consecutive frames (main frames, where others are stacked), 0 to 1.

    None for fewer than two.
    """
    if len(overviews) < 2:
        return None
    differences = [
        float(np.abs(after.astype(np.int16) - before).mean()) / 255
        for before, after in pairwise(overviews)
        if before.shape == after.shape
    ]
    return float(np.mean(differences)) if differences else None
