"""Prompts, by task and kind. An id carries a version: a changed text is a changed id, and a changed record key."""

import hashlib
from dataclasses import dataclass
from typing import Final

from schemas.errors import ConfigError
from schemas.vocabulary import BLOCK_LABELS, KINDS

_OCR_PAGE: Final = """\
Read this page and write down all of its text as Markdown.
Keep the natural reading order: finish one column before the next.
Mark headings with #, list items with -. Write tables as HTML with <table>, <tr>, <th> and <td>. \
Write formulas as LaTeX between $ and $, or $$ and $$ on a line of their own.
Copy the words exactly as they are, in their own language; do not translate, correct, explain or repeat. \
Leave pictures out, but keep their captions.
Answer with the Markdown only. If there is no text, answer with nothing."""

_PARSE_PAGE: Final = f"""\
Find every region of this page and read it, in reading order.
Answer with one JSON list and nothing else. Each region is an object with exactly these three fields:
{{"label": "text", "bbox": [left, top, right, bottom], "text": "..."}}
"label" is one of: {", ".join(BLOCK_LABELS)}.
"bbox" are four whole numbers from 0 to 1000: thousandths of the page width (left, right) and height (top, bottom), \
counted from the top left corner.
"text" is the text of the region, copied exactly: a table as HTML with <table>, <tr>, <th> and <td>; a formula as \
LaTeX without dollar signs; a picture as an empty string. Inside the list write each backslash twice.
Each region appears once. If the page is empty, answer with []."""

_CAPTION_PAGE: Final = """\
Describe this image for someone who cannot see it and wants to find it again by searching.
Say what it shows, where, and what matters most; quote short text that can be read in it. \
Write one paragraph of two to five plain sentences. Do not guess what cannot be seen. \
Answer with the description only."""

_OCR_SEGMENT: Final = """\
Write down all text that can be read on screen in this video: titles, captions, signs, slides, labels.
Keep the order in which it appears, one line for each piece of text. Write text that stays or comes back only once. \
Copy the words exactly as they are; do not translate or describe the scene. \
Answer with the text only. If there is no text, answer with nothing."""

_CAPTION_SEGMENT: Final = """\
Describe this video clip for someone who wants to find it again by searching.
Say who or what is seen, where, and what happens in order from beginning to end; mention changes of scene or camera \
and short text that can be read on screen. Write one paragraph of two to six plain sentences. \
Do not guess what cannot be seen or heard. Answer with the description only."""

_BUILT_IN: Final = {
    ("ocr", "page"): ("ocr-page-v1", _OCR_PAGE),
    ("ocr", "segment"): ("ocr-segment-v1", _OCR_SEGMENT),
    ("parse", "page"): ("parse-page-v1", _PARSE_PAGE),
    # A clip has no page to lay out: its parse is its on-screen text.
    ("parse", "segment"): ("ocr-segment-v1", _OCR_SEGMENT),
    ("caption", "page"): ("caption-page-v1", _CAPTION_PAGE),
    ("caption", "segment"): ("caption-segment-v1", _CAPTION_SEGMENT),
}


@dataclass(frozen=True)
class Prompt:
    """What the model is asked. `sha256` is that of the UTF-8 text, in hex."""

    prompt_id: str
    text: str
    sha256: str


def prompt_for(task: str, kind: str, custom: str | None = None) -> Prompt:
    """Return the prompt of a task for a kind of source; PDFs and images are pages, videos are segments.

    Args:
        task: `ocr`, `parse` or `caption`; another name only together with `custom`.
        kind: `pdf`, `image` or `video`.
        custom: the user's own text, which takes the place of the built-in one.

    Raises:
        ConfigError: an unknown kind, an unknown task without `custom`, or a `custom` without any text.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind {kind!r} has no prompt; there are {', '.join(KINDS)}")
    part = "segment" if kind == "video" else "page"
    if custom is not None:
        if not custom.strip():
            raise ConfigError("the custom prompt is empty")
        sha256 = hashlib.sha256(custom.encode()).hexdigest()
        return Prompt(f"{task}-{part}-custom-{sha256[:8]}", custom, sha256)
    if (task, part) not in _BUILT_IN:
        raise ConfigError(f"task {task!r} has no built-in prompt: give one with --prompt")
    prompt_id, text = _BUILT_IN[task, part]
    return Prompt(prompt_id, text, hashlib.sha256(text.encode()).hexdigest())
