"""PDF pages with MuPDF: facts, text layer, pixels. Runs in a `DecoderBox`."""

import re
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pymupdf

from operators.decode.child import memory_usage
from operators.decode.pages import (
    POINTS_PER_INCH,
    Opened,
    PageOptions,
    PageStep,
    TextVerdict,
    capped_scale,
    failed_step,
    is_blank,
    missing_page,
)
from schemas.errors import DecodeError, RecordError

if TYPE_CHECKING:
    from operators.decode.text_layer import TextLayer

MEMORY_WORDS = re.compile(r"alloc\w* .*fail|out of memory|bad_alloc|cannot allocate", re.IGNORECASE | re.DOTALL)
SIZE_WORDS = re.compile(r"overly large|too large", re.IGNORECASE)
CIPHER_WORDS = re.compile(r"encrypt|password|crypt filter", re.IGNORECASE)
TITLE_CHARS = 500
SHRINK_RSS_BYTES = 500_000_000
"""Above this, MuPDF's store of decoded images and fonts is emptied after a page (`store_size` answers None in
PyMuPDF 2.0); below it, fonts and images that the next page shares are worth keeping."""


class TextReader(Protocol):
    """The shape of `read_text_layer`, which is imported late."""

    def __call__(self, page: pymupdf.Page, *, layout: bool) -> "TextLayer":
        """Return what the embedded text of `page` is worth."""


pymupdf.TOOLS.mupdf_display_errors(False)
pymupdf.TOOLS.mupdf_display_warnings(False)


def probe(path: str, password: str | None, max_pages: int) -> Iterator[dict[str, Any]]:
    """Yield the facts of a PDF: values of `SOURCE_FACTS` columns.

    Raises:
        DecodeError: `encrypted`, `not_pdf`, `empty`, `damaged`, `no_pages`, or `too_many_pages`.
    """
    with open_pdf(path, password) as document:
        page_count = counted_pages(document)
        if page_count > max_pages:
            raise DecodeError(f"{page_count} pages, the policy allows {max_pages}", code="too_many_pages")
        metadata = document.metadata or {}
        yield {
            "page_count": page_count,
            "is_encrypted": bool(metadata.get("encryption")),
            "title": clean_text(metadata.get("title")),
            "pdf_producer": clean_text(metadata.get("producer")),
        }


def decode_pages(
    path: str, password: str | None, page_numbers: Sequence[int], options: PageOptions
) -> Iterator[Opened | PageStep]:
    """Yield an `Opened`, then the steps of each page, in the order of `page_numbers`.

    A page that fails ends with a step that says so; the others still come.

    Raises:
        DecodeError: as `probe`.
    """
    # Its imports take a second, which a probe need not pay and a page should not.
    from operators.decode.text_layer import read_text_layer

    with open_pdf(path, password) as document:
        page_count = counted_pages(document)
        yield Opened(page_count)
        for page_number in page_numbers:
            try:
                if page_number > page_count:
                    raise missing_page(page_number, page_count)
                yield from page_steps(document, page_number, options, read_text_layer)
            except RecordError as error:
                yield failed_step(page_number, error)
            if memory_usage()["rss_bytes"] > SHRINK_RSS_BYTES:
                pymupdf.TOOLS.store_shrink(100)


def open_pdf(path: str, password: str | None) -> pymupdf.Document:
    """Return the open, decrypted document.

    Raises:
        DecodeError: `empty`, `not_pdf`, `encrypted` or `damaged`.
    """
    try:
        document = pymupdf.open(path, filetype="pdf")
        if not document.is_pdf:
            raise DecodeError(f"opened as {(document.metadata or {}).get('format')}, wanted a PDF", code="not_pdf")
        if document.needs_pass and not document.authenticate(password or ""):
            found = "another password than the one given" if password else "a password"
            raise DecodeError(f"the document wants {found}", code="encrypted")
    except RecordError:
        raise
    except pymupdf.EmptyFileError as error:
        raise DecodeError("the file is empty", code="empty") from error
    except Exception as error:
        failure = translated(error, code="damaged", stage="open")
        if failure.code == "damaged" and CIPHER_WORDS.search(str(failure)):
            raise DecodeError(str(failure), code="encrypted") from error
        raise failure from error
    return document


def counted_pages(document: pymupdf.Document) -> int:
    """Return the number of pages, at least one.

    Raises:
        DecodeError: `no_pages`, or `damaged` when the page tree cannot be counted.
    """
    try:
        page_count = int(document.page_count)
    except Exception as error:
        raise translated(error, code="damaged", stage="open") from error
    if page_count < 1:
        repaired = ", after repair" if document.is_repaired else ""
        raise DecodeError(f"the document has no pages{repaired}", code="no_pages")
    return page_count


