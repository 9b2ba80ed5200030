"""The text layer of a PDF page: is it to be trusted, and what does it say?

The rules, in this order; the first that applies decides, and its words go into the row:

1. No characters: there is no text layer.
2. More than a tenth of the characters stand for nothing known (U+FFFD, private use, control), or the bytes were
   swapped: garbled.
3. Most of the text is painted by nothing, or lies under an image as large as the page: it is somebody else's OCR.
   It is taken when its words look like words (`text_quality.plausible_share`), there are enough of them, and they are
   in a script that can be judged; otherwise the page is read again.
4. Longer words of visible Latin, Greek or Cyrillic text do not look like words: a font lies about its characters.
5. An image as large as the page with little text on it: a scan with a stamp, or a slide; its text may be in the image.
6. Raster images show more text than the layer holds: a notice or a table pasted as a picture would be lost.
7. Everything else is taken.
"""

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pymupdf

from operators.decode.image_text import MIN_IMAGE_SHARE, image_text_chars
from operators.decode.text_flow import lines_to_markdown
from operators.decode.text_layout import layout_blocks, plain_blocks
from operators.decode.text_lines import PageText, frame_to_display, read_page_text
from operators.decode.text_quality import alphabetic_share, is_byte_swapped, plausible_share, unmapped_share
from operators.parse.markdown import blocks_to_markdown
from schemas.errors import DecodeError

MAX_UNMAPPED_SHARE: Final = 0.10
MIN_HIDDEN_PLAUSIBLE: Final = 0.90
"""Hidden text of a well-read book has 0.97 to 1.00, of a badly read handwriting 0.38 (measured)."""
MIN_HIDDEN_CHARS: Final = 100
MIN_VISIBLE_PLAUSIBLE: Final = 0.35
"""Of words with four letters and more: a page of little but printer's marks has 0.50, all others 0.69 and more
(measured, 209 born-digital pages)."""
PAGE_SIZED_SHARE: Final = 0.85
FEW_CHARS: Final = 200
MIN_IMAGE_CHARS: Final = 300
"""Estimated: 700 to 2000 on pages of text pasted as pictures, 0 on most photographs and charts, 150 to 560 on maps and
charts with a legend (measured)."""
_GRID: Final = 64


@dataclass(frozen=True)
class TextLayer:
    """What the embedded text of a page is worth, and its content when it is worth something.

    Attributes:
        has_text: there is at least one character.
        chars: characters that are no white space.
        trustworthy: the text may stand for the page.
        reason: why, in a few words; it is stored in the row.
        markdown: the page as Markdown; null unless trustworthy.
        blocks: values of the `BLOCK` struct in reading order; null unless trustworthy and asked for.
        image_share: part of the page that images cover, from 0 to 1.
        is_scan: the page is an image as large as itself, with no or little visible text.
    """

    has_text: bool
    chars: int
    trustworthy: bool
    reason: str
    markdown: str | None
    blocks: list[dict[str, Any]] | None
    image_share: float
    is_scan: bool


def read_text_layer(page: pymupdf.Page, *, layout: bool) -> TextLayer:
    """Judge the embedded text of `page` and, when it is trustworthy, return it as Markdown.

    Args:
        page: an open page; it is left as it was.
        layout: True labels and boxes the blocks with PyMuPDF's layout model (about 0.3 to 0.7 s a page); False takes
            the order of the file, mended where it is not a reading order (a few milliseconds).
    """
    page_text = read_page_text(page, words=False)
    judged = _judge(page, page_text)
    if not judged.trustworthy:
        return judged
    if not layout:
        return replace(judged, markdown=lines_to_markdown(page_text.lines))
    page_text = read_page_text(page, words=True)
    try:
        blocks = layout_blocks(page, page_text)
    except DecodeError as error:
        blocks = plain_blocks(page, page_text)
        judged = replace(judged, reason=f"{judged.reason}; plain blocks ({error})"[:300])
    return replace(judged, markdown=blocks_to_markdown(blocks), blocks=blocks)


