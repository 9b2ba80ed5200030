"""One `documents` row a source: facts of the plan, and what became of its records."""

from collections import Counter
from typing import Any, Final

import pyarrow as pa

from operators.base import rows_to_table
from pipeline.rows import FAILED_STATUSES
from schemas.source import SOURCE_FACTS
from schemas.tables import DOCUMENTS
from schemas.vocabulary import QUIET_STATUSES

COUNT_OF_STATUS: Final = {
    "success": "success_count",
    "blank": "success_count",
    "partial_success": "partial_count",
    "fallback": "fallback_count",
    "failure": "failed_count",
    "truncated": "failed_count",
    "repetition": "failed_count",
    "skipped": "skipped_count",
}
COUNTS: Final = ("success_count", "partial_count", "fallback_count", "failed_count", "skipped_count", "owed_count")
PAGE_SEPARATOR: Final = "\n\n"

_FACTS: Final = ("source_uri", "source_ref", "size_bytes", *(n for n in SOURCE_FACTS.names if n in DOCUMENTS.names))


class DocumentTally:
    """Adds up the records of each source; sources come in order, in one or several calls each.

    Args:
        run_id: the invocation that publishes.
        assemble_text: True fills `text` and `page_spans`.
    """

    def __init__(self, run_id: str, assemble_text: bool) -> None:
        self._run_id = run_id
        self._assemble_text = assemble_text
        self._current: _Source | None = None
        self._done: list[dict[str, Any]] = []

    def add(self, units: pa.Table, keys: list[str], pages: pa.Table, segments: pa.Table) -> None:
        """Count the records of `units`.

        Args:
            units: PLANNED_UNIT rows.
            keys: their record keys, one list after the other.
            pages: winning page rows of those keys that have one.
            segments: winning segment rows of those keys that have one.
        """
        outcomes = _outcomes(pages) | _outcomes(segments)
        texts = (
            dict(zip(pages["record_key"].to_pylist(), _page_texts(pages), strict=True)) if self._assemble_text else {}
        )
        wanted = ["source_index", *_FACTS, "page_numbers", "segments", "record_keys", "error"]
        start = 0
        for unit in units.select(wanted).to_pylist():
            count = len(unit["record_keys"] or ())
            if self._current is None or self._current.source_index != unit["source_index"]:
                self._close_current()
                self._current = _Source(unit)
            self._current.add(unit, [outcomes.get(key) for key in keys[start : start + count]])
            self._current.texts += [texts[key] for key in keys[start : start + count] if key in texts]
            start += count

    def done(self) -> pa.Table:
        """Return the rows of the sources that are complete, once."""
        rows, self._done = self._done, []
        return rows_to_table(rows, DOCUMENTS)

    def finish(self) -> pa.Table:
        """Return the rows that are left."""
        self._close_current()
        return self.done()

    def _close_current(self) -> None:
        if self._current is not None:
            self._done.append(self._current.row() | {"run_id": self._run_id})
            self._current = None


class _Source:
    """Counts of one source."""

    def __init__(self, unit: dict[str, Any]) -> None:
        self.source_index = unit["source_index"]
        self.facts = {name: unit[name] for name in _FACTS}
        self.failed = False
        self.pages: set[int] = set()
        self.segments: set[int] = set()
        self.statuses: Counter[str | None] = Counter()
        self.routes: set[str] = set()
        self.texts: list[tuple[int, str]] = []

    def add(self, unit: dict[str, Any], outcomes: list[tuple[str, str | None] | None]) -> None:
        self.failed |= unit["error"] is not None
        self.pages.update(unit["page_numbers"] or ())
        self.segments.update(segment["segment_index"] for segment in unit["segments"] or ())
        for outcome in outcomes:
            self.statuses[outcome[0] if outcome else None] += 1
            if outcome and outcome[1]:
                self.routes.add(outcome[1])

    def row(self) -> dict[str, Any]:
        counts = dict.fromkeys(COUNTS, 0)
        for status, count in self.statuses.items():
            counts["owed_count" if status is None else COUNT_OF_STATUS[status]] += count
        video = self.facts["kind"] == "video"
        return {
            **self.facts,
            **counts,
            **self._assembled(),
            "pages_requested": None if video else len(self.pages),
            "segment_count": len(self.segments) if video else None,
            "status": self._status(),
            "route": next(iter(self.routes)) if len(self.routes) == 1 else ("mixed" if self.routes else None),
        }

    def _status(self) -> str | None:
        if self.failed:
            return "failure"
        if self.statuses[None]:
            return None
        found = {status for status in self.statuses if status is not None}
        if len(found) == 1:
            return next(iter(found))
        if not found:
            return "skipped"
        if found <= set(QUIET_STATUSES):
            return "success"
        return "failure" if found <= set(FAILED_STATUSES) else "partial_success"

    def _assembled(self) -> dict[str, Any]:
        if not self.texts:
            return {}
        spans, start = [], 0
        for page_number, text in self.texts:
            spans.append({"start": start, "end": start + len(text), "page_number": page_number})
            start += len(text) + len(PAGE_SEPARATOR)
        return {"text": PAGE_SEPARATOR.join(text for _, text in self.texts), "page_spans": spans}


def _outcomes(rows: pa.Table) -> dict[str, tuple[str, str | None]]:
    columns = rows.select(["record_key", "status", "route"]).to_pydict()
    return {key: (status, route) for key, status, route in zip(*columns.values(), strict=True)}


def _page_texts(pages: pa.Table) -> list[tuple[int, str]]:
    numbers, texts = pages["page_number"].to_pylist(), pages["text"].to_pylist()
    return [(number, text or "") for number, text in zip(numbers, texts, strict=True)]
