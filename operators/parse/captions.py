"""Captions of segments, images and pages."""

import re
from typing import Final

from operators.parse.markdown import clean_answer

_LEAD_IN: Final = re.compile(
    r"\A(?:(?:sure|certainly|of course|okay|ok)[!,.]?\s+)?"
    r"(?:here(?:'s| is| are)\b[^\n:]{0,80}:|(?:caption|description)\s*:)\s*",
    re.I,
)


def parse_caption(completion: str) -> str:
    """Return the caption in `completion`: no wrapper, no lead-in, no quotation marks around the whole.

    An answer that is nothing but a wrapper gives an empty string.
    """
    text = clean_answer(completion)
    text = re.sub(r"\A\*\*\s*(?:caption|description)\s*:?\s*\*\*\s*:?\s*", "", text, flags=re.I)
    text = _LEAD_IN.sub("", text).strip()
    for opening, closing in (('"', '"'), ("“", "”"), ("'", "'")):
        inner = text[1:-1]
        if len(text) > 1 and text[0] == opening and text[-1] == closing and opening not in inner:
            text = inner.strip()
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+", " ", text))