def _judge(page: pymupdf.Page, page_text: PageText) -> TextLayer:
    images = page.get_image_info() if page.get_images() else []
    image_share = _image_share(images, page_text)
    is_page_sized = image_share >= PAGE_SIZED_SHARE
    is_hidden = 2 * page_text.hidden_count > page_text.char_count
    if is_page_sized and not is_hidden and page_text.char_count:
        is_hidden = _is_covered(page)
    shown = 0 if is_hidden else page_text.char_count
    trustworthy, reason = _verdict(page_text, image_share, is_hidden=is_hidden)
    if trustworthy and not is_hidden and image_share >= MIN_IMAGE_SHARE:
        known = [frame_to_display(line.box, page_text, page) for line in page_text.lines]
        image_chars = image_text_chars(page, images, [box for box in known if box is not None])
        if image_chars >= max(MIN_IMAGE_CHARS, page_text.char_count):
            trustworthy = False
            reason = f"images show about {image_chars} characters, the text layer holds {page_text.char_count}"
    return TextLayer(
        has_text=page_text.char_count > 0,
        chars=page_text.char_count,
        trustworthy=trustworthy,
        reason=reason,
        markdown=None,
        blocks=None,
        image_share=image_share,
        is_scan=is_page_sized and shown < FEW_CHARS,
    )


def _verdict(page_text: PageText, image_share: float, *, is_hidden: bool) -> tuple[bool, str]:
    """Return whether the text is trustworthy, and why."""
    text, chars = page_text.text, page_text.char_count
    if not chars:
        return False, "no text layer"
    unmapped = unmapped_share(text)
    if unmapped > MAX_UNMAPPED_SHARE:
        return False, f"garbled: {unmapped:.0%} unmapped characters"
    if is_byte_swapped(text):
        return False, "garbled: bytes swapped"
    if is_hidden:
        return _hidden_verdict(text, chars, image_share)
    is_judgeable = alphabetic_share(text) > 0.9
    if is_judgeable and chars >= FEW_CHARS:
        plausible = plausible_share(text, min_letters=4)
        if plausible < MIN_VISIBLE_PLAUSIBLE:
            return False, f"garbled: {plausible:.0%} plausible words"
    if image_share >= PAGE_SIZED_SHARE and chars < FEW_CHARS:
        return False, f"image covers {image_share:.0%} of the page, {chars} characters"
    note = f", {unmapped:.0%} unmapped" if unmapped >= 0.01 else ""
    return True, f"born digital, {chars} characters{note}"


def _hidden_verdict(text: str, chars: int, image_share: float) -> tuple[bool, str]:
    where = "hidden text over a scan" if image_share >= 0.5 else "hidden text"
    if chars < MIN_HIDDEN_CHARS:
        return False, f"{where}: {chars} characters"
    if alphabetic_share(text) < 0.9:
        return False, f"{where}, in a script that cannot be judged"
    plausible = plausible_share(text)
    return plausible >= MIN_HIDDEN_PLAUSIBLE, f"{where}, {plausible:.0%} plausible words, {chars} characters"


def _image_share(images: list[dict[str, Any]], page_text: PageText) -> float:
    """Return the part of the page that images cover, overlaps counted once, on a grid of 64 x 64 cells."""
    if not images:
        return 0.0
    covered = np.zeros((_GRID, _GRID), np.bool_)
    scale_x = _GRID / max(page_text.raw_width_pt, 1.0)
    scale_y = _GRID / max(page_text.raw_height_pt, 1.0)
    for info in images:
        left, top, right, bottom = info["bbox"]
        start_row, stop_row = _cells(top * scale_y, bottom * scale_y)
        start_column, stop_column = _cells(left * scale_x, right * scale_x)
        covered[start_row:stop_row, start_column:stop_column] = True
    return float(covered.mean())


def _cells(start: float, stop: float) -> tuple[int, int]:
    """Return the grid cells whose middle lies between `start` and `stop`."""
    return max(0, min(_GRID, round(start))), max(0, min(_GRID, round(stop)))


def _is_covered(page: pymupdf.Page) -> bool:
    """Return True when most of the text was painted before an image as large as the page."""
    area = max(page.rect.width * page.rect.height, 1.0)
    before = after = 0.0
    seen_image = False
    for kind, box in reversed(page.get_bboxlog()):
        size = max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
        if kind == "fill-image":
            seen_image = seen_image or size >= PAGE_SIZED_SHARE * area
        elif kind in ("fill-text", "stroke-text"):
            before, after = (before + size, after) if seen_image else (before, after + size)
    return before > after
