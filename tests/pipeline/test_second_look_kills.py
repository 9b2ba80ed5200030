"""The two looks, killed between every two writes: a mark in the ledger owes the second, and its rows replace the first.

A driver plans, looks at what is owed, looks once more at what that has marked, and publishes; it is killed after a
number of writes and started again. The published rows are those of the undisturbed run, whatever the moment.
"""

import uuid
from collections import Counter

import fsspec
import pytest

from pipeline.accounting import account
from pipeline.ledger import Ledger
from pipeline.listing_cache import ListingCache
from pipeline.plan import PlanReader, as_units, owed_units, unit_keys, write_plan_part
from pipeline.publish import publish
from pipeline.second_look import FirstLooks
from pipeline.sink import WriteRecords, WriteRecordsConfig
from pipeline.storage import Storage
from tests.pipeline.made_rows import (
    SteppingClock,
    document_unit,
    loop_failure,
    records_of,
    records_table,
    source,
    sources_table,
    units_table,
)
from tests.pipeline.test_ledger_model import FailingStorage, Killed, published

UNITS = [document_unit(0, [1, 2, 3]), document_unit(1, [1, 2]), document_unit(2, [2], doc="bytes of 1")]
SOURCES = [source(index) for index in range(3)]
LOOPING = {1, 2}
"""Pages on which the first look fails; the second fails on the first of them, too."""


class Driver:
    """The shortest honest driver of a run with two looks; it counts the looks at each record."""

    def __init__(self, uri, looks):
        self.uri = uri
        self.looks = looks

    def run(self):
        storage = FailingStorage(self.uri)
        fresh = ListingCache(storage, "settings").to_probe(sources_table(SOURCES))
        if fresh.num_rows:
            write_plan_part(storage, units_table(UNITS), fresh, "settings", clock=SteppingClock())
        ledger = Ledger(storage)
        committed = ledger.committed_records()
        for table in owed_units(PlanReader(storage), committed):
            for unit in as_units(table).to_pylist():
                self._write(storage, unit, [first_look(row) for row in records_of(unit)], 0)
        ledger.refresh()
        second_pass = committed.last_pass() + 1
        remembered = FirstLooks(storage, committed)
        for table in list(owed_units(PlanReader(storage), committed, second_look=True)):
            for unit in as_units(table, survived=remembered.failures(unit_keys(table))).to_pylist():
                pairs = zip(records_of(unit), unit["survived"], strict=True)
                self._write(storage, unit, [second_look(*pair) for pair in pairs], second_pass)
        publish(storage, "r")

    def _write(self, storage, unit, rows, pass_index):
        self.looks.update((key, pass_index > 0) for key in unit["record_keys"])
        sink = WriteRecords(WriteRecordsConfig(run_uri=self.uri, run_id="r", pass_index=pass_index))
        sink._ledger.storage = storage
        # Two commits, so that there are kills within a unit, and one that comes twice.
        sink(records_table(rows[:1]))
        sink(records_table(rows))


def failed(**changes):
    return {"status": "repetition", "text": None, "error": loop_failure() | {"component": "ParseCompletions"}} | changes


def first_look(row):
    return row | (failed(needs_second_look=True) if row["page_number"] in LOOPING else {"rung": "first"})


def second_look(row, survived):
    answer = failed() if row["page_number"] == min(LOOPING) else {"rung": "other_pixels", "text": "seen better"}
    return row | answer | {"recovered": survived}


@pytest.fixture
def root():
    """Memory: thousands of writes, none of which needs a disk; the protocol is the same on every store."""
    uri = f"memory://{uuid.uuid4().hex}"
    yield uri
    filesystem, path = fsspec.core.url_to_fs(uri)
    filesystem.rm(path, recursive=True)


@pytest.mark.parametrize("dies_after_writing", [False, True])
def test_a_kill_at_any_write_of_either_look_changes_no_row(root, dies_after_writing):
    FailingStorage.dies_after_writing = dies_after_writing
    FailingStorage.writes_left = 10**9
    Driver(f"{root}/calm", Counter()).run()
    writes = 10**9 - FailingStorage.writes_left
    expected = published(f"{root}/calm")
    rungs = Counter(zip(expected["pages"]["status"].to_pylist(), expected["pages"]["rung"].to_pylist(), strict=True))
    assert rungs == {("success", "first"): 1, ("success", "other_pixels"): 2, ("repetition", None): 2}
    assert Counter(expected["errors"]["recovered"].to_pylist()) == {True: 4, False: 2}
    for fatal in range(writes):
        uri = f"{root}/killed-{fatal}"
        looks = Counter()
        FailingStorage.writes_left = fatal
        with pytest.raises(Killed):
            Driver(uri, looks).run()
        FailingStorage.writes_left = 10**9
        committed = Ledger(Storage(uri)).committed_records()
        keys = [key for unit in UNITS for key in unit["record_keys"]]
        settled = {key: dict(looks) for key in keys if key in committed}
        waiting = {key for key, is_due in zip(keys, committed.wait_for_second_look(keys), strict=True) if is_due}
        halfway = account(Storage(uri))
        assert halfway.problems == []
        assert halfway.second_looks_owed == len(waiting) <= halfway.owed or halfway.planned == 0
        Driver(uri, looks).run()
        assert published(uri) == expected, f"killed at write {fatal}"
        assert account(Storage(uri), check_parts=True).complete
        for key, before in settled.items():
            assert all(looks[key, second] == before.get((key, second), 0) for second in (False, True))
        assert all(looks[key, False] == 1 for key in waiting), "a first look that was committed was taken again"
        done = dict(looks)
        Driver(uri, looks).run()
        assert done == dict(looks), "a finished run looks at nothing"
