"""Small files to start from: made by code, the shipped samples, and the wider corpus where it is there."""

import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pymupdf
from PIL import Image, ImageDraw

from operators.decode.sniff import IMAGE_SUFFIXES, PDF_SUFFIXES, VIDEO_SUFFIXES

SAMPLES = Path(__file__).resolve().parents[2] / "jobs" / "samples"
MOST_BYTES = 130_000
WORDS = "The quick brown fox jumps over the lazy dog near the quiet river bank. "
PICTURE_PX = 96


def make_seeds(folder: Path) -> list[Path]:
    """Write one small file of every kind and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = list(make_pictures(folder))
    return [*pictures, *make_documents(folder, pictures[0]), *make_videos(folder)]


def found_seeds(corpus: Path | None = None) -> list[Path]:
    """Return the small files that are shipped, and those of the corpus that are not broken already."""
    folders = [SAMPLES / "documents", SAMPLES / "videos"]
    folders += [corpus / name for name in ("pdf", "video")] if corpus else []
    known = PDF_SUFFIXES | IMAGE_SUFFIXES | VIDEO_SUFFIXES
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in known)
    return [path for path in files if 0 < path.stat().st_size <= MOST_BYTES]


def corpus_folder() -> Path | None:
    """Return the wider corpus, or None where it is not set."""
    folder = os.environ.get("PAGEREEL_CORPUS")
    return Path(folder) if folder else None


def picture(mode: str = "RGB") -> Image.Image:
    """Return a small picture with some words."""
    image = Image.new("RGB", (PICTURE_PX, PICTURE_PX), "white")
    drawing = ImageDraw.Draw(image)
    drawing.text((4, 4), "words", fill="black")
    drawing.rectangle((10, 40, 60, 80), fill="teal")
    return image.convert(mode)


def make_pictures(folder: Path) -> Iterator[Path]:
    """Write pictures in the formats and modes that are read."""
    kinds = {
        "rgb.png": ("RGB", {}),
        "palette.png": ("P", {}),
        "grey-alpha.png": ("LA", {}),
        "plain.jpg": ("RGB", {"quality": 80}),
        "progressive.jpg": ("L", {"progressive": True}),
        "cmyk.jpg": ("CMYK", {}),
        "lossy.webp": ("RGB", {}),
        "lossless.webp": ("RGBA", {"lossless": True}),
        "lzw.tif": ("RGB", {"compression": "tiff_lzw"}),
        "fax.tif": ("1", {"compression": "group4"}),
        "deflate.tif": ("I;16", {"compression": "tiff_adobe_deflate"}),
        "plain.bmp": ("RGB", {}),
        "single.gif": ("P", {}),
    }
    for name, (mode, options) in kinds.items():
        image = picture("L").convert("I;16") if mode == "I;16" else picture(mode)
        image.save(folder / name, **options)
        yield folder / name
    frames = [picture(mode) for mode in ("RGB", "L", "1")]
    frames[0].save(folder / "frames.tif", save_all=True, append_images=frames[1:])
    yield folder / "frames.tif"


def make_documents(folder: Path, image: Path) -> Iterator[Path]:
    """Write PDFs of several makes: plain and compressed, with pictures, forms, annotations and passwords."""
    options = {
        "plain.pdf": {"deflate": False},
        "object-streams.pdf": {"deflate": True, "use_objstms": 1, "garbage": 3},
        "encrypted.pdf": {"encryption": pymupdf.PDF_ENCRYPT_AES_256, "owner_pw": "owner", "user_pw": ""},
        "linked.pdf": {"deflate": True},
    }
    for name, save_options in options.items():
        with pymupdf.open() as document:
            for number in range(3):
                page = document.new_page(width=300, height=300)
                page.insert_textbox((20, 20, 280, 200), f"Page {number}. {WORDS * 3}", fontsize=9)
                page.insert_image((200, 220, 280, 290), filename=str(image))
            page = document[0]
            page.add_freetext_annot((20, 220, 180, 260), "A note in the margin.")
            page.insert_link({"kind": pymupdf.LINK_URI, "from": page.rect, "uri": "https://example.invalid/"})
            field = pymupdf.Widget()
            field.rect, field.field_type, field.field_name = page.rect, pymupdf.PDF_WIDGET_TYPE_TEXT, "name"
            field.field_value = "filled in"
            page.add_widget(field)
            document.set_toc([[1, "A chapter", 1], [2, "A section", 2]])
            document.save(folder / name, **save_options)
        yield folder / name
    with pymupdf.open() as document:
        page = document.new_page(width=150, height=150)
        page.insert_image(page.rect, filename=str(image))
        document.save(folder / "scanned.pdf")
    yield folder / "scanned.pdf"


def make_videos(folder: Path) -> Iterator[Path]:
    """Write videos of one second in several containers and codecs."""
    kinds = {
        "a.mp4": ("libx264", {"g": "5", "bf": "2"}),
        "b.mp4": ("mpeg4", {}),
        "c.mkv": ("libx264", {"g": "5"}),
        "d.avi": ("mpeg4", {}),
        "e.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
        "f.ts": ("mpeg2video", {}),
        "g.gif": ("gif", {}),
    }
    for name, (codec, options) in kinds.items():
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=10, options=options)
            stream.width = stream.height = 64
            stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            for number in range(10):
                pixels = np.full((64, 64, 3), 20 * number, np.uint8)
                pixels[number * 4 : number * 4 + 16, 8:40] = (200, 30, 90)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        yield folder / name
