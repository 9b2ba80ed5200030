"""What a video file holds before any frame is decoded: its stream, its clock and the order of its packets.

Runs in the decoder's process. Seconds are presentation times from the start of the stream.
"""

import itertools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import av

from operators.decode.video_options import VideoLimits
from schemas.errors import DecodeError

logger = logging.getLogger(__name__)

MIME_TYPE_OF_FORMAT: Final = {
    "mov": "video/mp4", "matroska": "video/x-matroska", "avi": "video/x-msvideo", "mpegts": "video/mp2t",
    "mpeg": "video/mpeg", "mpegvideo": "video/mpeg", "m4v": "video/mpeg", "flv": "video/x-flv",
    "asf": "video/x-ms-asf", "ogg": "video/ogg", "gif": "image/gif", "mxf": "application/mxf", "ivf": "video/x-ivf",
    "dv": "video/x-dv", "rm": "application/vnd.rn-realmedia", "nut": "video/x-nut", "wtv": "video/x-wtv",
    "apng": "image/apng", "yuv4mpegpipe": "video/x-yuv4mpeg",
}  # fmt: skip
"""The containers that are opened. Playlists and file lists are not among them: they name other files and hosts."""

MAGICS: Final = (
    (4, b"ftyp"),
    (4, b"moov"),
    (4, b"mdat"),
    (0, b"\x1aE\xdf\xa3"),
    (0, b"RIFF"),
    (0, b"OggS"),
    (0, b"FLV"),
)
REORDERED_PACKETS: Final = 32
"""More than any codec sends ahead of a frame that is shown before them."""


LATE_PACKETS: Final = 1_000_000
"""Packets of streams announced late that are passed over."""


@dataclass
class OpenVideo:
    """An opened file and the stream that is taken from it.

    Attributes:
        path: the file.
        container: PyAV's container.
        stream: PyAV's video stream.
        note: which of several video streams was taken.
        limits: bounds it was opened with.
        start_ticks: presentation time of the first frame, on the stream's own clock.
    """

    path: str
    container: Any
    stream: Any
    note: str | None
    limits: VideoLimits
    start_ticks: int

    @property
    def tick_seconds(self) -> float:
        """Resolution of the stream's clock."""
        return float(self.stream.time_base)

    @property
    def frame_rate(self) -> float:
        """Average frames a second; 0 where the header does not say."""
        return float(self.stream.average_rate or self.stream.guessed_rate or 0)

    @property
    def format_name(self) -> str:
        """The container's first name, such as `mov` or `matroska`."""
        return str(self.container.format.name.split(",")[0])

    def has_complete_index(self) -> bool:
        """Return whether the header lists every packet of the stream."""
        return bool(self.stream.frames > 0 and len(self.stream.index_entries) == self.stream.frames)

    def seconds(self, ticks: int) -> float:
        """Return a time of the stream's clock as seconds from the start of the stream."""
        return float((ticks - self.start_ticks) * self.stream.time_base)

    def ticks(self, seconds: float) -> int:
        """Return seconds from the start of the stream as a time of its clock."""
        return self.start_ticks + round(seconds / float(self.stream.time_base))

    def close(self) -> None:
        """Close the file."""
        self.container.close()


def open_video(path: str, limits: VideoLimits) -> OpenVideo:
    """Open a file and choose its video stream.

    Raises:
        DecodeError: `empty`, `damaged`, `not_video`, `no_video_stream` or `codec`.
    """
    av.logging.set_level(av.logging.PANIC)
    if os.path.getsize(path) == 0:
        raise DecodeError("the file has no bytes", code="empty", stage="demux")
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(MIME_TYPE_OF_FORMAT)}
    try:
        # The prefix keeps a name with a colon or a percent sign from being read as a protocol or a pattern.
        container = av.open(f"file:{path}", options=options, metadata_errors="replace")
    except MemoryError:
        # A limit of ours, not damage of the file.
        raise
    except Exception as error:
        code = "damaged" if has_video_magic(path) else "not_video"
        raise DecodeError(f"not a readable video: {error_text(error)}", code=code, stage="demux") from error
    stream, note = choose_stream(container)
    # One thread a worker is the unit of parallelism, and frame threads would hold many frames.
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(limits.max_frame_pixels)}
    return OpenVideo(path, container, stream, note, limits, first_ticks(container, stream))


