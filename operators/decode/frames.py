"""Frames as RGB arrays, by their place in presentation order, with decord or with PyAV.

Runs in the decoder's process. Both give the same pixels where `decord_can_read` says yes: swscale's default conversion
to RGB with the matrix that the stream names (BT.601 where it names none), upright after the display matrix.
"""

import logging
import os
from collections.abc import Iterator
from typing import Any, Final, Protocol

import av
import decord
import numpy as np
from numpy.typing import NDArray

from operators.decode.demux import OpenVideo, decoded_frames, packets, rewind, seek
from operators.decode.packet_index import PacketIndex
from schemas.errors import DecodeError

logger = logging.getLogger(__name__)

DECORD_CODECS: Final = ("h264", "mpeg4", "vp9")
DECORD_FORMATS: Final = ("mov", "matroska", "avi")
DECORD_MAX_FRAME_PIXELS: Final = 1920 * 1088
"""decord queues RGB frames: 30 frames of 8K took 2.3 GB, where PyAV took 0.4."""

DECORD_MAX_FILE_BYTES: Final = 256_000_000
"""decord reads every packet of a file when it opens it, so each unit of a long video would pay for the whole."""

SEEK_WORTH_FRAMES: Final = 4
"""Skipping at least so many frames by a seek is cheaper than decoding them."""

EARLIER_KEY_FRAMES: Final = (0, 1, 3, 10**9)
"""Key frames, counted back from the nearest, that are tried when a frame does not come after a seek; the last is where
the pass over the packets began."""


class DecordFailedError(Exception):
    """Decord cannot go on with a file. What it gave of the same segment may be damaged: it conceals without a word."""


class FrameReader(Protocol):
    """Gives frames of one video."""

    name: str

    def read(self, position: int) -> NDArray[np.uint8]:
        """Return a frame by its position in the index, cheapest in ascending order.

        Shapes:
            result: (height, width, 3) uint8 RGB, upright.

        Raises:
            DecodeError: the frame is damaged or missing; others may still come.
            DecordFailedError: nothing more comes from this reader.
        """


def decord_can_read(video: OpenVideo, index: PacketIndex) -> bool:
    """Return whether decord gives this stream exactly, by frame number and by pixel.

    It does not for HEVC, AV1, leading pictures and edit lists (wrong frames at random access), odd sizes (chroma of
    the last column), other pixel formats, rotated streams other than by its own rule, several video streams (it cannot
    be told which).
    """
    context = video.stream.codec_context
    return (
        context.name in DECORD_CODECS
        and video.format_name in DECORD_FORMATS
        and context.pix_fmt == "yuv420p"
        and context.width % 2 == 0
        and context.height % 2 == 0
        and context.width * context.height <= DECORD_MAX_FRAME_PIXELS
        and index.is_regular
        and index.is_plain
        and index.is_number_exact
        and video.start_ticks == 0
        and video.note is None
        and os.path.getsize(video.path) <= DECORD_MAX_FILE_BYTES
    )


class DecordReader:
    """Frames of a stream that decord reads exactly."""

    name = "decord"

    def __init__(self, video: OpenVideo, index: PacketIndex) -> None:
        """Open the file.

        Raises:
            DecordFailedError: decord cannot, or it sees other frames than the index.
        """
        decord.logging.set_level(decord.logging.QUIET)
        self._index = index
        try:
            self._reader = decord.VideoReader(video.path, ctx=decord.cpu(0), num_threads=1)
            numbers = range(index.first_number, index.first_number + len(index.ticks))
            found = self._reader.get_frame_timestamp(numbers)[:, 0]
        except Exception as error:
            raise DecordFailedError(str(error)[:300]) from error
        wanted = index.ticks * video.tick_seconds
        # decord keeps times as float32.
        if not np.allclose(found, wanted, rtol=1e-6, atol=video.tick_seconds / 2):
            raise DecordFailedError("decord sees other presentation times than the packets have")

    def read(self, position: int) -> NDArray[np.uint8]:
        """Return a frame; see `FrameReader`."""
        try:
            frame: NDArray[np.uint8] = self._reader[self._index.first_number + position].asnumpy()
        except Exception as error:
            raise DecordFailedError(str(error)[:300]) from error
        return frame


