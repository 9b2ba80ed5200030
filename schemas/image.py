"""Pixels on their way to the model."""

from typing import Final, NamedTuple

import pyarrow as pa


class Grid(NamedTuple):
    """Rows and columns of slices, overview excluded; `Grid(0, 0)` is an image that is not sliced."""

    rows: int
    cols: int


SLICE_SHAPE: Final = pa.struct([pa.field("height_px", pa.int32()), pa.field("width_px", pa.int32())])
SLICE_GRID: Final = pa.struct([pa.field("rows", pa.int32()), pa.field("cols", pa.int32())])

PIXELS: Final = pa.schema(
    [
        pa.field("pixels", pa.large_binary()),
        pa.field("pixel_encoding", pa.string()),
        pa.field("slice_shapes", pa.list_(SLICE_SHAPE)),
        pa.field("slice_grids", pa.list_(SLICE_GRID)),
    ]
)
"""Final uint8 slices of one record, one after the other: each is height x width x 3 RGB, rows first.

`pixel_encoding` is `raw` or `zstd` (of the whole), or for a server `png` or `jpeg`: then each picture is a file, whole
and after its length, and `slice_grids` is null, as the server slices. `slice_grids` has one entry an image (a page has
one, a clip one a frame or composite); an image contributes one overview, then rows * cols slices in row-major order. A
clip in packs has one entry a pack, whose frames share the grid: it contributes the overviews of all its frames, then
the first slices of all, and so on. On the `cpu` route there is one shape, the whole page, and its grid is 0 x 0."""
