"""What documents repeat by nature, and a model does not invent: rules, leaders, numbers, empty or equal table cells."""

import html
import re
from typing import Final

MARKUP: Final = re.compile(r"</?[A-Za-z][^<>]*>?|\\[A-Za-z]+|&#?\w+;")
"""Tags, commands of LaTeX, entities."""

CELL_END: Final = re.compile(r"\||</?t[dhr]\b[^<>]*>?")
LETTER: Final = re.compile(r"[^\W\d_]")

LONGEST_CELL: Final = 12
"""Letters of a cell that may stand in a whole column, as `N/A`, `Yes` or `not tested` do."""


def is_filler(twice: str) -> bool:
    """Return whether a document may well hold a long run of a pattern.

    Args:
        twice: the pattern, written twice: its tokens may begin and end inside of a tag, a cell or a letter.
    """
    if not twice.strip():
        return False
    markup = MARKUP.search(twice)
    # What begins with markup is not cut inside of it, and ends where it begins again.
    start = markup.start() if markup else 0
    whole = twice[start : start + len(twice) // 2] if markup else twice
    if not LETTER.search(MARKUP.sub(" ", whole)):
        return True
    cells = {html.unescape(cell).strip() for cell in CELL_END.split(whole * 2)[1:-1]} - {""}
    return len(cells) == 1 and len(cells.pop()) <= LONGEST_CELL
