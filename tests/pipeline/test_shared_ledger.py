"""A ledger beside its runs: giving and taking over, killed between every two writes, and in each other's way."""

import threading

import pytest

from pipeline.commits import COMMITS, utc_now
from pipeline.current import removal_of, source_states
from pipeline.known_sources import Listed
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.plan import PlanReader, owed_units, write_plan_part
from pipeline.publish import publish
from pipeline.shared_ledger import SharedLedger
from pipeline.sink import WriteRecords, WriteRecordsConfig
from pipeline.storage import Storage
from pipeline.verify import inspect
from schemas.errors import TransientError
from tests.pipeline.made_rows import (
    SteppingClock,
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
from tests.pipeline.test_ledger_model import FailingStorage, Killed, published

UNITS = [
    document_unit(0, [1, 2, 3]),
    document_unit(1, [1], doc="twin"),
    failed_unit(2, "damaged"),
    video_unit(3, [0, 1]),
    document_unit(4, [1], doc="twin"),
]
SOURCES = [source(unit["source_index"], source_uri=unit["source_uri"]) for unit in UNITS]
DISTINCT = 6


def plan(uri: str) -> None:
    write_plan_part(Storage(uri), units_table(UNITS), sources_table(SOURCES), "s", clock=SteppingClock())


def compute(uri: str, run_id: str = "first", **changes) -> int:
    """Do what a run owes; return how many records that was."""
    sink = WriteRecords(WriteRecordsConfig(run_uri=uri, run_id=run_id))
    committed = Ledger(Storage(uri)).committed_records()
    count = 0
    for table in owed_units(PlanReader(Storage(uri)), committed):
        for unit in table.to_pylist():
            rows = records_of(unit, **changes)
            if unit["source_index"] == 0 and rows[0]["page_number"] == 1:
                rows[0] |= {"status": None, "text": None, "error": failure("render")}
            sink(records_table(rows))
            count += len(rows)
    return count


def take_over(shared: SharedLedger, uri: str, **options) -> int:
    storage = Storage(uri)
    committed = Ledger(storage).committed_records()
    template = "pagereel ocr {source} {part} -o repro"
    return shared.take_over(
        storage, lambda: owed_units(PlanReader(storage), committed), "second", repro_template=template, **options
    )


def test_a_run_takes_over_what_another_gave_and_owes_nothing(root: str) -> None:
    plan(f"{root}/1")
    assert compute(f"{root}/1") == DISTINCT
    publish(Storage(f"{root}/1"), "first")
    shared = SharedLedger(f"{root}/ledger")
    given = shared.give(Storage(f"{root}/1"), f"{root}/1", "first", "probe", listed())
    assert (given.records, given.sources) == (DISTINCT, 5)
    again = shared.give(Storage(f"{root}/1"), f"{root}/1", "first", "probe", listed())
    assert (again.records, again.answers, again.sources) == (0, 0, 0)
    plan(f"{root}/2")
    assert take_over(SharedLedger(f"{root}/ledger"), f"{root}/2") == DISTINCT
    assert compute(f"{root}/2") == 0
    publish(Storage(f"{root}/2"), "second")
    one, two = published(f"{root}/1"), published(f"{root}/2")
    for name in ("pages", "video_segments", "blocks", "errors"):
        unlike = [column for column in ("run_id", "ledger_hit") if column in one[name].column_names]
        assert two[name].drop_columns(unlike) == one[name].drop_columns(unlike)
    assert two["pages"]["ledger_hit"].to_pylist() == [True] * 4
    assert SharedLedger(f"{root}/ledger").give(Storage(f"{root}/2"), f"{root}/2", "second", "probe").records == 0


def listed() -> Listed:
    found = Listed(["/in"])
    found.add(sources_table(SOURCES))
    return found


def test_failures_that_may_pass_and_failures_that_are_retried_are_computed_again(root: str) -> None:
    plan(f"{root}/1")
    compute(f"{root}/1")
    shared = SharedLedger(f"{root}/ledger")
    shared.give(Storage(f"{root}/1"), f"{root}/1", "first", None)
    plan(f"{root}/2")
    assert take_over(shared, f"{root}/2", retry_failed=True) == DISTINCT - 1
    sink = WriteRecords(WriteRecordsConfig(run_uri=f"{root}/2", run_id="second"))
    sink(records_table(records_of(UNITS[0])[:1]))
    assert SharedLedger(f"{root}/ledger").give(Storage(f"{root}/2"), f"{root}/2", "second", None).records == 1
    plan(f"{root}/3")
    taken = SharedLedger(f"{root}/ledger")
    assert take_over(taken, f"{root}/3") == DISTINCT
    committed = Ledger(Storage(f"{root}/3")).committed_records()
    assert committed.status_counts() == {"success": DISTINCT}
    assert inspect(Storage(f"{root}/ledger"), verify=True).problems == []


@pytest.mark.parametrize("dies_after_writing", [False, True])
def test_a_kill_at_any_write_of_a_gift_loses_and_doubles_nothing(root: str, dies_after_writing: bool) -> None:
    plan(f"{root}/run")
    compute(f"{root}/run", content_key="k", completion="c", attempt=1, answered_by={"engine": "torch"})
    FailingStorage.dies_after_writing = dies_after_writing

    def give(uri: str) -> None:
        shared = SharedLedger(uri)
        shared.storage = FailingStorage(uri)
        shared.give(Storage(f"{root}/run"), "run", "first", "probe", listed())

    FailingStorage.writes_left = 10**9
    give(f"{root}/calm")
    writes = 10**9 - FailingStorage.writes_left
    wanted = inspect(Storage(f"{root}/calm"), verify=True)
    assert (wanted.records, wanted.rows["sources"], wanted.rows["answers"]) == (DISTINCT, 5, 1)
    assert writes > 10
    for fatal in range(writes):
        uri = f"{root}/killed-{fatal}"
        FailingStorage.writes_left = fatal
        with pytest.raises(Killed):
            give(uri)
        FailingStorage.writes_left = 10**9
        free_lease(uri)
        give(uri)
        found = inspect(Storage(uri), verify=True)
        assert (found.problems, found.records) == ([], DISTINCT), f"killed at write {fatal}"
        assert {name: found.rows[name] for name in wanted.rows} == dict(wanted.rows), f"killed at write {fatal}"


def free_lease(uri: str) -> None:
    """What the death of the process would do; here the process that held it goes on."""
    storage = Storage(uri)
    for name in storage.list("ledger/leases"):
        storage.delete(name)


def test_two_runs_that_give_at_once_wait_for_each_other(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.shared_ledger.LEASE_LOOK_SECONDS", 0.05)
    for name in ("a", "b"):
        plan(f"{root}/{name}")
        compute(f"{root}/{name}", run_id=name)
    given: dict[str, int] = {}

    def give(name: str) -> None:
        shared = SharedLedger(f"{root}/ledger")
        given[name] = shared.give(Storage(f"{root}/{name}"), name, name, "probe").records

    threads = [threading.Thread(target=give, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given.values()) == [0, DISTINCT]
    assert inspect(Storage(f"{root}/ledger"), verify=True).rows["pages"] == 4


def test_a_ledger_that_stays_taken_is_left_for_the_next_call(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.shared_ledger.LEASE_WAIT_SECONDS", 0.0)
    plan(f"{root}/1")
    compute(f"{root}/1")
    with (
        Lease(Storage(f"{root}/ledger"), utc_now),
        pytest.raises(TransientError, match="taken"),
    ):
        SharedLedger(f"{root}/ledger").give(Storage(f"{root}/1"), "1", "first", None)
    assert Storage(f"{root}/ledger").list(COMMITS) == []


def test_the_current_view_tells_what_was_replaced_and_what_is_gone(root: str) -> None:
    plan(f"{root}/1")
    compute(f"{root}/1")
    shared = SharedLedger(f"{root}/ledger")
    shared.give(Storage(f"{root}/1"), "1", "first", "probe", listed())
    changed = [source(0, version_tag="v2"), *SOURCES[1:3]]
    units = [document_unit(0, [1], doc="new bytes"), *UNITS[1:3]]
    write_plan_part(Storage(f"{root}/2"), units_table(units), sources_table(changed), "s")
    compute(f"{root}/2")
    second = Listed(["/in"])
    second.add(sources_table(changed))
    shared.give(Storage(f"{root}/2"), "2", "second", "probe", second)
    rows = [row for table in source_states(Ledger(shared.storage)) for row in table.to_pylist()]
    states = {(row["source_uri"], row["version_tag"]): row["state"] for row in rows}
    assert states == {
        ("/in/0.pdf", "v1"): "replaced", ("/in/0.pdf", "v2"): "current", ("/in/1.pdf", "v1"): "current",
        ("/in/2.pdf", "v1"): "current", ("/in/3.mp4", "v1"): "gone", ("/in/4.pdf", "v1"): "gone",
    }  # fmt: skip


def test_bytes_that_another_source_holds_as_well_stay(root: str) -> None:
    plan(f"{root}/1")
    compute(f"{root}/1")
    shared = SharedLedger(f"{root}/ledger")
    shared.give(Storage(f"{root}/1"), "1", "first", "probe")
    ledger = Ledger(shared.storage)
    alone, twin = removal_of(ledger, ["/in/0.pdf"]), removal_of(ledger, ["/in/1.pdf"])
    assert (len(alone.purge.doc_ids), alone.shared, alone.versions) == (1, 0, 1)
    assert (len(twin.purge.doc_ids), twin.shared) == (0, 1)
    both = removal_of(ledger, ["/in/1.pdf", "/in/4.pdf"])
    assert (len(both.purge.doc_ids), both.shared) == (1, 0)
    assert removal_of(ledger, ["/in/"]).versions == 5
