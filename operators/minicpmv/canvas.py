"""Where the tokens of a prompt stand: text in a line, the crops of a picture on a canvas.

A crop is the run of placeholders of one overview or one slice; its grid counts visual tokens. An overview and the
slices after it are a picture. Slices lie side by side on the canvas of their picture, and the overview is stretched
over all of them; without slices it is the canvas itself.

A position has three channels: T, H and W. Text counts on by one in all of them. All tokens of a picture share T, the
position that the text before them has reached, and H and W add the row and the column of their place on the canvas.
The text goes on beyond the longer side of the canvas.

Letters: `T` tokens of the prompt, `K` tokens of one picture.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.minicpmv.config import SpecialTokens
from schemas.errors import GenerationError

Positions = NDArray[np.int64]


class Extent(NamedTuple):
    """Rows and columns in visual tokens: the size of a crop or a canvas, or a place on it."""

    rows: int
    cols: int


@dataclass(frozen=True)
class Crop:
    """The placeholders of one overview or one slice: tokens `start` to `stop` of a prompt."""

    start: int
    stop: int
    extent: Extent


@dataclass(frozen=True)
class Picture:
    """An overview and its slices, row by row.

    Attributes:
        stop: one past the markers that follow the last crop.
    """

    overview: Crop
    slices: tuple[Crop, ...]
    stop: int

    @property
    def start(self) -> int:
        """Return the place of the marker before the overview."""
        return self.overview.start - 1

    @property
    def cell(self) -> Extent:
        """Return the part of the canvas that one slice takes; a picture without slices is one part."""
        return self.slices[0].extent if self.slices else self.overview.extent

    @property
    def cols(self) -> int:
        """Return the number of slices in a row, which a newline ends; rows of unequal length count as one row."""
        if not self.slices:
            return 1
        count = len(self.slices)
        ends = (
            number
            for number, (crop, following) in enumerate(itertools.pairwise(self.slices), start=1)
            # The marker that closes a slice and the one that opens the next are two tokens.
            if following.start - crop.stop > 2
        )
        cols = next(ends, count)
        return cols if count % cols == 0 else count

    @property
    def canvas(self) -> Extent:
        """Return the size of the canvas."""
        rows = max(len(self.slices), 1) // self.cols
        return Extent(rows * self.cell.rows, self.cols * self.cell.cols)


def canvas_positions(
    prompt_ids: Sequence[int], crop_grids: Sequence[tuple[int, int]], tokens: SpecialTokens
) -> tuple[Positions, int]:
    """Return the positions of a prompt's tokens, and the position of the token that comes next.

    Args:
        prompt_ids: the prompt, with one placeholder for each visual token.
        crop_grids: rows and columns of each crop in visual tokens, in the order of the prompt.
        tokens: the placeholders and the markers around them.

    Shapes:
        positions: (3, T) int64; T, H and W.

    Raises:
        GenerationError: the placeholders of the prompt are not the crops of `crop_grids`, each between its markers.

    Source:
        transformers `models/minicpmv4_7/modular_minicpmv4_7.py`, `get_rope_index`.
    """
    ids = np.asarray(prompt_ids, np.int64)
    positions = np.empty((3, len(ids)), np.int64)
    done = reached = 0
    for picture in find_pictures(ids, find_crops(ids, crop_grids, tokens), tokens):
        origin = reached + picture.start - done
        positions[:, done : picture.start] = np.arange(reached, origin)
        # Only a picture that opens the prompt has nothing before it.
        positions[:, picture.start : picture.stop] = np.maximum(origin + places(picture), 0)
        done, reached = picture.stop, origin + max(picture.canvas) + 1
    positions[:, done:] = np.arange(reached, reached + len(ids) - done)
    return positions, reached + len(ids) - done


def find_crops(ids: Positions, crop_grids: Sequence[tuple[int, int]], tokens: SpecialTokens) -> list[Crop]:
    """Return the crops of a prompt in order.

    Raises:
        GenerationError: they are not those of `crop_grids`, or one is not between its markers.
    """
    is_pad = np.isin(ids, (tokens.image_pad, tokens.video_pad))
    edges = np.flatnonzero(np.diff(is_pad, prepend=False, append=False)).reshape(-1, 2).tolist()
    sizes = [stop - start for start, stop in edges]
    if sizes != [rows * cols for rows, cols in crop_grids]:
        raise GenerationError(f"runs of {sizes} placeholders do not fit crops of {list(crop_grids)} visual tokens")
    crops = [Crop(start, stop, Extent(*grid)) for (start, stop), grid in zip(edges, crop_grids, strict=True)]
    pairs = {(tokens.image_start, tokens.image_end), (tokens.slice_start, tokens.slice_end)}
    for crop in crops:
        if crop.start == 0 or crop.stop == len(ids) or (ids[crop.start - 1], ids[crop.stop]) not in pairs:
            raise GenerationError(f"the placeholders {crop.start} to {crop.stop} are not between two markers")
    return crops


def find_pictures(ids: Positions, crops: Sequence[Crop], tokens: SpecialTokens) -> list[Picture]:
    """Return the pictures that `crops` make up.

    Raises:
        GenerationError: there are slices before the first overview.
    """
    heads = [number for number, crop in enumerate(crops) if ids[crop.start - 1] == tokens.image_start]
    if crops and heads[:1] != [0]:
        raise GenerationError("a slice stands before the first overview")
    return [
        Picture(crops[head], tuple(crops[head + 1 : following]), closing_stop(ids, crops[following - 1].stop, tokens))
        for head, following in itertools.pairwise([*heads, len(crops)])
    ]


def closing_stop(ids: Positions, start: int, tokens: SpecialTokens) -> int:
    """Return where the markers and newlines that follow a picture end: at other text, or where a picture opens."""
    closing = (tokens.image_end, tokens.slice_end, tokens.newline)
    stop = start
    while stop < len(ids) and ids[stop] in closing:
        stop += 1
    return stop


def places(picture: Picture) -> Positions:
    """Return T, H and W of a picture's tokens, counted from the origin of its canvas.

    A marker stands at a corner of its crop: that of the overview just outside the canvas on both sides, that of a
    slice on its first and its last token. The newline after a row of slices stands to the right of the row's last
    line. What follows the picture stands on the origin.

    Shapes:
        result: (3, K) int64.
    """
    canvas, cell, cols, first = picture.canvas, picture.cell, picture.cols, picture.start
    result = np.zeros((3, picture.stop - first), np.int64)
    plane = result[1:]
    overview = picture.overview
    plane[:, 0] = -1
    plane[:, overview.start - first : overview.stop - first] = coordinates(overview.extent, canvas)
    plane[:, overview.stop - first] = canvas
    for number, crop in enumerate(picture.slices):
        row, col = divmod(number, cols)
        top, left = row * cell.rows, col * cell.cols
        start, stop = crop.start - first, crop.stop - first
        plane[:, start - 1] = top, left
        plane[:, start:stop] = coordinates(crop.extent, crop.extent) + np.array([[top], [left]])
        plane[:, stop] = top + crop.extent.rows - 1, left + crop.extent.cols - 1
        if number + 1 < len(picture.slices):
            newline = slice(stop + 1, picture.slices[number + 1].start - first - 1)
            plane[0, newline], plane[1, newline] = top + cell.rows - 1, cols * cell.cols
    return result


def coordinates(extent: Extent, canvas: Extent) -> Positions:
    """Return row and column on `canvas` of each token of a crop that covers it, (2, rows * cols), row by row."""
    rows, cols = spread(extent.rows, canvas.rows), spread(extent.cols, canvas.cols)
    return np.stack([rows.repeat(extent.cols), np.tile(cols, extent.rows)])


def spread(count: int, length: int) -> Positions:
    """Return the nearest of `length` places to each of `count` points at equal distances from the first to the last.

    Points that should lie halfway between two places follow the rounding of float32 steps, counted from the nearer
    end, as torch's `linspace` does: exact arithmetic puts some of them one place off (23 points on 128 places).
    """
    if count == 1:
        return np.zeros(1, np.int64)
    last = np.float32(length - 1)
    step = last / np.float32(count - 1)
    number = np.arange(count, dtype=np.float32)
    from_end = last - (np.float32(count - 1) - number) * step
    points = np.where(np.arange(count) < count // 2, number * step, from_end)
    return np.rint(points).astype(np.int64)
