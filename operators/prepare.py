"""Decoded pages and segments become records: final pixels, prompt ids, and the key of what the model will see."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from operators.base import C, Operator, OperatorConfig, with_columns
from operators.minicpmv.config import read_model_config
from operators.minicpmv.prompt import PromptBuilder, PromptSettings, image_tokens
from operators.minicpmv.slicing import Size, SliceConfig, slice_image
from operators.prompts import prompt_for
from schemas.errors import ContractError, PrepareError, RecordError, error_struct
from schemas.generation import DECODED, RECORD, REQUEST
from schemas.ids import canonical_json, content_key, digest
from schemas.image import PIXELS, Grid

ZSTD: Final = "zstd"
RAW: Final = "raw"


class PrepareConfig(OperatorConfig):
    """How records are prepared for one run."""

    model_folder: Annotated[
        str | None, Field(description="Folder of the model, for its tokenizer; null where no row goes to a model.")
    ]
    slicing: Annotated[
        SliceConfig, Field(description="Limits on slicing; for clips, those with which their frames were made.")
    ] = SliceConfig()
    use_image_id: Annotated[
        bool | None, Field(description="Number images in the prompt; null: pages as the model says, clips not.")
    ] = None
    thinking: Annotated[bool, Field(description="Ask for a thought before the answer.")] = False
    custom_prompt: Annotated[str | None, Field(description="Takes the place of the built-in prompts.")] = None
    max_prompt_tokens: Annotated[
        int | None, Field(gt=0, description="Longest prompt; a longer one is an error row. Null: the model's limit.")
    ] = None
    decode_params: Annotated[
        str, Field(description="JSON of the model, its revision and how tokens are chosen; part of the content key.")
    ] = "{}"


@dataclass(frozen=True)
class Pictures:
    """The pixels of one record.

    Attributes:
        shapes: of all slices.
        grids: of each image, or of each pack.
        pack_ids: temporal ids of the frames of each pack; None where images are no packs. The slices of a pack are the
            overviews of its frames, then their first slices, and so on.

    Shapes:
        pixels: (bytes,) uint8; each slice height x width x 3 RGB, one after the other.
    """

    pixels: NDArray[np.uint8]
    shapes: tuple[Size, ...]
    grids: tuple[Grid, ...]
    pack_ids: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.pack_ids is not None and len(self.pack_ids) != len(self.grids):
            raise PrepareError(f"temporal ids of {len(self.pack_ids)} packs, and grids of {len(self.grids)}")

    def frame_counts(self) -> list[int] | None:
        """Return the frames of each pack; None where images are no packs."""
        return None if self.pack_ids is None else [len(ids) for ids in self.pack_ids]

    def slice_packs(self) -> tuple[tuple[int, ...], ...] | None:
        """Return the temporal ids of the slices that are resampled together: those of one cell of a pack's frames."""
        if self.pack_ids is None:
            return None
        cells = [1 + grid.rows * grid.cols for grid in self.grids]
        return tuple(ids for ids, count in zip(self.pack_ids, cells, strict=True) for _ in range(count))

    def digest(self) -> str:
        """Return a hash of the pixels, how they are divided, and where in time they are."""
        layout = canonical_json([self.shapes, self.grids, *([] if self.pack_ids is None else [self.pack_ids])])
        return digest(hashlib.sha256(self.pixels.data).hexdigest(), layout)

    def columns(self) -> dict[str, Any]:
        """Return the columns of PIXELS, compressed without loss."""
        return {
            "pixels": pa.compress(self.pixels, codec=ZSTD, asbytes=True),
            "pixel_encoding": ZSTD,
            "slice_shapes": [size._asdict() for size in self.shapes],
            "slice_grids": [grid._asdict() for grid in self.grids],
        }


