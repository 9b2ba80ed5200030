"""Ids and keys: pure functions of content."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any


def digest(*parts: str | bytes | int | float | None) -> str:
    """Return the sha256, in hex, of the parts with their types and lengths.

    Lengths keep `("ab", "c")` apart from `("a", "bc")`.
    """
    hasher = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        hasher.update(f"{type(part).__name__}:{len(data)}:".encode())
        hasher.update(data)
    return hasher.hexdigest()


def canonical_json(value: Any) -> str:
    """Return `value` as JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def page_id(doc_id: str, page_number: int) -> str:
    """Return the id of a page; `page_number` counts from 1."""
    return f"{doc_id}:{page_number}"


def segment_id(video_id: str, start_seconds: float, stop_seconds: float) -> str:
    """Return the id of a video segment.

    Its place on the grid would not do: two ranges of one video can clip the same segment of the grid.
    """
    return f"{video_id}:{float(start_seconds)}-{float(stop_seconds)}"


def block_id(owner_page_id: str, reading_order: int) -> str:
    """Return the id of a layout block; stable for equal output."""
    return f"{owner_page_id}/b{reading_order:04d}"


def record_key(doc_id: str, part: int | Sequence[float], settings: Mapping[str, Any]) -> str:
    """Return the key of what is owed: everything that determines one output row.

    Args:
        doc_id: sha256 of the source bytes.
        part: page number, or (start_seconds, stop_seconds).
        settings: task, render or sampling settings, model and weights, prompt, decode parameters,
            schema version; anything JSON can hold.
    """
    return digest(doc_id, canonical_json(part), canonical_json(settings))


def content_key(pixels_digest: str, prompt_ids_digest: str, settings: Mapping[str, Any]) -> str:
    """Return the key of what the model sees: prepared pixels, prompt, model and decode parameters."""
    return digest(pixels_digest, prompt_ids_digest, canonical_json(settings))
