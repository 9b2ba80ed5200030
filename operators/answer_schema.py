"""What the answers to our own prompts look like, as JSON schemas; see `operators.prompts`."""

import json
from typing import Any, Final

from schemas.vocabulary import BLOCK_LABELS

_THOUSANDTHS: Final[dict[str, Any]] = {"type": "integer", "minimum": 0, "maximum": 1000}
_BLOCK: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "label": {"enum": list(BLOCK_LABELS)},
        "bbox": {"type": "array", "items": _THOUSANDTHS, "minItems": 4, "maxItems": 4},
        "text": {"type": "string"},
    },
    "required": ["label", "bbox", "text"],
    "additionalProperties": False,
}

PAGE_BLOCKS: Final = json.dumps({"type": "array", "items": _BLOCK}, separators=(",", ":"))
"""What the prompt `parse-page-v1` asks for, members in its order, which a grammar keeps. That the right side of a box
is to the right of its left side cannot be said."""


def built_in_schema(task: str, kind: str) -> str | None:
    """Return the schema that answers to a built-in prompt have; None where they are free text.

    Args:
        task: `ocr`, `parse` or `caption`.
        kind: `pdf`, `image` or `video`.
    """
    return PAGE_BLOCKS if task == "parse" and kind != "video" else None