class Prepare(Operator[C]):
    """What pages and clips have in common, whoever reads them: null columns, and error rows.

    Attributes:
        makes: the columns that `prepare` fills; others stay as they come.
    """

    reads = DECODED
    adds = RECORD
    replaces = True
    makes: ClassVar[tuple[str, ...]]

    def process(self, table: pa.Table) -> pa.Table:
        """Return the records of `table`: same rows, same order."""
        prepared = [self._guarded(table, row) for row in range(table.num_rows)]
        columns = {name: [made.get(name) for made in prepared] for name in (*self.makes, "error")}
        table = with_columns(table, columns, RECORD)
        for field in RECORD:
            if field.name not in table.schema.names:
                table = table.append_column(field, pa.nulls(table.num_rows, field.type))
        return table.select(RECORD.names)

    def _guarded(self, table: pa.Table, row: int) -> dict[str, Any]:
        error = table["error"][row].as_py()
        if error is not None:
            return {"error": error}
        try:
            return self.prepare(table, row)
        except RecordError as failure:
            return {"error": error_struct(failure, type(self).__name__)}

    def prepare(self, table: pa.Table, row: int) -> dict[str, Any]:
        """Return the columns that `makes` names of one row, and `error` where it failed late; absent ones are null.

        Raises:
            RecordError: this row cannot be prepared.
        """
        raise ContractError(f"{type(self).__name__} does not say how a row is prepared")


class _PrepareForModel(Prepare[PrepareConfig]):
    """What pages and clips have in common that our own engine reads: the prompt in tokens."""

    def __init__(self, config: PrepareConfig) -> None:
        super().__init__(config)
        self._builder: PromptBuilder | None = None
        self._model_uses_image_id = True
        self._packs_frames = False
        if config.model_folder is not None:
            model = read_model_config(Path(config.model_folder))
            self._model_uses_image_id = model.use_image_id
            self._packs_frames = model.family.clip_rule == "packed"
            self._builder = PromptBuilder(model)

    def request(self, pictures: Pictures, task: str, kind: str) -> dict[str, Any]:
        """Return the columns of REQUEST for `pictures`.

        Raises:
            PromptTooLongError: the prompt fits neither the model nor the configured bound.
            ContractError: a row goes to a model and none was configured.
        """
        if self._builder is None:
            raise ContractError("a row is routed to a model, and PrepareConfig.model_folder is null")
        prompt = prompt_for(task, kind, self.config.custom_prompt)
        frame_counts = pictures.frame_counts()
        images = image_tokens(pictures.shapes, pictures.grids, self.config.slicing, frame_counts=frame_counts)
        ids = self._builder.build(prompt.text, images, self._settings(kind))
        settings = {"route": "model", "decode": self.config.decode_params}
        return {
            "prompt_ids": ids,
            "image_tokens": sum(sum(image.counts) for image in images),
            "prompt_id": prompt.prompt_id,
            "prompt_sha256": prompt.sha256,
            "content_key": content_key(pictures.digest(), digest(np.array(ids, np.int32).tobytes()), settings),
        }

    def _settings(self, kind: str) -> PromptSettings:
        is_clip = kind == "video"
        numbered = self.config.use_image_id
        return PromptSettings(
            kind="video" if is_clip else "image",
            use_image_id=(not is_clip and self._model_uses_image_id) if numbered is None else numbered,
            thinking=self.config.thinking,
            max_prompt_tokens=self.config.max_prompt_tokens,
        )


class PrepareImages(_PrepareForModel):
    """Slice each page that a model will read and build its prompt; keep whole the pages that the CPU engine reads.

    A page that cannot be asked of the model, its prompt being too long, is kept whole beside its error: the CPU engine
    may still read it.
    """

    makes = (*PIXELS.names, *REQUEST.names)

    def prepare(self, table: pa.Table, row: int) -> dict[str, Any]:
        """Return the columns of PIXELS and REQUEST of one page."""
        route = table["route"][row].as_py()
        if route not in ("model", "cpu"):
            return {}
        image = page_image(table, row)
        whole = Pictures(image.reshape(-1), (Size(*image.shape[:2]),), (Grid(0, 0),))
        if route == "cpu":
            # The engine's blocks lie in the points of the page, so equal pixels of another page size are not equal.
            page = [table[name][row].as_py() for name in ("task", "page_width_pt", "page_height_pt")]
            settings = {"route": "cpu", "decode": self.config.decode_params, "page": canonical_json(page)}
            key = content_key(whole.digest(), digest(), settings)
            return whole.columns() | {"content_key": key}
        try:
            return self._asked(image, table["task"][row].as_py(), table["kind"][row].as_py())
        except RecordError as failure:
            return whole.columns() | {"error": error_struct(failure, type(self).__name__)}

    def _asked(self, image: NDArray[np.uint8], task: str, kind: str) -> dict[str, Any]:
        sliced = slice_image(image, self.config.slicing)
        pictures = Pictures(
            np.concatenate([piece.reshape(-1) for piece in sliced.slices]),
            tuple(Size(*piece.shape[:2]) for piece in sliced.slices),
            (sliced.grid,),
        )
        request = self.request(pictures, task, kind)
        return pictures.columns() | request


