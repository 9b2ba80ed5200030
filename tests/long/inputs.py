"""Tiny inputs by the thousand: pages with text layers, pictures of pages, clips of a few frames; no two alike."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pymupdf
from PIL import Image

PAGES_A_FILE = 50
PAGE_PT = 200
PICTURE_PX = 64
CLIP_PX = 64
CLIP_FRAMES = 8
CLIP_RATE = 8


def make_documents(folder: Path, page_count: int) -> None:
    """Write PDFs with `page_count` pages in all, each with a text layer of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, page_count, PAGES_A_FILE):
        with pymupdf.open() as document:
            for number in range(first, min(first + PAGES_A_FILE, page_count)):
                page = document.new_page(width=PAGE_PT, height=PAGE_PT)
                text = f"Page {number} of many says that the quick\nbrown fox {number} jumps over the lazy dog."
                page.insert_text((10, 30), text, fontsize=8)
            document.save(folder / f"pages-{first:06d}.pdf")


def make_pictures(folder: Path, count: int, page_count: int) -> None:
    """Write pictures without a text layer, which the model reads, between the documents in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(0)
    for number in range(count):
        pixels = chance.integers(0, 256, (PICTURE_PX, PICTURE_PX, 3), np.uint8)
        place = number * page_count // count
        Image.fromarray(pixels).save(folder / f"pages-{place:06d}-picture-{number:06d}.png")


def make_clips(folder: Path, count: int) -> None:
    """Write videos of one second each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        make_clip(folder / f"clip-{number:06d}.mp4", number)


def make_clip(path: Path, number: int) -> None:
    """Write a video whose frames differ from those of any other number."""
    chance = np.random.default_rng(number)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=CLIP_RATE)
        stream.width = stream.height = CLIP_PX
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, CLIP_RATE)
        for _ in range(CLIP_FRAMES):
            small = chance.integers(0, 256, (4, 4, 3), np.uint8)
            pixels = np.kron(small, np.ones((CLIP_PX // 4, CLIP_PX // 4, 1), np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
