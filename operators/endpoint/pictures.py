"""Decoded pages and segments become records for a server: whole pictures as files, which it slices as it likes."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from operators.base import OperatorConfig
from operators.minicpmv.slicing import Size
from operators.picture_files import FileEncoding, join_files, picture_file
from operators.prepare import Pictures, Prepare, page_image, read_pictures
from operators.prompts import prompt_for
from schemas.generation import REQUEST
from schemas.ids import content_key, digest
from schemas.image import PIXELS, Grid


class EncodeConfig(OperatorConfig):
    """How pictures are sent to a server, and what it is asked."""

    encoding: Annotated[FileEncoding, Field(description="png loses nothing; jpeg is quicker, smaller for photos.")] = (
        "png"
    )
    jpeg_quality: Annotated[int, Field(ge=1, le=100, description="Higher keeps more and takes more bytes.")] = 90
    custom_prompt: Annotated[str | None, Field(description="Takes the place of the built-in prompts.")] = None
    decode_params: Annotated[
        str, Field(description="JSON of the model and how tokens are chosen; part of the content key.")
    ] = "{}"


class _Encode(Prepare[EncodeConfig]):
    """What pages and clips have in common: the columns of a request whose prompt stays text."""

    makes = (*PIXELS.names, *REQUEST.names)

    def columns(self, table: pa.Table, row: int, images: Sequence[NDArray[np.uint8]], seen: str) -> dict[str, Any]:
        """Return the columns of PIXELS and REQUEST of a row.

        Args:
            table: with the row's task and kind.
            row: which one.
            images: each (height, width, 3) uint8.
            seen: hash of their pixels.
        """
        prompt = prompt_for(table["task"][row].as_py(), table["kind"][row].as_py(), self.config.custom_prompt)
        quality = self.config.jpeg_quality
        settings = {"route": "model", "decode": self.config.decode_params, "encoding": self.config.encoding}
        if self.config.encoding == "jpeg":
            settings["quality"] = str(quality)
        return {
            "pixels": join_files(picture_file(image, self.config.encoding, quality) for image in images),
            "pixel_encoding": self.config.encoding,
            "slice_shapes": [Size(*image.shape[:2])._asdict() for image in images],
            "prompt_id": prompt.prompt_id,
            "prompt_sha256": prompt.sha256,
            "content_key": content_key(seen, digest(prompt.sha256), settings),
        }


class EncodePages(_Encode):
    """Keep each page that the server will read as one file."""

    def prepare(self, table: pa.Table, row: int) -> dict[str, Any]:
        """Return the columns of PIXELS and REQUEST of one page."""
        if table["route"][row].as_py() != "model":
            return {}
        image = page_image(table, row)
        whole = Pictures(image.reshape(-1), (Size(*image.shape[:2]),), (Grid(0, 0),))
        return self.columns(table, row, [image], whole.digest())


class EncodeClips(_Encode):
    """Keep each frame of a segment as one file."""

    def prepare(self, table: pa.Table, row: int) -> dict[str, Any]:
        """Return the columns of PIXELS and REQUEST of one segment."""
        if table["route"][row].as_py() != "model":
            return {}
        pictures = read_pictures(table, row)
        ends = np.cumsum([size.height_px * size.width_px * 3 for size in pictures.shapes])
        frames = np.split(pictures.pixels, ends[:-1])
        images = [frame.reshape(*size, 3) for frame, size in zip(frames, pictures.shapes, strict=True)]
        return self.columns(table, row, images, pictures.digest())
