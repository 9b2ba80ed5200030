"""How the tables of a run are compared with those of an undisturbed one, row by row."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from pipeline.storage import Storage
from tests.pipeline.run_tables import ROUNDED, TABLES, UNLIKE

KEYS = {
    "pages": ("record_key",),
    "blocks": ("record_key", "block_id"),
    "video_segments": ("record_key",),
    "documents": ("source_uri", "doc_id"),
    "errors": ("error_id",),
}
CONFIDENCE_TOLERANCE = 1e-4
EXAMPLES = 3

Rows = dict[str, list[dict[str, Any]]]


@dataclass
class Comparison:
    """What is wrong with the rows of a run.

    Attributes:
        expected: rows of the undisturbed run.
        lost: of these, how many are not there.
        doubled: rows whose key is there more often than in the undisturbed run.
        different: rows that the undisturbed run has with another content, or does not have, and tables in another
            order.
        examples: the first few, in words.
    """

    expected: int = 0
    lost: int = 0
    doubled: int = 0
    different: int = 0
    examples: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Keep an example."""
        if len(self.examples) < EXAMPLES:
            self.examples.append(text[:500])


def read_rows(uri: str) -> Rows:
    """Return the rows of every table of a run, as any reader of Parquet finds them."""
    storage = Storage(uri)
    rows: Rows = {}
    for name in TABLES:
        table = pq.read_table(storage.path(name), filesystem=storage.filesystem)
        rows[name] = [{k: v for k, v in row.items() if k not in UNLIKE} for row in table.to_pylist()]
    return rows


def compare(found: Rows, wanted: Rows) -> Comparison:
    """Return how the rows of a run differ from those of an undisturbed run over the same files."""
    result = Comparison()
    for name in TABLES:
        _compare_table(name, found[name], wanted[name], result)
    return result


def _compare_table(name: str, found: list[dict[str, Any]], wanted: list[dict[str, Any]], result: Comparison) -> None:
    mine, theirs = ([_key(name, row) for row in rows] for rows in (found, wanted))
    counted, due = Counter(mine), Counter(theirs)
    result.expected += len(wanted)
    missing = due - counted
    surplus = counted - due
    twice = sum(count for key, count in surplus.items() if key in due)
    result.lost += missing.total()
    result.doubled += twice
    result.different += surplus.total() - twice
    for word, keys in (("lost", missing), ("too many", surplus)):
        for key in keys:
            result.say(f"{name}: {word}: {key}: {[row for row in found if _key(name, row) == key][:1]}")
    rows = dict(zip(theirs, wanted, strict=True))
    for key, row in dict(zip(mine, found, strict=True)).items():
        if key in rows and not _is_equal(row, rows[key]):
            result.different += 1
            unlike = {k: (row[k], rows[key][k]) for k in row if row[k] != rows[key][k]}
            result.say(f"{name}: {key} differs: {unlike}")
    if mine != theirs and counted == due:
        result.different += 1
        result.say(f"{name}: the rows are in another order")


def _key(name: str, row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[column] for column in KEYS[name])


def _is_equal(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    mine, theirs = found.get(ROUNDED), wanted.get(ROUNDED)
    if None not in (mine, theirs):
        if abs(mine - theirs) > CONFIDENCE_TOLERANCE:
            return False
        found = found | {ROUNDED: theirs}
    return found == wanted
