"""The corpora of the chaos harness: 20 to 70 small records each, made here and from the samples."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pymupdf

SAMPLES = Path(__file__).parents[2] / "jobs" / "samples"
SENTENCE = "Pack my box with five dozen liquor jugs, and count them twice before the cart leaves. "


@dataclass(frozen=True)
class Corpus:
    """Files, and the command that reads them.

    Attributes:
        name: of the corpus and of its folder.
        task: subcommand of `pagereel`.
        options: what the command says besides inputs, output and where it runs.
        write: puts the files into a folder.
    """

    name: str
    task: str
    options: tuple[str, ...]
    write: Callable[[Path], None]


def write_text_pdf(path: Path, pages: int) -> None:
    """Write a PDF whose pages carry their text."""
    document = pymupdf.open()
    for number in range(1, pages + 1):
        words = f"{path.stem}, page {number}. " + SENTENCE * (3 + number % 9)
        document.new_page().insert_textbox((50, 50, 540, 780), words)
    document.save(path)


def write_scan_pdf(path: Path, pages: int) -> None:
    """Write a PDF whose pages are pictures of text, which an engine has to read."""
    document = pymupdf.open()
    for number in range(1, pages + 1):
        drawn = pymupdf.open().new_page(width=200, height=100)
        drawn.insert_textbox((10, 10, 190, 90), f"{path.stem} {number}, count them twice.", fontsize=14)
        picture = drawn.get_pixmap(dpi=100).tobytes("png")
        document.new_page(width=200, height=100).insert_image((0, 0, 200, 100), stream=picture)
    document.save(path)


def write_video(path: Path, seconds: int) -> None:
    """Write a small video, ten frames a second, whose picture changes all the time."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        noise = np.random.default_rng(len(path.stem)).integers(0, 255, (64, 96, 3), np.uint8)
        for index in range(seconds * 10):
            pixels = np.roll(noise, 3 * index, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def write_broken_files(folder: Path) -> None:
    """Write files that cannot be read: each is an error row, whatever dies."""
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7\n" + b"no pages here " * 20)
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.mp4").write_bytes((SAMPLES / "videos" / "notice-board.mp4").read_bytes()[:4000])


def _write_layers(folder: Path) -> None:
    for index, pages in enumerate((24, 9, 15, 10)):
        write_text_pdf(folder / f"report-{index}.pdf", pages)
    write_scan_pdf(folder / "scanned.pdf", 1)
    write_broken_files(folder)


def _write_mixed(folder: Path) -> None:
    for index, pages in enumerate((12, 10)):
        write_text_pdf(folder / f"letter-{index}.pdf", pages)
    write_scan_pdf(folder / "scanned.pdf", 1)
    write_video(folder / "clip.mp4", 6)
    write_broken_files(folder)


def _write_captions(folder: Path) -> None:
    write_video(folder / "walk.mp4", 26)
    write_video(folder / "rotate.mp4", 13)
    shutil.copy(SAMPLES / "documents" / "receipt.png", folder)
    write_broken_files(folder)


def _write_ignored_layers(folder: Path) -> None:
    for index in range(4):
        write_text_pdf(folder / f"box-{index}.pdf", 6)
    write_broken_files(folder)


SHORT_ANSWERS = ("--model", "demo", "--device", "cpu", "--max-new-tokens", "16", "--attempts", "1")
"""The demo model's words mean nothing; fewer of them leave more time for faults."""

CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus("layers", "ocr", ("--engine", "cpu"), _write_layers),
        Corpus("mixed", "parse", (*SHORT_ANSWERS, "--max-slices", "2", "--segment-seconds", "2"), _write_mixed),
        Corpus("captions", "caption", (*SHORT_ANSWERS, "--segment-seconds", "2"), _write_captions),
        Corpus(
            "ignored-layers",
            "ocr",
            (*SHORT_ANSWERS, "--max-slices", "1", "--max-pixels", "200000", "--text-layer", "ignore"),
            _write_ignored_layers,
        ),
    )
}
