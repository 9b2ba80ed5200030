"""The grammar of parse answers: model text to layout blocks. Nothing is evaluated, nothing raises.

What the prompt asks for::

    answer := "[" [ block { "," block } ] "]"
    block  := { "label": LABEL, "bbox": [left, top, right, bottom], "text": STRING }

`LABEL` is one of `schemas.vocabulary.BLOCK_LABELS`; box numbers are thousandths of the page width and height, origin
top-left; tables are HTML in `text`, formulas are LaTeX in `text`. An answer that follows this to the letter is `ok`.
Everything that had to be mended (truncated JSON, prose around it, fences, one object without the list, unknown labels,
impossible boxes, plain Markdown instead of JSON) is `salvaged`; an answer with no block in it is `invalid`.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from operators.parse.markdown import clean_answer, plain_text
from operators.parse.tables import is_pipe_rule, pipes_to_html, sanitise_table, table_text
from schemas.vocabulary import BLOCK_LABELS

MAX_BLOCKS: Final = 2000

_ALIASES: Final = {
    "heading": "section_header", "header": "page_header", "footer": "page_footer", "section": "section_header",
    "subtitle": "section_header", "paragraph": "text", "plain_text": "text", "list": "list_item", "figure": "picture",
    "image": "picture", "chart": "picture", "photo": "picture", "equation": "formula", "equation_block": "formula",
    "math": "formula", "isolate_formula": "formula", "code_block": "code", "figure_caption": "caption",
    "image_caption": "caption", "table_caption": "caption", "table_footnote": "footnote", "page_number": "page_footer",
    "handwriting": "handwritten_text", "toc": "document_index", "table_of_contents": "document_index",
}  # fmt: skip
"""Labels of other parsers' vocabularies, after lower case and underscores."""

# LaTeX that a model writes with a single backslash inside JSON, where it would be read as a control character.
_LATEX_AFTER_ESCAPE: Final = re.compile(
    r"b(?:ar|eta|egin|ig|igg|inom|mod|ot|ox|oldsymbol|mathbf|ullet|ackslash|igcup|igcap)\b"
    r"|f(?:rac|orall|lat|box)(?![a-z])|n(?:abla|eq|ot|otin|u|eg|leq|geq|mid|ewline)(?![a-z])"
    r"|r(?:ight|ightarrow|ho|angle|ceil|floor|m|oot|elax)(?![a-z])"
    r"|t(?:heta|imes|au|an|anh|ext|extbf|extit|extrm|frac|ilde|riangle|op)(?![a-z])"
)
_FIELD: Final = re.compile(r'"(label|bbox|text)"\s*:\s*')
_LIST_START: Final = re.compile(r"[-*+]\s+|\(?\d{1,3}[.)]\s+")
_REGION_START: Final = re.compile(r"```|<table|\$\$|#{1,6}\s|!\[|\||[-*+]\s+|\(?\d{1,3}[.)]\s+", re.I)
_DECODER: Final = json.JSONDecoder(strict=False)


@dataclass(frozen=True)
class ParsedBlocks:
    """What an answer held.

    Attributes:
        blocks: values of the `BLOCK` struct, in reading order.
        status: `ok`, `salvaged` or `invalid` (then there are no blocks).
        dropped_box_count: boxes out of the page or inverted; their blocks stay, with a null box.
        unknown_label_count: labels outside the vocabulary and its aliases, kept as `text`.
        dropped_item_count: list members that are no block.
    """

    blocks: list[dict[str, Any]]
    status: str
    dropped_box_count: int = 0
    unknown_label_count: int = 0
    dropped_item_count: int = 0


def parse_blocks(answer: str, page_width_pt: float | None, page_height_pt: float | None) -> ParsedBlocks:
    """Return the blocks in a model's parse answer.

    Args:
        answer: any string.
        page_width_pt: width that boxes are scaled to; without it every box is null.
        page_height_pt: height that boxes are scaled to.
    """
    items, is_strict = _json_items(answer)
    if items is None:
        blocks = [] if _is_json_debris(answer) else blocks_from_markdown(clean_answer(answer))
        return ParsedBlocks(blocks, "salvaged" if blocks else "invalid")
    size = (page_width_pt, page_height_pt) if page_width_pt and page_height_pt else None
    blocks, dropped_boxes, unknown_labels, dropped_items = [], 0, 0, max(0, len(items) - MAX_BLOCKS)
    for item in items[:MAX_BLOCKS]:
        if not _is_block(item):
            dropped_items += 1
            continue
        label, is_known = _label(item.get("label"))
        box = thousandths_to_points(item.get("bbox"), *(size or (1.0, 1.0)))
        dropped_boxes += item.get("bbox") is not None and box is None
        unknown_labels += not is_known
        raw = _string(item.get("label"))
        blocks.append(make_block(label, _string(item.get("text")), box if size else None, label_raw=raw))
        is_strict = is_strict and item.keys() == {"label", "bbox", "text"} and item["label"] in BLOCK_LABELS
        is_strict = is_strict and isinstance(item["text"], str)
    is_strict = is_strict and not (dropped_boxes or unknown_labels or dropped_items)
    if not blocks and not is_strict:
        return ParsedBlocks([], "invalid", dropped_item_count=dropped_items)
    status = "ok" if is_strict else "salvaged"
    return ParsedBlocks(blocks, status, dropped_boxes, unknown_labels, dropped_items)


