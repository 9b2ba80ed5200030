"""What a video file holds before any frame is decoded: its stream, its clock and the order of its packets.

Runs in the decoder's process. Seconds are presentation times from the start of the stream.
"""

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import av
import numpy as np
from numpy.typing import NDArray

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
SCAN_FROM_START_BYTES: Final = 256_000_000
"""A file without a complete index is read from its start, to number its frames, when that costs no more than this."""

REORDERED_PACKETS: Final = 32
"""More than any codec sends ahead of a frame that is shown before them."""

BACK_OFF_SECONDS: Final = (0.0, 5.0, 30.0, 180.0)
"""How far before a time a seek is aimed, one after the other, until it lands before that time."""


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


@dataclass(frozen=True)
class PacketIndex:
    """The frames of a time range in presentation order, as the packets announce them.

    Attributes:
        ticks: presentation times on the stream's clock, ascending, unique.
        key_ticks: those of key frames, ascending.
        key_seeks: where a seek must be aimed to land on each of them.
        first_number: number of the first of these frames within the stream, in presentation order.
        is_number_exact: False where `first_number` is an estimate from the average rate.
        is_regular: False where packets carry no usable presentation times; then `ticks` come from decoding.
        is_plain: no edit list hides packets, no key frame has leading pictures, no packet is marked as damaged.
        reaches_end: the stream ended before the range did.
        end_ticks: where the last frame ends.
        origin_ticks: the seek that the pass began with; None is the start of the file.
    """

    ticks: NDArray[np.int64]
    key_ticks: NDArray[np.int64]
    key_seeks: NDArray[np.int64]
    first_number: int
    is_number_exact: bool
    is_regular: bool
    is_plain: bool
    reaches_end: bool
    end_ticks: int
    origin_ticks: int | None

    def key_before(self, ticks: int, back: int = 0) -> int | None:
        """Return the place of the key frame at or before a time, or of an earlier one; None: the start of the range."""
        place = int(np.searchsorted(self.key_ticks, ticks, side="right")) - 1 - back
        return place if place >= 0 else None


@dataclass
class _Scan:
    """What a pass over packets collects."""

    presentation: list[int]
    keys: list[tuple[int, int]]
    first_decode_ticks: int | None = None
    end_ticks: int = 0
    is_regular: bool = True
    is_plain: bool = True
    reaches_end: bool = True


ScanFunction = Callable[[OpenVideo, int | None], _Scan]


def packets(video: OpenVideo) -> Iterator[Any]:
    """Yield the packets of the stream from where the container stands; damage to the container ends them."""
    try:
        for packet in video.container.demux(video.stream):
            if packet.size:
                yield packet
    except av.error.FFmpegError:
        return


def scan_packets(video: OpenVideo, stop_ticks: int | None) -> _Scan:
    """Read packets from where the container stands, without decoding, until all frames before `stop_ticks` came."""
    scan = _Scan([], [])
    newest_key: int | None = None
    later_packets = 0
    for packet in packets(video):
        # Decoding times would tell the end sooner, but Matroska has none and FFmpeg's guesses after a seek are wrong.
        clock = packet.pts if packet.pts is not None else packet.dts
        is_later = stop_ticks is not None and clock is not None and clock >= stop_ticks
        later_packets = later_packets + 1 if is_later else 0
        if later_packets > REORDERED_PACKETS:
            scan.reaches_end = False
            break
        if scan.first_decode_ticks is None:
            scan.first_decode_ticks = packet.dts
        if packet.is_discard or packet.is_corrupt:
            scan.is_plain = False
        if packet.is_discard:
            continue
        if packet.pts is None:
            scan.is_regular = False
            continue
        if packet.is_keyframe:
            newest_key = packet.pts
            scan.keys.append((packet.pts, seek_ticks(video, packet)))
        elif newest_key is not None and packet.pts < newest_key:
            scan.is_plain = False
        scan.presentation.append(packet.pts)
        scan.end_ticks = max(scan.end_ticks, packet.pts + (packet.duration or 0))
    if len(set(scan.presentation)) != len(scan.presentation):
        scan.is_regular = False
    return scan


def seek_ticks(video: OpenVideo, packet: Any) -> int:
    """Return where a seek must be aimed to land on a key frame.

    Matroska is searched by presentation time. The others are searched by decoding time: a presentation time would land
    after the key frame, at a later one or, in a transport stream, in the middle of its group.
    """
    if packet.dts is None or video.format_name == "matroska":
        return int(packet.pts)
    return int(packet.dts)


def scan_file(video: OpenVideo) -> tuple[float, float, int] | None:
    """Return the end of the stream, the end of all streams, both in seconds, and the number of frames.

    None when the file is larger than `count_bytes`.
    """
    if os.path.getsize(video.path) > video.limits.count_bytes:
        return None
    ticks: list[int] = []
    end_seconds = last_seconds = 0.0
    try:
        for packet in video.container.demux():
            if not packet.size:
                continue
            clock = packet.pts if packet.pts is not None else packet.dts or 0
            end = float((clock + (packet.duration or 0)) * packet.time_base)
            last_seconds = max(last_seconds, end)
            if packet.stream_index == video.stream.index and not packet.is_discard:
                ticks.append(clock)
                end_seconds = max(end_seconds, end)
    except av.error.FFmpegError as error:
        logger.debug("the file ends in damage: %s", error)
    start = video.seconds(0)
    if len(ticks) > 1 and end_seconds == float(max(ticks) * video.stream.time_base):
        # The last packet does not say how long it is shown.
        end_seconds += float((max(ticks) - min(ticks)) * video.stream.time_base) / (len(ticks) - 1)
    return end_seconds + start, last_seconds + start, len(ticks)