class PyavReader:
    """Frames of any stream, in one pass that jumps to a later key frame where that saves decoding."""

    name = "pyav"

    def __init__(self, video: OpenVideo, index: PacketIndex) -> None:
        self._video = video
        self._index = index
        self._size: tuple[int, int] | None = None
        self._frames: Iterator[tuple[int, Any, bool]] | None = None
        self._current: tuple[int, Any, bool] | None = None
        self._previous: tuple[int, Any, bool] | None = None
        self._is_fresh = False

    def read(self, position: int) -> NDArray[np.uint8]:
        """Return a frame; see `FrameReader`."""
        wanted = int(self._index.ticks[position]) if self._index.is_regular else position
        found = None
        for back in EARLIER_KEY_FRAMES:
            self._go_near(wanted, back)
            found = self._advance(wanted)
            # After a seek a frame may be missing or torn because the seek landed late.
            if (found is not None and not found[2]) or not self._is_fresh:
                break
        self._is_fresh = False
        if found is None and self._current is not None and self._previous is not None and not self._current[2]:
            # A packet that shows nothing: the frame before it stays on display.
            found = self._previous
        if found is None or found[2]:
            raise DecodeError(f"the frame at {self._seconds(position):.3f} s cannot be decoded", stage="sample")
        return self._to_rgb(found[1])

    def _seconds(self, position: int) -> float:
        return self._video.seconds(int(self._index.ticks[position]))

    def _go_near(self, wanted: int, back: int) -> None:
        """Place the decoder so that `wanted` is still to come, or is the current frame."""
        key = self._index.key_before(wanted, back) if self._index.is_regular else None
        here = self._current[0] if self._current else None
        if self._frames is None or (here is not None and here > wanted) or back:
            self._restart(key)
        elif here is not None and key is not None and here < self._index.key_ticks[key]:
            skipped = np.diff(np.searchsorted(self._index.ticks, [here, self._index.key_ticks[key]]))[0]
            if skipped > SEEK_WORTH_FRAMES:
                self._restart(key)

    def _restart(self, key: int | None) -> None:
        self._is_fresh = False
        if key is not None and self._index.key_ticks[key] > self._index.ticks[0]:
            seek(self._video, int(self._index.key_seeks[key]))
            self._is_fresh = True
        elif self._index.origin_ticks is not None:
            seek(self._video, self._index.origin_ticks)
        else:
            rewind(self._video)
        self._video.stream.codec_context.flush_buffers()
        self._current = self._previous = None
        self._frames = self._decode()

    def _advance(self, wanted: int) -> tuple[int, Any, bool] | None:
        """Decode up to `wanted`; None when the decoder went past it or ended."""
        while self._current is None or self._current[0] < wanted:
            following = next(self._frames, None) if self._frames else None
            if following is None:
                self._frames = None
                return None
            self._previous, self._current = self._current, following
        return self._current if self._current[0] == wanted else None

    def _decode(self) -> Iterator[tuple[int, Any, bool]]:
        """Yield (ticks or ordinal, frame, whether damage before it may show in it)."""
        if not self._index.is_regular:
            for ordinal, frame in enumerate(decoded_frames(self._video)):
                yield ordinal, frame, bool(frame.is_corrupt)
            return
        damaged = False
        for frames, failed in self._steps():
            damaged |= failed
            for frame in frames:
                damaged = bool(frame.is_corrupt) or (damaged and not frame.key_frame)
                yield frame.pts, frame, damaged

    def _steps(self) -> Iterator[tuple[list[Any], bool]]:
        """Yield what the decoder gives for each packet, and whether the packet failed."""
        for packet in packets(self._video):
            try:
                yield packet.decode(), packet.is_corrupt
            except av.error.MemoryError:
                # A limit of ours, not damage of the file.
                raise
            except av.error.FFmpegError:
                yield [], True
        try:
            yield self._video.stream.codec_context.decode(None), False
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError:
            yield [], True

    def _to_rgb(self, frame: Any) -> NDArray[np.uint8]:
        # A stream may change its size on the way; the first one holds, so that a clip has one.
        self._size = self._size or (frame.width, frame.height)
        width_px, height_px = self._size
        rgb = frame.to_ndarray(format="rgb24", width=width_px, height=height_px, threads=1)
        quarter_turns = round(frame.rotation / 90) % 4
        return np.rot90(rgb, quarter_turns) if quarter_turns else rgb


def choose_reader(video: OpenVideo, index: PacketIndex, decoder: str) -> FrameReader:
    """Return decord where it is exact and can open the file, PyAV otherwise.

    Args:
        video: the opened file.
        index: its packets.
        decoder: `auto`, or `pyav` for PyAV in any case.
    """
    if decoder == "auto" and decord_can_read(video, index):
        try:
            return DecordReader(video, index)
        except DecordFailedError as error:
            logger.debug("decord was given up: %s", error)
    return PyavReader(video, index)
