"""How long the end of a JSON answer can become that has to be finished at once, by its schema. No torch."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

ANNOTATIONS: Final = frozenset(
    {"title", "description", "$schema", "$id", "$comment", "default", "examples", "deprecated", "readOnly", "writeOnly"}
)
KEYWORDS: Final[Mapping[str, frozenset[str]]] = {
    "null": frozenset(),
    "boolean": frozenset(),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "string": frozenset({"minLength", "maxLength"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
}
"""What is understood of each type; any other keyword makes the bound unknown."""

NUMBER_BYTES: Final = 48
BOUND_BYTES: Final = 20
"""Bounds of a number that are written in so few bytes have the digits of their values in them."""

CHARACTER_BYTES: Final = 12
"""What may be owed of a character: two escapes of a surrogate pair."""


def longest_end_bytes(schema: object) -> int | None:
    """Return a bound on the bytes that end a value, wherever in it the writer stands, also before it.

    None: not known, as values may contain themselves, or obey what is not looked at here.

    Args:
        schema: a JSON schema, parsed.
    """
    if not isinstance(schema, Mapping):
        return None
    keywords = schema.keys() - ANNOTATIONS
    if keywords in ({"const"}, {"const", "type"}):
        return json_bytes(schema["const"])
    if keywords in ({"enum"}, {"enum", "type"}):
        return max(map(json_bytes, schema["enum"]), default=None)
    if keywords == {"anyOf"}:
        return largest([longest_end_bytes(one) for one in schema["anyOf"]])
    given = schema.get("type")
    kinds = [given] if isinstance(given, str) else list(given or ())
    known = {"type"}.union(*(KEYWORDS[kind] for kind in kinds if kind in KEYWORDS))
    if not kinds or keywords - known or not set(kinds) <= KEYWORDS.keys():
        return None
    return largest([end_of_kind(kind, schema) for kind in kinds])


def end_of_kind(kind: str, schema: Mapping[str, Any]) -> int | None:
    """Return the bound of one type of a schema."""
    if kind == "object":
        return end_of_object(schema)
    if kind == "array":
        item = longest_end_bytes(schema.get("items"))
        # One more than must be there may have begun.
        return None if item is None else 2 + (int(schema.get("minItems", 0)) + 1) * (1 + item)
    if kind == "string":
        return 2 + CHARACTER_BYTES + int(schema.get("minLength", 0))
    if kind in ("integer", "number"):
        bounds = [json.dumps(schema[name]) for name in KEYWORDS[kind] if name in schema]
        is_plain = all(len(text) <= BOUND_BYTES and "e" not in text.lower() for text in bounds)
        return NUMBER_BYTES if is_plain else None
    return len("false")


def end_of_object(schema: Mapping[str, Any]) -> int | None:
    """Return the bound of an object: as if every property were still to come."""
    properties = schema.get("properties", {})
    # What is not named may hold anything.
    if schema.get("additionalProperties") is not False or not set(schema.get("required", ())) <= properties.keys():
        return None
    total = 2
    for name, one in properties.items():
        value = longest_end_bytes(one)
        if value is None:
            return None
        total += json_bytes(name) + len(":,") + value
    return total


def largest(bounds: Sequence[int | None]) -> int | None:
    """Return the largest bound; None where one is not known."""
    known = [bound for bound in bounds if bound is not None]
    return max(known) if known and len(known) == len(bounds) else None


def json_bytes(value: object) -> int:
    """Return the bytes of a value in its longest spelling."""
    return len(json.dumps(value))
