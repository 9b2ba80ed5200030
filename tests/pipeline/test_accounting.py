"""Proof by counting, and that it notices what is wrong."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.accounting import Accounting, account
from pipeline.commits import COMMITS, PARTS
from pipeline.plan import write_plan_part
from pipeline.publish import publish
from pipeline.sink import WriteRecords, WriteRecordsConfig
from pipeline.storage import Storage
from schemas.tables import TABLES
from tests.pipeline.made_rows import (
    document_unit,
    failed_unit,
    failure,
    records_of,
    records_table,
    source,
    sources_table,
    units_table,
    video_unit,
)

UNITS = [document_unit(0, [1, 2, 3]), failed_unit(1), video_unit(2, [0, 1]), document_unit(3, [2])]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path / "run"))
    write_plan_part(storage, units_table(UNITS), sources_table([source(index) for index in range(4)]), "s")
    return storage


def write(storage: Storage, rows: list[dict[str, Any]]) -> None:
    WriteRecords(WriteRecordsConfig(run_uri=storage.uri, run_id="r"))(records_table(rows))


def finish(storage: Storage) -> Accounting:
    first, *rest = records_of(UNITS[0])
    write(storage, [first | {"status": None, "error": failure()}, *rest, *records_of(UNITS[2]), *records_of(UNITS[3])])
    publish(storage, "r")
    return account(storage, check_parts=True)


def rewrite(storage: Storage, table_name: str, change: Any) -> None:
    """Replace the rows of a published table behind the manifest's back."""
    [name] = storage.list(table_name)
    rows = change(pq.read_table(storage.path(name)).to_pylist())
    pq.write_table(pa.Table.from_pylist(rows, schema=TABLES[table_name]), storage.path(name))


def test_a_finished_run_adds_up(storage: Storage) -> None:
    result = finish(storage)
    assert result.problems == []
    assert result.complete
    assert (result.sources, result.failed_sources, result.planned, result.committed, result.owed) == (4, 1, 6, 6, 0)
    assert result.planned_by_kind == {"pdf": 4, "video": 2}
    assert result.statuses == {"success": 5, "failure": 1}
    assert (result.published_rows, result.error_rows) == (6, 2)
    assert ("complete", "yes") in result.table()
    assert json.loads(json.dumps(result.as_dict()))["complete"] is True


def test_a_run_that_was_killed_says_what_it_owes_and_that_it_is_sound(storage: Storage) -> None:
    write(storage, records_of(UNITS[2]))
    result = account(storage)
    assert (result.planned, result.committed, result.owed) == (6, 2, 4)
    assert not result.complete
    assert result.problems == []
    assert ("published", "not yet") in result.table()


def test_rows_committed_after_the_publication_are_not_called_a_defect(storage: Storage) -> None:
    publish(storage, "r")
    write(storage, records_of(UNITS[2]))
    result = account(storage)
    assert not result.is_published
    assert result.problems == []


def test_an_empty_place_is_no_complete_run(tmp_path: Path) -> None:
    result = account(Storage(str(tmp_path / "nothing")))
    assert (result.planned, result.complete) == (0, False)


def test_records_of_earlier_settings_are_counted_apart(storage: Storage) -> None:
    finish(storage)
    changed = document_unit(3, [2], doc="changed")
    write_plan_part(storage, units_table([changed]), sources_table([source(3)]), "s")
    result = account(storage)
    assert (result.planned, result.owed, result.superseded) == (6, 1, 1)


@pytest.mark.parametrize(
    ("table_name", "change", "problem"),
    [
        ("pages", lambda rows: rows[:-1], "published rows: 5, committed records: 6"),
        ("pages", lambda rows: [*rows, rows[0]], "1 records published twice"),
        ("pages", lambda rows: [*rows[:-1], rows[-1] | {"record_key": "0" * 64}], "published, but not planned"),
        ("pages", lambda rows: [rows[0] | {"status": "fine"}, *rows[1:]], "statuses outside the vocabulary"),
        ("pages", lambda rows: [rows[0], rows[1] | {"page_id": rows[2]["page_id"]}, *rows[2:]], "and task twice"),
        ("errors", lambda rows: rows[1:], "failed without a row in errors"),
        ("errors", lambda rows: rows[:-1], "error rows without a record: 0"),
        ("errors", lambda rows: [*rows, rows[0]], "error rows are there twice"),
        ("documents", lambda rows: rows[1:], "documents rows: 3, planned sources: 4"),
        ("documents", lambda rows: [rows[0] | {"success_count": 0}, *rows[1:]], "documents count 4 records"),
        ("documents", lambda rows: [r | {"status": "success"} for r in rows], "0 documents failed as a whole"),
    ],
)
def test_what_does_not_add_up_is_named(storage: Storage, table_name: str, change: Any, problem: str) -> None:
    finish(storage)
    rewrite(storage, table_name, change)
    result = account(storage)
    assert any(problem in found for found in result.problems), result.problems
    assert not result.complete


def test_a_missing_published_file_is_named(storage: Storage) -> None:
    finish(storage)
    storage.delete(storage.list("pages")[0])
    assert "published files are missing" in account(storage).problems[0]


def test_a_stray_file_beside_the_published_ones_is_named(storage: Storage) -> None:
    finish(storage)
    storage.put("pages/copy.parquet", b"x")
    assert any("not part of the publication" in problem for problem in account(storage).problems)


def test_a_part_that_was_changed_or_lost_is_named(storage: Storage) -> None:
    finish(storage)
    [name] = storage.list(f"{PARTS}/pages")
    storage.put(name, storage.get(name) + b"x")
    assert account(storage).problems == []
    assert any("was changed" in problem for problem in account(storage, check_parts=True).problems)
    storage.delete(name)
    result = account(storage)
    assert any("not there" in problem for problem in result.problems)
    assert result.owed == 6


def test_the_accounting_leaves_no_trace(storage: Storage) -> None:
    finish(storage)
    before = storage.list()
    account(storage, check_parts=True)
    assert storage.list() == before
    assert len(storage.list(COMMITS)) == 1