def thousandths_to_points(box: object, page_width_pt: float, page_height_pt: float) -> list[float] | None:
    """Return a box in thousandths of the page as points, or None unless it is a box inside the page."""
    if not isinstance(box, list) or len(box) != 4:
        return None
    if not all(isinstance(side, int | float) and not isinstance(side, bool) for side in box):
        return None
    # Compared before any arithmetic: JSON integers may be longer than a float can hold.
    if not all(0 <= side <= 1000 for side in box):
        return None
    left, top, right, bottom = (float(side) / 1000 for side in box)
    if not all(map(math.isfinite, (left, top, right, bottom))) or left >= right or top >= bottom:
        return None
    return [left * page_width_pt, top * page_height_pt, right * page_width_pt, bottom * page_height_pt]


def make_block(
    label: str, content: str, bbox: list[float] | None = None, *, label_raw: str | None = None
) -> dict[str, Any]:
    """Return a value of the `BLOCK` struct from what a model wrote for one region."""
    block: dict[str, Any] = {
        "label": label, "label_raw": label if label_raw is None else label_raw, "level": None, "bbox": bbox,
        "text": "", "markdown": None, "html": None, "latex": None, "score": None, "parent": None,
    }  # fmt: skip
    content = clean_answer(content)
    if label == "table":
        return block | _table_fields(content)
    if label == "formula":
        latex = re.sub(r"\A(?:\$\$?|\\\[|\\\()|(?:\$\$?|\\\]|\\\))\Z", "", content).strip()
        return block | {"text": plain_text(f"$${latex}$$") if latex else "", "latex": latex or None}
    if label in ("title", "section_header"):
        hashes = re.match(r"#{1,6}(?=\s)", content)
        block["level"] = len(hashes[0]) if hashes else (1 if label == "title" else 2)
        content = content.lstrip("#").strip() if hashes else content
    plain = content if label == "code" else plain_text(content)
    return block | {"text": plain, "markdown": None if plain == content else content or None}


def blocks_from_markdown(markdown: str) -> list[dict[str, Any]]:
    """Return blocks without boxes from plain Markdown: headings, lists, tables, formulas, code, paragraphs."""
    blocks = [make_block(label, content) for label, content in _markdown_regions(markdown)]
    return [block for block in blocks if block["text"] or block["html"] or block["latex"]][:MAX_BLOCKS]


def _table_fields(content: str) -> dict[str, Any]:
    lines = [line for line in content.split("\n") if line.strip()]
    if "<t" not in content.lower() and len(lines) > 1 and any(is_pipe_rule(line) for line in lines):
        content = pipes_to_html(lines)
    markup = sanitise_table(content)
    if "<t" not in markup:
        return {"text": plain_text(content), "markdown": content or None}
    if not markup.startswith("<table"):
        markup = sanitise_table(f"<table>{content}</table>")
    return {"text": table_text(markup), "html": markup}


def _json_items(answer: str) -> tuple[list[Any] | None, bool]:
    """Return the members of the answer's list, None without one, and whether they were read without mending."""
    escaped = _double_latex_backslashes(answer)
    try:
        value = json.loads(escaped)
    except (ValueError, RecursionError):
        pass
    else:
        if isinstance(value, list):
            return value, escaped == answer
        if isinstance(value, dict):
            return _unwrapped(value), False
    items = list(_objects(escaped))
    return (items, False) if items else (None, False)


