"""DECODED rows of generated pages and clips, for tests of prepare and generate."""

import io
import random

import numpy as np
import pyarrow as pa
import pymupdf
from PIL import Image

from operators.minicpmv.slicing import slice_image
from schemas.generation import DECODED

WORDS = [
    "invoice",
    "due",
    "at once",
    "total amount",
    "1,204.50 EUR",
    "Straße",
    "naïve",
    "表格",
    "E = mc2",
    "§ 7 of the act",
]


def page_pictures(count, seed=0):
    """Pages that PyMuPDF renders from text, boxes and lines, in varied sizes: (height, width, 3) uint8."""
    generator = random.Random(seed)
    pictures = []
    for number in range(count):
        width_pt, height_pt = generator.choice([(595, 842), (842, 595), (612, 792), (300, 300), (260, 700), (900, 240)])
        document = pymupdf.open()
        page = document.new_page(width=width_pt, height=height_pt)
        text = " ".join(generator.choices(WORDS, k=generator.randint(5, 300)))
        page.insert_textbox(
            pymupdf.Rect(20, 20, width_pt - 20, height_pt - 20), text, fontsize=generator.choice((7, 11, 18))
        )
        for _ in range(number % 4):
            left, top = generator.uniform(0, width_pt - 90), generator.uniform(0, height_pt - 90)
            colour = (generator.random(), generator.random(), generator.random())
            page.draw_rect(pymupdf.Rect(left, top, left + 80, top + 60), color=colour, fill=colour)
        zoom = generator.choice((0.6, 1.0, 1.5, 2.0))
        data = page.get_pixmap(matrix=pymupdf.Matrix(zoom, zoom)).tobytes("png")
        pictures.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    return pictures


def clip_frames(seed):
    """Frames of a generated clip: a moving box on a gradient, (height, width, 3) uint8, the number varies."""
    generator = np.random.default_rng(seed)
    height_px, width_px = int(generator.integers(120, 500)), int(generator.integers(160, 640))
    rows, cols = np.mgrid[0:height_px, 0:width_px]
    base = np.stack([rows % 256, cols % 256, (rows + cols) % 256], axis=-1).astype(np.uint8)
    frames = []
    for index in range(int(generator.integers(1, 6))):
        frame = base.copy()
        left = 10 + 17 * index
        frame[20:80, left : left + 50] = generator.integers(0, 256, 3, dtype=np.uint8)
        frames.append(frame)
    return frames


def page_row(picture, **changes):
    """A DECODED row of a page on the model route."""
    return {
        "unit_id": "u",
        "record_key": "k",
        "source_uri": "file:///a.pdf",
        "doc_id": "d",
        "kind": "pdf",
        "task": "ocr",
        "page_number": 1,
        "image": np.ascontiguousarray(picture).tobytes(),
        "image_height_px": picture.shape[0],
        "image_width_px": picture.shape[1],
        "route": "model",
    } | changes


def clip_row(frames, slicing, **changes):
    """A DECODED row of a segment: its frames are slices already."""
    sliced = [slice_image(frame, slicing) for frame in frames]
    pieces = [piece for one in sliced for piece in one.slices]
    return {
        "unit_id": "u",
        "record_key": "k",
        "source_uri": "file:///a.mp4",
        "doc_id": "v",
        "kind": "video",
        "task": "caption",
        "segment_index": 0,
        "pixels": b"".join(np.ascontiguousarray(piece).tobytes() for piece in pieces),
        "pixel_encoding": "raw",
        "slice_shapes": [{"height_px": piece.shape[0], "width_px": piece.shape[1]} for piece in pieces],
        "slice_grids": [one.grid._asdict() for one in sliced],
        "route": "model",
    } | changes


def table_of(*rows):
    """A DECODED table."""
    return pa.Table.from_pylist(list(rows), schema=DECODED)
