"""JSON schemas of many kinds, and what answers to them must be."""

import json

from jsonschema import Draft202012Validator

from operators.answer_schema import PAGE_BLOCKS


def closed(required, **properties):
    """An object with these properties and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


STRING = {"type": "string"}
NUMBER = {"type": "number"}
SCHEMAS = {
    "page blocks": json.loads(PAGE_BLOCKS),
    "nested": closed(
        ("title", "author"),
        title=STRING,
        author=closed(("name", "age"), name=STRING, age={"type": "integer", "minimum": 0, "maximum": 150}),
        links=closed(("next",), next=closed(("url",), url=STRING), previous=STRING),
    ),
    "enums": closed(
        ("colour", "size"), colour={"enum": ["red", "dark green", "blåbær", "\u4e2d\u6587", 'a "quoted" word\n']},
        size={"enum": [1, 2.5, None, True, ["x"]]}, kind={"const": "thing"},
    ),
    "numbers": closed(
        ("count", "share", "free"), count={"type": "integer", "minimum": 3, "maximum": 4711},
        share={"type": "number", "minimum": 0.25, "exclusiveMaximum": 1}, free=NUMBER,
    ),
    "arrays": {
        "type": "array", "items": {"type": "array", "items": NUMBER, "minItems": 1, "maxItems": 5}, "minItems": 2
    },
    "strings": closed(
        ("short", "long", "code"), short={"type": "string", "maxLength": 3}, long={"type": "string", "minLength": 7},
        code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    ),
    "optional": closed((), a=STRING, b={"type": "boolean"}, c={"type": "null"}, d={"type": "array", "items": STRING}),
    "anyOf": {
        "anyOf": [
            closed(("kind", "text"), kind={"const": "text"}, text=STRING),
            closed(("kind", "rows"), kind={"const": "table"}, rows={"type": "array", "items": STRING}),
            {"type": "null"},
        ]
    },
    "open": {"type": "object", "properties": {"name": STRING}, "required": ["name"]},
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": closed(
                ("value",), children={"type": "array", "items": {"$ref": "#/$defs/node"}},
                next={"$ref": "#/$defs/node"}, value={"type": "integer", "minimum": -9, "maximum": 9},
            )
        },
    },
    "anything": {},
    "text": STRING,
    "date": {"type": "string", "format": "date"},
}  # fmt: skip
TEXTS = {name: json.dumps(schema) for name, schema in SCHEMAS.items()}


def assert_valid(name, text):
    """Assert that a text is JSON of the schema of this name."""
    found = list(Draft202012Validator(SCHEMAS[name]).iter_errors(json.loads(text)))
    assert not found, (name, text, found[0].message)
