"""Compaction and purge, killed between every two writes; what a ledger proves of itself."""

import contextlib

import pyarrow.compute as pc
import pytest

from pipeline.accounting import account
from pipeline.commits import COMMITS, PARTS, part_path
from pipeline.compact import Purge, compact, compact_if_needed
from pipeline.ledger import Ledger
from pipeline.plan import write_plan_part
from pipeline.publish import publish
from pipeline.sink import WriteRecords, WriteRecordsConfig
from pipeline.storage import Storage
from pipeline.verify import inspect
from schemas.ids import digest
from tests.pipeline.made_rows import (
    document_unit,
    failure,
    records_of,
    records_table,
    source,
    sources_table,
    units_table,
    video_unit,
)
from tests.pipeline.test_ledger_model import FailingStorage, Killed, published

UNITS = [document_unit(index, [1, 2, 3]) for index in range(6)] + [video_unit(6, [0, 1])]


def fill(uri: str) -> None:
    """Commit every record by itself; one fails, one waits for a second look, one was answered in a later pass."""
    storage = Storage(uri)
    sources = sources_table([source(index) for index in range(7)])
    write_plan_part(storage, units_table(UNITS), sources, "settings")
    sink = WriteRecords(WriteRecordsConfig(run_uri=uri, run_id="r"))
    rows = [row for unit in UNITS for row in records_of(unit)]
    rows[1] |= {"status": None, "text": None, "error": failure("render", retryable=True)}
    rows[2] |= {"status": None, "text": None, "error": failure("render"), "needs_second_look": True}
    rows[3] |= {"content_key": "k3", "completion": "three", "answered_by": {"engine": "torch"}, "attempt": 1}
    for row in rows:
        sink(records_table([row]))
        sink(records_table([row]))
    late = WriteRecords(WriteRecordsConfig(run_uri=uri, run_id="r", pass_index=1))
    late(records_table([rows[4] | {"text": "better"}]))


def compact_and_sweep(uri: str) -> None:
    compact(Ledger(FailingStorage(uri)), "r")
    Ledger(FailingStorage(uri)).sweep()


def outcomes(uri: str) -> dict:
    committed = Ledger(Storage(uri)).committed_records()
    keys = [key for unit in UNITS for key in unit["record_keys"]]
    found = [outcome and outcome[:2] for outcome in committed.outcomes_of(keys)]
    return {
        "outcomes": dict(zip(keys, found, strict=True)),
        "waiting": committed.wait_for_second_look(keys).tolist(),
        "counts": committed.status_counts(),
    }


def test_a_compacted_ledger_says_the_same_in_few_commits(root: str) -> None:
    fill(root)
    publish(Storage(root), "r")
    before, tables = outcomes(root), published(root)
    done = compact(Ledger(Storage(root)), "r")
    assert (done.commits_before, done.commits_after) == (41, 2)
    ledger = Ledger(Storage(root))
    ledger.sweep()
    assert len(Storage(root).list(COMMITS)) == 2
    assert ledger.totals["output_tokens"] > 0
    assert outcomes(root) == before
    facts = inspect(Storage(root), verify=True)
    assert (facts.problems, facts.left_behind, facts.rows["answers"]) == ([], 0, 1)
    publish(Storage(root), "r")
    assert published(root) == tables
    assert account(Storage(root), check_parts=True).problems == []
    assert compact(Ledger(Storage(root)), "r").commits_after == 2


def test_a_few_commits_are_left_as_they_are(root: str) -> None:
    fill(root)
    assert not compact_if_needed(Ledger(Storage(root)), "r", most_small=50)
    assert compact_if_needed(Ledger(Storage(root)), "r", most_small=40)


@pytest.mark.parametrize("dies_after_writing", [False, True])
def test_a_kill_at_any_write_of_a_compaction_changes_nothing(root: str, dies_after_writing: bool) -> None:
    fill(f"{root}/calm")
    wanted = outcomes(f"{root}/calm")
    FailingStorage.dies_after_writing = dies_after_writing
    FailingStorage.writes_left = 10**9
    compact_and_sweep(f"{root}/calm")
    writes = 10**9 - FailingStorage.writes_left
    assert writes > 80, "the replaced commits and parts are removed one by one"
    for fatal in [*range(12), *range(12, writes, 7)]:
        uri = f"{root}/killed-{fatal}"
        fill(uri)
        FailingStorage.writes_left = fatal
        with pytest.raises(Killed):
            compact_and_sweep(uri)
        FailingStorage.writes_left = 10**9
        assert outcomes(uri) == wanted, f"killed at write {fatal}"
        compact(Ledger(Storage(uri)), "r")
        Ledger(Storage(uri)).sweep(grace_seconds=0)
        assert outcomes(uri) == wanted
        assert inspect(Storage(uri), verify=True).left_behind == 0


def test_what_is_purged_is_in_no_file_any_more(root: str) -> None:
    fill(root)
    compact(Ledger(Storage(root)), "r")
    gone = UNITS[0]["doc_id"]
    done = compact(Ledger(Storage(root)), "purge", Purge(doc_ids=frozenset([gone])))
    assert done.rows_removed > 3
    Ledger(Storage(root)).sweep()
    storage = Storage(root)
    for name in storage.list(PARTS):
        table = Ledger(storage).read_part(name.split("/")[-2], name.split("/")[-1].removesuffix(".parquet"))
        if "doc_id" in table.column_names:
            assert gone not in table["doc_id"].to_pylist()
    committed = Ledger(storage).committed_records()
    assert [key in committed for key in UNITS[0]["record_keys"]] == [False] * 3
    assert all(key in committed for unit in UNITS[1:] for key in unit["record_keys"])
    assert inspect(storage, verify=True).problems == []


def test_a_ledger_whose_part_was_changed_or_lost_says_so(root: str) -> None:
    fill(root)
    storage = Storage(root)
    first, second, *_ = sorted(name for name in storage.list(PARTS) if "/pages/" in name)
    storage.put(first, storage.get(first)[:-1] + b"?")
    problems = inspect(storage, verify=True).problems
    assert len(problems) == 1
    assert f"{first} was changed" in problems[0]
    storage.delete(second)
    [changed, missing] = sorted(inspect(storage, verify=True).problems, key=lambda line: "not there" in line)
    assert "was changed" in changed
    assert "names parts that are not there" in missing


def test_a_row_that_the_commit_does_not_name_is_found_out(root: str) -> None:
    storage = Storage(root)
    sink = WriteRecords(WriteRecordsConfig(run_uri=root, run_id="r"))
    sink(records_table(records_of(UNITS[0])))
    [commit] = Ledger(storage).commits()
    table = Ledger(storage).read_part("pages", commit.part_id)
    other = table.set_column(
        table.schema.get_field_index("record_key"), "record_key", pc.replace_substring(table["record_key"], "a", "b")
    )
    ledger = Ledger(storage)
    part_id = ledger.begin(["x"])
    keys = [digest("never written")]
    ledger.commit(part_id, {"pages": other}, run_id="r", records={"u": keys}, statuses={"u": ["success"]})
    problems = inspect(storage, verify=True).problems
    assert len(problems) == 1
    assert "whose rows are not one each" in problems[0]
    with contextlib.suppress(FileNotFoundError):
        storage.delete(part_path("pages", part_id))
