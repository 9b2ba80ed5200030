"""Whole runs over hostile files, and what must be true of them.

The runs are those of the command line, in one process: files are listed, probed, decoded in their boxes, prepared,
judged, written and published. Only the model is another: its answer is a word for the pixels and the prompt, so that a
row differs where anything that the model would see differs.
"""

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
from run_tables import UNLIKE

from operators.answers import asks_model, with_answers
from operators.base import Operator
from operators.generate import Generate, GenerateConfig
from operators.prepare import read_pictures
from pipeline import run
from pipeline.runner import status_of
from schemas.errors import CATEGORY_OF_CODE
from schemas.generation import GENERATION

TABLES = ("pages", "blocks", "video_segments", "documents", "errors")
PARTS = ("pages", "video_segments")
BY_CHANCE = (*UNLIKE, "ledger_hit")
"""Of records that show the same pixels, whichever comes first is the one that is computed."""


class AnswerByPixels(Operator[GenerateConfig]):
    """Answers each record with a word for what it shows."""

    reads = Generate.reads
    adds = Generate.adds

    def process(self, table: pa.Table) -> pa.Table:
        """Return `table` with an answer to each record that is routed to the model."""
        asked = [row for row in range(table.num_rows) if asks_model(table, row)]
        return with_answers(table, {row: self._answer(table, row) for row in asked}, {}, "Generate")

    def words(self, seen: str) -> str:
        """Return the answer to a record, given a hash of what it shows."""
        return f"A page that shows {seen}."

    def _answer(self, table: pa.Table, row: int) -> dict[str, Any]:
        pictures = read_pictures(table, row)
        prompt_ids = table["prompt_ids"][row].as_py()
        seen = hashlib.sha256(pictures.digest().encode() + str(prompt_ids).encode()).hexdigest()
        return dict.fromkeys(GENERATION.names) | {
            "completion": self.words(seen),
            "finish_reason": "stop",
            "attempt": 1,
            "prompt_tokens": len(prompt_ids),
            "output_tokens": 8,
            "engine": "torch",
            "weights_kind": "demo_random",
            "model_id": "demo",
        }


@contextlib.contextmanager
def answered_by(model_class: type[AnswerByPixels]) -> Iterator[None]:
    """Put a class in the place of the model in flows that are built meanwhile."""
    with mock.patch("pipeline.flow.Generate", model_class):
        yield


@dataclass
class Result:
    """What came of a run.

    Attributes:
        rows: of each table, by the file they belong to.
        seconds: it took.
    """

    rows: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    seconds: float = 0.0

    def of(self, table: str, path: Path) -> list[dict[str, Any]]:
        """Return the rows of one file in one table."""
        return self.rows[table].get(str(path), [])


def read_all(
    paths: Iterable[Path], output: Path, *, model_class: type[AnswerByPixels] = AnswerByPixels, **options: Any
) -> Result:
    """Read files in one run and return its tables; the run must end complete and account for everything."""
    start = time.monotonic()
    with answered_by(model_class):
        summary = run(
            **{"task": "ocr", "model": "demo", "local": True, "second_look": False}
            | options
            | {"inputs": [str(path) for path in paths], "output": str(output)}
        )
    assert summary.complete, summary.problems
    assert status_of(str(output)).complete
    return Result(tables_of(output), time.monotonic() - start)


def tables_of(output: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return the rows of the published tables by file, without what may differ from run to run."""
    tables: dict[str, dict[str, list[dict[str, Any]]]] = {}
    source_of: dict[str, str] = {}
    for name in TABLES:
        tables[name] = {}
        for row in pq.read_table(output / name).to_pylist():
            if name == "pages":
                source_of[row["page_id"]] = row["source_uri"]
            source = source_of[row["page_id"]] if name == "blocks" else row["source_uri"]
            kept = {column: value for column, value in row.items() if column not in BY_CHANCE}
            tables[name].setdefault(source, []).append(kept)
    return tables


def outcome_of(result: Result, path: Path) -> str:
    """Return what became of a file: `ok`, `partial`, or the code of its one error.

    Raises:
        AssertionError: it has no outcome, or more than one, or a word that is not in the closed vocabularies.
    """
    parts = [row for name in PARTS for row in result.of(name, path)]
    errors = [row for row in result.of("errors", path) if not row["recovered"]]
    [document] = result.of("documents", path)
    assert {row["error_code"] for row in result.of("errors", path)} <= CATEGORY_OF_CODE.keys()
    if not parts:
        assert len(errors) == 1, (path, errors)
        assert document["status"] == "failure"
        return str(errors[0]["error_code"])
    keys = [row.get("page_number") or row.get("segment_index") for row in parts]
    assert len(set(keys)) == len(keys), (path, keys)
    if document["page_count"] is not None and document["kind"] != "video":
        assert sorted(keys) == list(range(1, document["page_count"] + 1)), path
    failed = [row for row in parts if row["status"] not in ("success", "blank", "partial_success", "skipped")]
    assert len(errors) >= len(failed), (path, errors)
    if not failed:
        return "ok"
    return "partial" if len(failed) < len(parts) else str(errors[0]["error_code"])


def assert_same(found: Result, wanted: Result, paths: Iterable[Path]) -> None:
    """Assert that files have the same rows in two runs."""
    for path in paths:
        for name in TABLES:
            assert found.of(name, path) == wanted.of(name, path), (path, name)


def deaths_of(result: Result) -> Counter[str]:
    """Return the decoders that died, by signal."""
    errors = [row for rows in result.rows["errors"].values() for row in rows]
    return Counter(str(row["exit_signal"]) for row in errors if row["exit_signal"] is not None)
