"""Fixtures of the operator tests: videos whose frames carry their number, and a folder of each member."""

import shutil
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from operators.minicpmv.tiny import write_tiny_model
from tests.operators.members import MEMBERS

BITS_PER_SIDE = 4


def numbered_frame(number: int, height_px: int, width_px: int) -> np.ndarray:
    """Return a picture of a 4 x 4 checker that spells `number` in binary, bright for 1; survives any codec."""
    image = np.zeros((height_px, width_px, 3), np.uint8)
    for bit in range(BITS_PER_SIDE**2):
        row, col = divmod(bit, BITS_PER_SIDE)
        rows = slice(row * height_px // BITS_PER_SIDE, (row + 1) * height_px // BITS_PER_SIDE)
        cols = slice(col * width_px // BITS_PER_SIDE, (col + 1) * width_px // BITS_PER_SIDE)
        image[rows, cols] = (200, 180, 220) if number >> bit & 1 else (40, 60, 20)
    return image


def number_of(image: np.ndarray) -> int:
    """Return the number that a picture made by `numbered_frame` spells, at whatever size it is now."""
    height_px, width_px = image.shape[:2]
    number = 0
    for bit in range(BITS_PER_SIDE**2):
        row, col = divmod(bit, BITS_PER_SIDE)
        top, left = (2 * row + 1) * height_px // (2 * BITS_PER_SIDE), (2 * col + 1) * width_px // (2 * BITS_PER_SIDE)
        number |= int(image[top - 1 : top + 2, left - 1 : left + 2].mean() > 110) << bit
    return number


def make_video(
    path: Path,
    *,
    ticks: Sequence[int],
    time_base: Fraction = Fraction(1, 1000),
    rate: Fraction | int = 25,
    size: tuple[int, int] = (96, 128),
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: int = 0,
) -> Path:
    """Write a video with one numbered frame at each of `ticks`, a tick being `time_base` seconds."""
    height_px, width_px = size
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width_px, height_px, pixel_format
        stream.codec_context.time_base = time_base
        stream.time_base = time_base
        if rotation:
            stream.set_display_rotation(rotation)
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, height_px, width_px), format="rgb24")
            frame.pts, frame.time_base = tick, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(name="make_video")
def make_video_fixture() -> Callable[..., Path]:
    """Return `make_video`."""
    return make_video


@pytest.fixture(name="number_of")
def number_of_fixture() -> Callable[[np.ndarray], int]:
    """Return `number_of`."""
    return number_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of each member, in one file of weights; not to be changed."""
    folders = {}
    for name in MEMBERS:
        folders[name] = tmp_path_factory.mktemp(name)
        write_tiny_model(folders[name], name, shards=1)
    return folders


@pytest.fixture
def copy_of(made, tmp_path):
    """Return a function that copies a member's folder, to be changed."""
    return lambda name: Path(shutil.copytree(made[name], tmp_path / name))
