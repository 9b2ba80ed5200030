"""What a video file holds: length, rate, codec and size, with the lies of headers found out.

`probe` is a generator function for `operators.decode.box`: it runs in a process of its own.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import av

from operators.decode.demux import MIME_TYPE_OF_FORMAT, OpenVideo, open_video, packets, rewind
from operators.decode.packet_index import last_end_seconds, scan_file
from operators.decode.video_options import VideoLimits
from schemas.errors import DecodeError

PROBED_PACKETS: Final = 300
"""Packets that may fail before a stream counts as undecodable."""


def probe(path: str, limits: VideoLimits | dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Yield one dict of `SOURCE_FACTS` columns.

    The first frame is decoded: headers are wrong about sizes and silent about rotation. A header that does not tell the
    length, or contradicts its own index, is overruled by counting packets.

    Args:
        path: a local file.
        limits: `VideoLimits`, or its fields.

    Raises:
        DecodeError: `empty`, `damaged`, `not_video`, `no_video_stream`, `no_frames`, `codec`, `too_large`, `too_long`.
    """
    bounds = VideoLimits.model_validate(limits or {})
    video = open_video(path, bounds)
    try:
        check_clock(video)
        length = measure_length(video)
        frame = first_frame(video)
        if length.duration_seconds > bounds.max_duration_seconds:
            found, most = length.duration_seconds, bounds.max_duration_seconds
            raise DecodeError(f"{found:.0f} s long, at most {most:.0f} s are read", code="too_long", stage="demux")
        height_px, width_px = upright_size(frame)
        yield {
            "kind": "video",
            "mime_type": mime_type(video),
            "duration_seconds": length.duration_seconds,
            "fps": length.frame_rate,
            "frame_count": length.frame_count,
            "codec": codec_name(video),
            "width_px": width_px,
            "height_px": height_px,
            "stream_note": video.note,
        }
    finally:
        video.close()


def mime_type(video: OpenVideo) -> str:
    """Return the media type of the container; Matroska that holds web codecs is WebM."""
    if video.format_name == "matroska" and codec_name(video) in ("vp8", "vp9", "av1") and is_webm(video.path):
        return "video/webm"
    return MIME_TYPE_OF_FORMAT.get(video.format_name, "application/octet-stream")


def is_webm(path: str) -> bool:
    """Return whether the document type in the EBML header is webm."""
    with open(path, "rb") as file:
        return b"webm" in file.read(64)


def codec_name(video: OpenVideo) -> str:
    """Return the codec's own name, whichever library decodes it."""
    return str(video.stream.codec_context.codec.canonical_name)


@dataclass(frozen=True)
class Length:
    """How long a stream is."""

    duration_seconds: float
    frame_count: int | None
    frame_rate: float


def check_clock(video: OpenVideo) -> None:
    """Refuse a clock that cannot time frames: a time scale of 0 is read as one tick a second.

    Raises:
        DecodeError: `damaged`.
    """
    entries = video.stream.index_entries
    if video.stream.time_base < 1 or not len(entries) or video.stream.duration is None:
        return
    span = entries[len(entries) - 1].timestamp - entries[0].timestamp
    if span > 2 * video.stream.duration:
        raise DecodeError(
            f"the clock is broken: packets span {span} ticks of {video.stream.time_base} s in a stream of "
            f"{video.stream.duration}",
            code="damaged",
            stage="demux",
        )


def measure_length(video: OpenVideo) -> Length:
    """Return the length of the stream's presentation: from the header's index, or by reading the packets."""
    if video.has_complete_index() and video.stream.duration:
        return indexed_length(video)
    return counted_length(video)


def indexed_length(video: OpenVideo) -> Length:
    """Return the length that the header tells, unless its own index contradicts it."""
    count = int(video.stream.frames)
    entries = video.stream.index_entries
    duration_seconds = float(video.stream.duration * video.stream.time_base)
    span = float((entries[count - 1].timestamp - entries[0].timestamp) * video.stream.time_base)
    indexed_seconds = span * count / (count - 1) if count > 1 else duration_seconds
    if duration_seconds > 2 * indexed_seconds + 60:
        duration_seconds = indexed_seconds
    # Where pictures are reordered and the rate varies, a header may count decoding times and end before the last frame.
    duration_seconds = max(duration_seconds, last_end_seconds(video) or 0.0)
    return Length(duration_seconds, count, video.frame_rate or count / duration_seconds)


def counted_length(video: OpenVideo) -> Length:
    """Return the length by reading all packets; where the file is too large for that, what the container says.

    A file whose every stream stops before the end that its container announces was cut: then the announced length
    stands, so that the lost part is owed and reported.
    """
    announced_seconds = announced_duration(video)
    found = scan_file(video)
    if found is None:
        return Length(announced_seconds or 0.0, None, video.frame_rate)
    counted_seconds, last_seconds, count = found
    if not counted_seconds and video.frame_rate:
        counted_seconds = count / video.frame_rate
    duration_seconds = counted_seconds
    if announced_seconds and announced_seconds > last_seconds + 1.0:
        duration_seconds = announced_seconds
    rate = video.frame_rate or (count / counted_seconds if counted_seconds else 0.0)
    return Length(duration_seconds, count, rate)


def announced_duration(video: OpenVideo) -> float | None:
    """Return the length that the stream's or the container's header announces, if one does."""
    if video.stream.duration:
        return float(video.stream.duration * video.stream.time_base)
    tagged = str(video.stream.metadata.get("DURATION", "")).split(":")
    if len(tagged) == 3:
        try:
            return int(tagged[0]) * 3600 + int(tagged[1]) * 60 + float(tagged[2])
        except ValueError:
            pass
    return video.container.duration / av.time_base if video.container.duration else None


def first_frame(video: OpenVideo) -> Any:
    """Return the first frame that decodes.

    Raises:
        DecodeError: `damaged`, `no_frames` or `too_large`.
    """
    rewind(video)
    failure: BaseException | None = None
    for packet in itertools.islice(packets(video), PROBED_PACKETS):
        try:
            frames = packet.decode()
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError as error:
            failure = error
            continue
        if frames:
            return frames[0]
    if frames := drained(video):
        return frames[0]
    check_frame_size(video)
    if failure is None:
        raise DecodeError("the video stream has no frames", code="no_frames", stage="demux")
    raise DecodeError(f"no frame decodes: {failure}", code="damaged", stage="sample") from failure


def drained(video: OpenVideo) -> list[Any]:
    """Return the frames that the decoder still holds; a short video may come out only here."""
    try:
        return list(video.stream.codec_context.decode(None))
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError:
        return []


def check_frame_size(video: OpenVideo) -> None:
    """Raise `too_large` when the decoder was refused its frames for their size."""
    context = video.stream.codec_context
    pixels = max(context.width * context.height, context.coded_width * context.coded_height)
    if pixels > video.limits.max_frame_pixels:
        raise DecodeError(
            f"frames of {context.width}x{context.height} px, at most {video.limits.max_frame_pixels} pixels are read",
            code="too_large",
            stage="demux",
        )


def upright_size(frame: Any) -> tuple[int, int]:
    """Return height and width after the display matrix."""
    if round(frame.rotation / 90) % 2:
        return frame.width, frame.height
    return frame.height, frame.width