class PrepareClips(_PrepareForModel):
    """Build the prompt of each segment, whose frames already are final slices."""

    makes = tuple(REQUEST.names)

    def prepare(self, table: pa.Table, row: int) -> dict[str, Any]:
        """Return the columns of REQUEST of one segment."""
        if table["route"][row].as_py() != "model":
            return {}
        pictures = read_pictures(table, row, packed=self._packs_frames)
        return self.request(pictures, table["task"][row].as_py(), table["kind"][row].as_py())


def page_image(table: pa.Table, row: int) -> NDArray[np.uint8]:
    """Return the rendered page of a row, (height, width, 3) uint8, without copying it.

    Raises:
        PrepareError: there is no image, or it is not as large as its columns say.
    """
    value = table["image"][row]
    height_px, width_px = table["image_height_px"][row].as_py(), table["image_width_px"][row].as_py()
    if not value.is_valid or height_px is None or width_px is None:
        raise PrepareError("the page is routed to a model or the CPU engine and has no image")
    flat = np.frombuffer(value.as_buffer(), np.uint8)
    if flat.size != height_px * width_px * 3:
        raise PrepareError(f"the image has {flat.size} bytes, its columns say {height_px} x {width_px} x 3")
    return flat.reshape(height_px, width_px, 3)


def read_pictures(table: pa.Table, row: int, *, packed: bool = False) -> Pictures:
    """Return the pixels of a row with the columns of PIXELS; raw ones are not copied.

    Args:
        table: also with `temporal_ids` when `packed`.
        row: which one.
        packed: whether the model sees clips in packs of frames; a page has no packs.

    Raises:
        PrepareError: a column is null, or the pixels or the temporal ids are not as many as the shapes and grids say.
    """
    missing = [name for name in PIXELS.names if not table[name][row].is_valid]
    if missing:
        raise PrepareError(f"a row for the model has no {', '.join(missing)}")
    shapes = tuple(Size(shape["height_px"], shape["width_px"]) for shape in table["slice_shapes"][row].as_py())
    grids = tuple(Grid(grid["rows"], grid["cols"]) for grid in table["slice_grids"][row].as_py())
    data = table["pixels"][row].as_buffer()
    pixels = decode_pixels(data, table["pixel_encoding"][row].as_py(), shapes)
    ids = table["temporal_ids"][row].as_py() if packed else None
    return Pictures(pixels, shapes, grids, None if ids is None else tuple(map(tuple, ids)))


def decode_pixels(data: pa.Buffer, encoding: str, shapes: Sequence[Size]) -> NDArray[np.uint8]:
    """Return the pixels of all slices, (bytes,) uint8.

    Raises:
        PrepareError: the encoding is unknown, or the pixels are not as many as the shapes say.
    """
    wanted = sum(size.height_px * size.width_px * 3 for size in shapes)
    if encoding == ZSTD:
        try:
            data = pa.decompress(data, decompressed_size=wanted, codec=ZSTD)
        except OSError as error:
            raise PrepareError(f"the pixels cannot be decompressed to {wanted} bytes: {error}") from error
    elif encoding != RAW:
        raise PrepareError(f"pixel encoding {encoding!r} is unknown")
    pixels = np.frombuffer(data, np.uint8)
    if pixels.size != wanted:
        raise PrepareError(f"{pixels.size} bytes of pixels, the shapes say {wanted}")
    return pixels