def page_steps(
    document: pymupdf.Document, page_number: int, options: PageOptions, read_text_layer: TextReader
) -> Iterator[PageStep]:
    """Yield the steps of one page: its size, its text layer, and its pixels if it has to be read.

    Raises:
        DecodeError: the page cannot be loaded or rendered.
    """
    try:
        page = document.load_page(page_number - 1)
        width_pt, height_pt = page.rect.width, page.rect.height
    except Exception as error:
        raise translated(error, code="damaged", stage="open") from error
    facts = {"page_count": document.page_count, "page_width_pt": width_pt, "page_height_pt": height_pt}
    yield PageStep(page_number, facts)

    verdict, text_facts = judge_text(page, options.layout, read_text_layer)
    skip = options.render == "never" or (options.render == "untrusted" and verdict.trustworthy)
    yield PageStep(page_number, text_facts, verdict, is_last=skip)
    if skip:
        return

    start = time.perf_counter()
    scale = capped_scale(width_pt, height_pt, options.dpi / POINTS_PER_INCH, options)
    image = render(page, scale)
    blank = options.find_blank and not verdict.has_text and is_blank(image)
    yield PageStep(
        page_number,
        {
            "image_height_px": image.shape[0],
            "image_width_px": image.shape[1],
            "dpi": scale * POINTS_PER_INCH,
            "render_ms": (time.perf_counter() - start) * 1000,
        },
        image=None if blank else image,
        is_blank=blank,
        is_last=True,
    )


def judge_text(page: pymupdf.Page, layout: bool, read_text_layer: TextReader) -> tuple[TextVerdict, dict[str, Any]]:
    """Return the verdict on the page's text layer, and its `PAGE_FACTS` columns; unreadable text is no text."""
    try:
        found = read_text_layer(page, layout=layout)
    except RecordError:
        raise
    except Exception as error:
        failure = translated(error, code="damaged", stage="open")
        if failure.code == "memory_limit":
            raise failure from error
        return TextVerdict(False, False, f"the text layer cannot be read: {failure}"[:200], is_scan=False), {}
    verdict = TextVerdict(found.has_text, found.trustworthy, found.reason, found.is_scan)
    return verdict, {
        "has_text_layer": found.has_text,
        "text_layer_chars": found.chars,
        "text_layer_text": found.markdown if found.trustworthy else None,
        "text_layer_blocks": found.blocks if found.trustworthy else None,
    }


def render(page: pymupdf.Page, scale: float) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the page as (height, width, 3) uint8 RGB, with its annotations and filled form fields.

    Args:
        page: the page.
        scale: pixels a point.

    Raises:
        DecodeError: `render`, `too_large` or `memory_limit`.
    """
    try:
        pixmap = page.get_pixmap(matrix=pymupdf.Matrix(scale, scale), colorspace=pymupdf.csRGB, alpha=False)
        return np.asarray(_Samples(pixmap))
    except Exception as error:
        raise translated(error, code="render", stage="render") from error


class _Samples:
    """The samples of a pixmap to NumPy, which keeps this object, and so the pixmap, while it uses them.

    A copy would cost 2 ms a page, and PyMuPDF's own view of the samples outlives them.
    """

    def __init__(self, pixmap: pymupdf.Pixmap) -> None:
        self.pixmap = pixmap
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (pixmap.height, pixmap.width, 3),
            "strides": (pixmap.stride, 3, 1),
            "data": (pixmap.samples_ptr, True),
        }


def translated(error: Exception, code: str, stage: str) -> DecodeError:
    """Return the `DecodeError` for MuPDF's exception: by its words for memory and size, `code` otherwise."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    words = f"{error} {root}" if root is not error else str(error)
    if isinstance(root, MemoryError) or MEMORY_WORDS.search(words):
        code = "memory_limit"
    elif SIZE_WORDS.search(words):
        code = "too_large"
    return DecodeError(str(root) or type(root).__name__, code=code, stage=stage, exception_type=type(root).__name__)


def clean_text(text: str | None) -> str | None:
    """Return metadata as text that UTF-8 can hold, without control characters; None when nothing is left."""
    kept = "".join(c for c in (text or "")[:TITLE_CHARS] if c.isprintable())
    return kept.encode("utf-8", "replace").decode().strip() or None