def _unwrapped(value: dict[str, Any]) -> list[Any]:
    """Return the list in an object such as ``{"blocks": [...]}``, or the object itself as the only block."""
    lists = [member for member in value.values() if isinstance(member, list) and any(map(_is_block, member))]
    return lists[0] if lists and not _is_block(value) else [value]


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the blocks that can be read one by one, also a last one that is cut off."""
    position = text.find("{")
    while position >= 0:
        try:
            value, stop = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            next_block = re.compile(r'\{\s*"').search(text, position + 1)
            stop = next_block.start() if next_block else len(text)
            value = _cut_object(text[position:stop])
        if isinstance(value, dict):
            yield from (member for member in _unwrapped(value) if _is_block(member))
        position = text.find("{", max(stop, position + 1))


def _cut_object(text: str) -> dict[str, Any]:
    """Return the fields that a damaged object still shows."""
    found: dict[str, Any] = {}
    for match in _FIELD.finditer(text):
        if match[1] in found:
            continue
        rest = text[match.end() :]
        try:
            found[match[1]], _ = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            if match[1] == "text" and rest.startswith('"'):
                found["text"] = _cut_string(rest[1:])
    return found


def _cut_string(text: str) -> str:
    """Return the JSON string that begins `text` and is not closed properly."""
    text = re.sub(r'"\s*\}?\s*,?\s*\]?\s*\Z', "", text[-40:]) if len(text) <= 40 else text[:-40] + re.sub(
        r'"\s*\}?\s*,?\s*\]?\s*\Z', "", text[-40:]
    )  # fmt: skip
    text = re.sub(r"\\(?:u[0-9a-fA-F]{0,3})?\Z", "", text)
    try:
        value = _DECODER.decode('"' + re.sub(r'(?<!\\)"', r"\"", text) + '"')
    except ValueError:
        return text
    return value if isinstance(value, str) else text


def _double_latex_backslashes(text: str) -> str:
    r"""Return `text` with a second backslash where JSON would misread LaTeX, as in ``"\frac"`` or ``"\alpha"``."""

    def double(match: re.Match[str]) -> str:
        following = match.string[match.start() + 1 : match.start() + 16]
        if match[1] in '"\\/':
            return match[0]
        if match[1] == "u" and re.match(r"u[0-9a-fA-F]{4}", following):
            return match[0]
        if match[1] in "bfnrt" and not _LATEX_AFTER_ESCAPE.match(following):
            return match[0]
        return "\\" + match[0]

    return re.sub(r"\\(.)", double, text)


def _is_json_debris(answer: str) -> bool:
    return re.match(r"\s*(?:```\w*\s*)?(?:\[\s*(?:[\[{\"\]]|\Z)|\{)", answer) is not None


def _is_block(item: object) -> bool:
    return isinstance(item, dict) and bool(item.keys() & {"label", "text"})


def _string(value: object) -> str:
    """Return a JSON member as text; what is no string is written as JSON again. Lone surrogates are replaced."""
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode("utf-8")


def _label(raw: object) -> tuple[str, bool]:
    name = re.sub(r"[\s-]+", "_", raw.strip().lower()) if isinstance(raw, str) else ""
    name = _ALIASES.get(name, name)
    return (name, True) if name in BLOCK_LABELS else ("text", False)


def _markdown_regions(markdown: str) -> Iterator[tuple[str, str]]:
    """Yield (label, content) for each region of a Markdown page."""
    lines = markdown.split("\n")
    index = 0
    while index < len(lines):
        line = lines[index]
        if not line.strip():
            index += 1
            continue
        label, stop = _region_at(lines, index)
        content = "\n".join(lines[index:stop])
        if label == "code":
            content = "\n".join(content.split("\n")[1:])
            content = re.sub(r"\n?[ \t]*`{3,}[ \t]*\Z", "", content)
        elif label == "list_item":
            content = re.sub(r"\A\s*[-*+]\s+", "", content)
        elif label == "picture":
            content = plain_text(content)
        yield label, content
        index = stop


def _region_at(lines: list[str], index: int) -> tuple[str, int]:
    """Return the label of the region that begins at `index` and the line where the next begins."""
    line = lines[index].strip()
    if line.startswith("```"):
        return "code", _until(lines, index + 1, lambda text: text.strip().startswith("```"))
    if line.lower().startswith("<table"):
        return "table", _until(lines, index, lambda text: "</table" in text.lower())
    if line.startswith("$$"):
        if line.count("$$") > 1:
            return "formula", index + 1
        return "formula", _until(lines, index + 1, lambda text: "$$" in text)
    if match := re.match(r"(#{1,6})\s", line):
        return ("title" if len(match[1]) == 1 else "section_header"), index + 1
    if line.startswith("|") and index + 1 < len(lines) and is_pipe_rule(lines[index + 1]):
        stop = index
        while stop < len(lines) and lines[stop].strip().startswith("|"):
            stop += 1
        return "table", stop
    if re.fullmatch(r"!\[[^\]]*\]\([^)]*\)", line):
        return "picture", index + 1
    label = "list_item" if _LIST_START.match(line) else "text"
    stop = index + 1
    while stop < len(lines) and lines[stop].strip() and not _REGION_START.match(lines[stop].strip()):
        stop += 1
    return label, stop


def _until(lines: list[str], index: int, is_last: Callable[[str], bool]) -> int:
    while index < len(lines):
        index += 1
        if is_last(lines[index - 1]):
            break
    return index
