"""The frames of a time range in presentation order, found by reading packets and not by decoding them.

Runs in the decoder's process. Ticks are units of the stream's own clock.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from operators.decode.demux import REORDERED_PACKETS, OpenVideo, decoded_frames, packets, rewind, seek

SCAN_FROM_START_BYTES: Final = 256_000_000
"""A file without a complete index is read from its start, to number its frames, when that costs no more than this."""


BACK_OFF_SECONDS: Final = (0.0, 5.0, 30.0, 180.0)
"""How far before a time a seek is aimed, one after the other, until it lands before that time."""


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
    first_key_place: int = 0
    first_key_decode_ticks: int | None = None
    end_ticks: int = 0
    is_regular: bool = True
    is_plain: bool = True
    reaches_end: bool = True


ScanFunction = Callable[[OpenVideo, int | None], _Scan]


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
        scan.keys = [(ticks - delay, aim) for ticks, aim in scan.keys]
        scan.end_ticks -= delay
    number, is_exact = (0, True)
    if origin_ticks is not None:
        number, is_exact = first_key_number(video, scan)
    if origin_ticks is not None and scan.is_regular:
        # What comes before the first key frame, or leads it, cannot be decoded from here.
        scan.presentation = [ticks for ticks in scan.presentation if ticks >= scan.keys[0][0]]
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
        if found.keys and found.keys[0][0] <= start_ticks:
            return found, origin_ticks
    rewind(video)
    return scan(video, stop_ticks), None


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
        if packet.is_discard or packet.is_corrupt:
            scan.is_plain = False
        if packet.is_discard:
            continue
        if packet.pts is None:
            scan.is_regular = False
            continue
        if packet.is_keyframe:
            if newest_key is None:
                scan.first_key_place, scan.first_key_decode_ticks = len(scan.presentation), packet.dts
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
        if frame.key_frame:
            scan.keys.append((ticks, ticks))
        scan.presentation.append(ticks)
        scan.end_ticks = ticks + period
    return scan


def first_key_number(video: OpenVideo, scan: _Scan) -> tuple[int, bool]:
    """Return the number, in presentation order, of the first key frame of a scan, and whether it is exact.

    Every frame decoded before a key frame is shown before it, and so are the pictures that lead it: its place in the
    header's index and their count give its number.
    """
    key_ticks, decode_ticks = scan.keys[0][0], scan.first_key_decode_ticks
    entries = video.stream.index_entries
    if video.has_complete_index() and decode_ticks is not None:
        place = entry_at(entries, decode_ticks)
        hidden = sum(entries[number].is_discard for number in range(place)) if entries[0].is_discard else 0
        leading = sum(ticks < key_ticks for ticks in scan.presentation[scan.first_key_place :])
        if place < len(entries) and entries[place].timestamp == decode_ticks:
            return place - hidden + leading, True
    return round(video.seconds(key_ticks) * video.frame_rate), False


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


def scan_file(video: OpenVideo) -> tuple[float, float, int] | None:
    """Return the end of the stream, the end of all streams, both in seconds, and the number of frames.

    None when the file is larger than `count_bytes`.
    """
    if os.path.getsize(video.path) > video.limits.count_bytes:
        return None
    ticks: list[int] = []
    end_seconds = last_seconds = 0.0
    for packet in packets(video, every_stream=True):
        clock = packet.pts if packet.pts is not None else packet.dts or 0
        end = float((clock + (packet.duration or 0)) * packet.time_base)
        last_seconds = max(last_seconds, end)
        if packet.stream_index == video.stream.index and not packet.is_discard:
            ticks.append(clock)
            end_seconds = max(end_seconds, end)
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