def last_end_seconds(video: OpenVideo) -> float | None:
    """Return where the last frame ends, from the packets after the last key frame; None where they cannot be read."""
    entries = video.stream.index_entries
    seek(video, entries[len(entries) - 1].timestamp)
    scan = scan_packets(video, None)
    return video.seconds(scan.end_ticks) if scan.presentation and scan.is_regular else None


def scan_frames(video: OpenVideo, stop_ticks: int | None) -> _Scan:
    """Read like `scan_packets`, but by decoding: for streams whose packets carry no usable presentation times."""
    scan = _Scan([], [], is_regular=False, is_plain=False)
    rate = video.frame_rate or 25.0
    period = max(round(1 / rate / video.tick_seconds), 1)
    for frame in decoded_frames(video):
        previous = scan.presentation[-1] if scan.presentation else None
        ticks = frame.pts if frame.pts is not None else frame.dts
        if ticks is None or (previous is not None and ticks <= previous):
            ticks = video.start_ticks if previous is None else previous + period
        if stop_ticks is not None and ticks > stop_ticks:
            scan.reaches_end = False
            break
        scan.presentation.append(ticks)
        scan.end_ticks = ticks + period
    return scan


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


def index_range(video: OpenVideo, start_seconds: float, stop_seconds: float) -> PacketIndex:
    """Return the frames shown in a time range, with those before it back to a key frame.

    The file is read from its start when the range lies there, or when its header has no complete index and numbering
    frames by reading costs little; otherwise from a key frame before the range.
    """
    start_ticks, stop_ticks = video.ticks(start_seconds), video.ticks(stop_seconds)
    from_start = start_seconds <= 0 or not (
        video.has_complete_index() or os.path.getsize(video.path) > SCAN_FROM_START_BYTES
    )
    scan, origin_ticks = scan_from(video, start_ticks, stop_ticks, scan_packets, from_start=from_start)
    if not scan.is_regular:
        delay = decoding_delay(video)
        scan, origin_ticks = scan_from(
            video, start_ticks + delay, stop_ticks + delay, scan_frames, from_start=from_start
        )
        scan.presentation = [ticks - delay for ticks in scan.presentation]
        scan.end_ticks -= delay
    number, is_exact = (0, True) if origin_ticks is None else first_frame_number(video, scan)
    ticks, keys = np.array(sorted(scan.presentation), np.int64), sorted(scan.keys)
    return PacketIndex(
        ticks=ticks,
        key_ticks=np.array([ticks for ticks, _ in keys], np.int64),
        key_seeks=np.array([ticks for _, ticks in keys], np.int64),
        first_number=number,
        is_number_exact=is_exact,
        is_regular=scan.is_regular,
        is_plain=scan.is_plain,
        reaches_end=scan.reaches_end,
        end_ticks=max(scan.end_ticks, int(ticks[-1]) if len(ticks) else video.start_ticks),
        origin_ticks=origin_ticks,
    )


def decoding_delay(video: OpenVideo) -> int:
    """Return how late the first frame is where packets tell decoding times only, as in AVI, in ticks."""
    rewind(video)
    first = next(decoded_frames(video), None)
    return 0 if first is None or first.pts is None else max(first.pts - video.start_ticks, 0)


def scan_from(
    video: OpenVideo, start_ticks: int, stop_ticks: int, scan: ScanFunction, *, from_start: bool
) -> tuple[_Scan, int | None]:
    """Return a scan that begins at or before `start_ticks`, and its origin; seeks earlier and earlier until it does."""
    for seconds in () if from_start else BACK_OFF_SECONDS:
        origin_ticks = start_ticks - round(seconds / video.tick_seconds)
        seek(video, origin_ticks)
        found = scan(video, stop_ticks)
        # Pictures that lead a key frame may lie before the start, but without the key frame before it they are lost.
        clean = found.keys[0][0] if found.keys else min(found.presentation, default=start_ticks + 1)
        if clean <= start_ticks:
            return found, origin_ticks
    rewind(video)
    return scan(video, stop_ticks), None


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


def first_frame_number(video: OpenVideo, scan: _Scan) -> tuple[int, bool]:
    """Return the number, in presentation order, of the first frame that a scan found, and whether it is exact.

    Every frame decoded before a key frame is shown before all frames decoded after it, leading pictures included, so
    its place in the header's index is its number.
    """
    entries = video.stream.index_entries
    if video.has_complete_index() and scan.first_decode_ticks is not None:
        place = entry_at(entries, scan.first_decode_ticks)
        hidden = sum(entries[number].is_discard for number in range(place)) if entries[0].is_discard else 0
        if place < len(entries) and entries[place].timestamp == scan.first_decode_ticks:
            return place - hidden, True
    first = min(scan.presentation, default=video.start_ticks)
    return round(video.seconds(first) * video.frame_rate), False


def entry_at(entries: Any, ticks: int) -> int:
    """Return the place of the first entry of the header's index at or after a decoding time."""
    low, high = 0, len(entries)
    while low < high:
        middle = (low + high) // 2
        if entries[middle].timestamp < ticks:
            low = middle + 1
        else:
            high = middle
    return low
