"""The error tree as drawn in `schemas.errors` is the error tree as written."""

import inspect
import re

from schemas import errors

DRAWN = re.compile(r"^    (?P<branches>[│├└─ ]*)(?P<name>[A-Z]\w*Error)\b")
COLUMNS_A_LEVEL = 4


def drawn_parents(docstring: str) -> dict[str, str]:
    """Return class name to parent name, read from the drawing; the root's parent is `Exception`."""
    parents: dict[str, str] = {}
    ancestors = ["Exception"]
    for line in docstring.splitlines():
        if match := DRAWN.match(line):
            level = len(match["branches"]) // COLUMNS_A_LEVEL
            ancestors[level + 1 :] = [match["name"]]
            parents[match["name"]] = ancestors[level]
    return parents


def test_the_drawing_and_the_classes_agree() -> None:
    written = {
        name: cls.__base__.__name__
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, errors.PagereelError)
    }
    assert drawn_parents(errors.__doc__ or "") == written


def test_the_drawing_is_read_with_its_levels() -> None:
    drawing = "    RootError\n    ├── LeftError   who acts\n    │   └── DeepError\n    └── RightError\n"
    assert drawn_parents(drawing) == {
        "RootError": "Exception",
        "LeftError": "RootError",
        "DeepError": "LeftError",
        "RightError": "RootError",
    }


def test_any_exception_is_one_line_that_utf_8_can_hold():
    assert errors.one_line(ValueError()) == "ValueError"
    assert errors.one_line(OSError("first\n  second \udce9")) == "first second \\udce9"
    message = errors.error_struct(errors.FetchError("/in/\udce9.pdf: gone"), "Test")["message"]
    assert message == "/in/\\udce9.pdf: gone"