def first_ticks(container: Any, stream: Any) -> int:
    """Return the presentation time of the first frame.

    AVI has decoding times only: with reordered pictures the first one is shown some ticks after the header's start.
    """
    start = int(stream.start_time or 0)
    if container.format.name != "avi":
        return start
    try:
        head = itertools.islice(container.demux(stream), REORDERED_PACKETS)
        start = min((packet.pts for packet in head if packet.pts is not None), default=start)
        container.seek(0)
    except av.error.FFmpegError as error:
        logger.debug("the start of the stream cannot be read: %s", error)
    return start


def error_text(error: BaseException) -> str:
    """Return a library's message without the path, which is the business of the row."""
    return str(getattr(error, "strerror", None) or error)[:300]


def has_video_magic(path: str) -> bool:
    """Return whether the first bytes are those of a video container."""
    with open(path, "rb") as file:
        head = file.read(16)
    return any(head[offset : offset + len(magic)] == magic for offset, magic in MAGICS)


def choose_stream(container: Any) -> tuple[Any, str | None]:
    """Return the video stream to read and, when there are several, a note of which it is.

    Cover pictures are not videos. Of several streams it is the one that FFmpeg and decord prefer.

    Raises:
        DecodeError: `no_video_stream`, or `codec` when there is no decoder for it.
    """
    videos = [
        stream
        for stream in container.streams
        if stream.type == "video" and not stream.disposition & av.stream.Disposition.attached_pic
    ]
    if not videos:
        kinds = sorted({stream.type for stream in container.streams})
        found = f"its streams are {', '.join(kinds)}" if kinds else "it has no streams"
        raise DecodeError(f"no video stream: {found}", code="no_video_stream", stage="demux")
    readable = [stream for stream in videos if stream.codec_context is not None]
    if not readable:
        raise DecodeError("no decoder for the codec of the video stream", code="codec", stage="demux")
    best = container.streams.best("video")
    chosen = best if best in readable else readable[0]
    if len(videos) == 1:
        return chosen, None
    sizes = ", ".join(f"{stream.index} ({stream.width}x{stream.height})" for stream in readable)
    return chosen, f"stream {chosen.index} of video streams {sizes}"


def packets(video: OpenVideo, *, every_stream: bool = False) -> Iterator[Any]:
    """Yield packets from where the container stands, of the video stream alone; damage to the container ends them."""
    streams = () if every_stream else (video.stream,)
    for _ in range(LATE_PACKETS):
        try:
            for packet in video.container.demux(*streams):
                if packet.size:
                    yield packet
            return
        except IndexError:
            # PyAV stumbles over packets of a stream that a transport stream announces late, and then goes on.
            continue
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError:
            return


def decoded_frames(video: OpenVideo) -> Iterator[Any]:
    """Yield every frame that decodes, in the order in which the decoder gives them; packets that fail are left out."""
    for packet in packets(video):
        try:
            frames = packet.decode()
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError:
            continue
        yield from frames
    try:
        yield from video.stream.codec_context.decode(None)
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError:
        return


def seek(video: OpenVideo, ticks: int) -> None:
    """Move to the key frame at or before a time; to the start where the container cannot."""
    try:
        video.container.seek(ticks, stream=video.stream, backward=True, any_frame=False)
    except av.error.FFmpegError:
        rewind(video)


def rewind(video: OpenVideo) -> None:
    """Move to the start of the file, by opening it again: not every container can seek to its first packet."""
    video.container.close()
    fresh = open_video(video.path, video.limits)
    video.container, video.stream = fresh.container, fresh.stream
