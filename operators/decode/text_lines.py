"""Lines of a page's embedded text, as PyMuPDF finds them, in an upright frame.

Three coordinate systems meet here, all in points with the origin top-left:

raw
    what PyMuPDF's text functions give: the page before its /Rotate.
display
    the page after /Rotate, as `page.rect` has it; boxes that leave this package are in it.
frame
    the raw page turned by quarters until most of its text runs left to right. Reading order and the layout model work
    in it: a table printed sideways is read as it was written.
"""

import itertools
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any, Final

import pymupdf

# Without TEXT_CID_FOR_UNKNOWN_UNICODE: a glyph without a known character must come out as U+FFFD, not as an invented
# letter that looks like text.
TEXT_FLAGS: Final = pymupdf.TEXT_PRESERVE_LIGATURES | pymupdf.TEXT_PRESERVE_WHITESPACE | pymupdf.TEXT_MEDIABOX_CLIP
_PAINTED: Final = 16 | 32
"""`char_flags` of text that is filled or stroked; render mode 3 sets neither."""
_SYMBOL_FONT: Final = dict(
    zip(
        range(0xF020, 0xF100),
        " !∀#∃%&∋()∗+,−./0123456789:;<=>?≅ΑΒΧΔΕΦΓΗΙϑΚΛΜΝΟΠΘΡΣΤΥςΩΞΨΖ[∴]⊥_‾αβχδεφγηιϕκλμνοπθρστυϖωξψζ{|}∼\uf07f"
        + "".join(map(chr, range(0xF080, 0xF0A0)))
        + "€ϒ′≤⁄∞ƒ♣♦♥♠↔←↑→↓°±″≥×∝∂•÷≠≡≈…⏐⎯↵ℵℑℜ℘⊗⊕∅∩∪⊃⊇⊄⊂⊆∈∉"
        + "∠∇®©™∏√⋅¬∧∨⇔⇐⇑⇒⇓◊〈®©™∑⎛⎜⎝⎡⎢⎣⎧⎨⎩⎪\uf0f0〉∫⌠⎮⌡⎞⎟⎠⎤⎥⎦⎫⎬⎭\uf0ff",
        strict=True,
    )
)
"""What private-use characters of the Symbol font mean (Adobe's Symbol encoding): office programs write them so."""
_DINGBAT_BULLETS: Final = str.maketrans(dict.fromkeys("\uf06c\uf06e\uf071\uf076\uf09f\uf0a7\uf0a8\uf0b7\uf0d8", "•"))
_LIGATURES: Final = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"})
_UNUSABLE: Final = re.compile("[\x00-\x08\x0e-\x1b\x7f\ud800-\udfff]")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Word:
    """A run of characters without a space; `box` is in the frame."""

    text: str
    box: Box


@dataclass(frozen=True)
class Line:
    """One line of text; `box` is in the frame. `words` are filled only where they were asked for."""

    text: str
    box: Box
    block_index: int
    size_pt: float
    is_bold: bool
    is_vertical: bool
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class PageText:
    """The embedded text of a page.

    Attributes:
        lines: in the order of the content stream, without empty ones.
        turn: clockwise turn from raw to frame: 0, 90, 180 or 270.
        raw_width_pt: width of the page before /Rotate.
        raw_height_pt: height of the page before /Rotate.
        text: everything, in content order, for judging.
        char_count: characters that are no white space.
        hidden_count: of these, painted by nothing (render mode 3, or fully transparent).
        area_share: part of the page that line boxes cover, overlaps counted twice.
    """

    lines: list[Line]
    turn: int
    raw_width_pt: float
    raw_height_pt: float
    text: str
    char_count: int
    hidden_count: int
    area_share: float
    frame_size_pt: tuple[float, float] = field(default=(0.0, 0.0))


def read_page_text(page: pymupdf.Page, *, words: bool) -> PageText:
    """Return the lines of `page`; with `words`, also the boxes of their words (a slower extraction)."""
    textpage = page.get_textpage(flags=TEXT_FLAGS)
    extracted = textpage.extractRAWDICT() if words else textpage.extractDICT()
    _mend_symbols(extracted)
    spans = [span for block in extracted["blocks"] for line in block.get("lines", ()) for span in line["spans"]]
    if not words and any(_is_right_to_left(char) for span in spans for char in span["text"]):
        # Numbers inside right-to-left text come out back to front; only character boxes can tell.
        extracted, words = textpage.extractRAWDICT(), True
        _mend_symbols(extracted)
    width, height = _raw_size(page)
    turn = _turn(extracted["blocks"])
    lines: list[Line] = []
    char_count = hidden_count = 0
    area = 0.0
    for block_index, block in enumerate(extracted["blocks"]):
        for raw_line in block.get("lines", ()):
            line = _line(raw_line, block_index, turn, width, height)
            if not line.text:
                continue
            lines.append(line)
            shown, hidden = _count(raw_line["spans"])
            char_count, hidden_count = char_count + shown + hidden, hidden_count + hidden
            area += (line.box[2] - line.box[0]) * (line.box[3] - line.box[1])
    frame_size = (width, height) if turn in (0, 180) else (height, width)
    return PageText(
        lines=lines,
        turn=turn,
        raw_width_pt=width,
        raw_height_pt=height,
        text="\n".join(line.text for line in lines),
        char_count=char_count,
        hidden_count=hidden_count,
        area_share=min(1.0, area / max(width * height, 1.0)),
        frame_size_pt=frame_size,
    )


def turn_box(box: Box, turn: int, width: float, height: float) -> Box:
    """Return `box` of a page of `width` x `height` after a clockwise turn of that page."""
    left, top, right, bottom = box
    if turn == 90:
        return height - bottom, left, height - top, right
    if turn == 180:
        return width - right, height - bottom, width - left, height - top
    if turn == 270:
        return top, width - right, bottom, width - left
    return box


def runs_right_to_left(lines: list[Line]) -> bool:
    """Return True when most of the text is written from right to left, or in columns from right to left."""
    total = sum(len(line.text) for line in lines)
    mirrored = sum(
        len(line.text) if line.is_vertical else sum(map(_is_right_to_left, line.text))
        for line in lines
        if line.is_vertical or not line.text.isascii()
    )
    return 2 * mirrored > total


def frame_to_display(box: Box, page_text: PageText, page: pymupdf.Page) -> list[float] | None:
    """Return a frame box on the displayed page, cut at the page's edges; None where nothing of it is on the page."""
    raw = turn_box(box, (360 - page_text.turn) % 360, *page_text.frame_size_pt)
    shown = (pymupdf.Rect(raw) * page.rotation_matrix).normalize()
    width, height = page.rect.width, page.rect.height
    left, top = max(shown.x0, 0.0), max(shown.y0, 0.0)
    right, bottom = min(shown.x1, width), min(shown.y1, height)
    return [left, top, right, bottom] if left < right and top < bottom else None


def _mend_symbols(extracted: dict[str, Any]) -> None:
    """Replace the private-use characters of symbol fonts by what they show."""
    for block in extracted["blocks"]:
        for line in block.get("lines", ()):
            for span in line["spans"]:
                table = _SYMBOL_FONT if "symbol" in span["font"].lower() else _DINGBAT_BULLETS
                if "text" in span:
                    span["text"] = span["text"].translate(table)
                for char in span.get("chars", ()):
                    char["c"] = char["c"].translate(table)


def _raw_size(page: pymupdf.Page) -> tuple[float, float]:
    if page.rotation % 180:
        return page.rect.height, page.rect.width
    return page.rect.width, page.rect.height


def _turn(blocks: list[dict[str, Any]]) -> int:
    """Return the clockwise quarter turn that makes most horizontal writing run left to right."""
    weights = {0: 0, 90: 0, 180: 0, 270: 0}
    for block in blocks:
        for line in block.get("lines", ()):
            dx, dy = line["dir"]
            chars = sum(map(_length, line["spans"]))
            if line["wmode"] or abs(dx) >= abs(dy):
                weights[180 if dx < 0 and not line["wmode"] else 0] += chars
            else:
                weights[90 if dy < 0 else 270] += chars
    return max(weights, key=lambda turn: (weights[turn], -turn))


def _line(raw: dict[str, Any], block_index: int, turn: int, width: float, height: float) -> Line:
    spans = raw["spans"]
    largest = max(spans, key=_length, default=None)
    # The largest of the longer spans: in small capitals most characters are smaller than the type is.
    size = max((float(span["size"]) for span in spans if _length(span) > 1), default=0.0)
    size = size or (float(largest["size"]) if largest else 0.0)
    words: tuple[Word, ...] = ()
    if spans and "chars" in spans[0]:
        words = tuple(Word(text, turn_box(box, turn, width, height)) for text, box in _words(spans, size, raw["wmode"]))
        text = " ".join(word.text for word in words)
    else:
        text = _clean(_join_spans(spans, size))
    return Line(
        text=text,
        box=turn_box(tuple(raw["bbox"]), turn, width, height),
        block_index=block_index,
        size_pt=size,
        is_bold=bool(largest and (largest["flags"] & 16 or largest.get("char_flags", 0) & 8)),
        is_vertical=bool(raw["wmode"]),
        words=words,
    )


def _length(span: dict[str, Any]) -> int:
    return len(span["chars"]) if "chars" in span else len(span["text"])


def _clean(text: str) -> str:
    return " ".join(_UNUSABLE.sub("\ufffd", text.translate(_LIGATURES)).split())


def _join_spans(spans: list[dict[str, Any]], size: float) -> str:
    """Return the text of spans, with a space where a gap parts two of them."""
    parts: list[str] = []
    end = None
    for span in spans:
        if end is not None and span["bbox"][0] - end > 0.5 * size:
            parts.append(" ")
        parts.append(span["text"])
        end = span["bbox"][2]
    return "".join(parts)


def _words(spans: list[dict[str, Any]], size: float, wmode: int) -> list[tuple[str, Box]]:
    """Return text and raw box of each word of a line."""
    words: list[list[dict[str, Any]]] = [[]]
    previous: dict[str, Any] | None = None
    for span in spans:
        for char in span["chars"]:
            if char["c"].isspace():
                words.append([])
                previous = None
                continue
            if previous is not None and not wmode and _gap(previous["bbox"], char["bbox"]) > 0.5 * size:
                words.append([])
            words[-1].append(char)
            previous = char
    found = [(_clean(_word_text(chars)), union_box([char["bbox"] for char in chars])) for chars in words if chars]
    return found if wmode else _logical_order(found)


def _logical_order(words: list[tuple[str, Box]]) -> list[tuple[str, Box]]:
    """Return the words of a line with each right-to-left phrase in the order it is read in.

    Files made from the screen's order give such a phrase from its left end: it is turned round. A phrase that already
    runs from right to left stays.
    """
    mirrored = [any(map(_is_right_to_left, text)) for text, _ in words]
    neutral = [not any(map(str.isalnum, text)) for text, _ in words]
    ordered = list(words)
    start = 0
    while start < len(words):
        stop = start
        while stop < len(words) and (
            mirrored[stop] or (stop > start and neutral[stop] and any(mirrored[stop + 1 :][:1]))
        ):
            stop += 1
        phrase = words[start:stop]
        if len(phrase) > 1 and all(a[1][0] < b[1][0] for a, b in itertools.pairwise(phrase)):
            ordered[start:stop] = phrase[::-1]
        start = stop + 1
    return ordered


def _word_text(chars: list[dict[str, Any]]) -> str:
    """Return the text of a word, its numbers from left to right whatever the script around them."""
    ordered: list[dict[str, Any]] = []
    run: list[dict[str, Any]] = []
    for char in chars:
        if unicodedata.category(char["c"][0]) == "Nd" or (run and char["c"] in ".,:/"):
            run.append(char)
            continue
        ordered += _left_to_right(run)
        run = []
        ordered.append(char)
    return "".join(char["c"] for char in ordered + _left_to_right(run))


def _left_to_right(run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(run) > 1 and all(a["bbox"][0] > b["bbox"][0] for a, b in itertools.pairwise(run)):
        return run[::-1]
    return run


def _gap(first: Box, second: Box) -> float:
    return max(second[0] - first[2], first[0] - second[2])


def union_box(boxes: list[Box]) -> Box:
    """Return the smallest box around `boxes`."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _count(spans: list[dict[str, Any]]) -> tuple[int, int]:
    """Return how many characters of the spans are painted, and how many are not."""
    shown = hidden = 0
    for span in spans:
        text = span["text"] if "text" in span else "".join(char["c"] for char in span["chars"])
        count = len(text) - sum(map(str.isspace, text))
        if span.get("char_flags", _PAINTED) & _PAINTED and span.get("alpha", 255):
            shown += count
        else:
            hidden += count
    return shown, hidden


def _is_right_to_left(char: str) -> bool:
    return "\u0590" <= char <= "\u08ff" or "\ufb1d" <= char <= "\ufdff" or "\ufe70" <= char <= "\ufefc"
