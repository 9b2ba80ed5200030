"""The commit protocol, killed between every two writes.

A driver plans, computes and commits, is killed after a number of writes, and is started again until it ends. Whatever
the moment of the kill, the published rows are those of the undisturbed run, and no committed record is computed again.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.accounting import account
from pipeline.ledger import Ledger
from pipeline.listing_cache import ListingCache
from pipeline.plan import PlanReader, as_units, owed_units, write_plan_part
from pipeline.publish import publish, published_tables, read_manifest
from pipeline.sink import WriteRecords, WriteRecordsConfig
from pipeline.storage import Storage
from schemas.tables import TABLES
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

UNITS = [
    document_unit(0, [1, 2, 3]),
    document_unit(0, [4, 5]),
    document_unit(1, [1], doc="twin"),
    failed_unit(2),
    video_unit(3, [0, 1]),
    document_unit(4, [1], doc="twin"),
]
ALL_KEYS = {key for unit in UNITS for key in unit.get("record_keys", ())}
SOURCES = [source(index, source_uri=f"/in/{index}") for index in range(5)]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the product catches it."""


class FailingStorage(Storage):
    """Real storage that dies at one of its writes, before it happens or just after."""

    writes_left = 10**9
    dies_after_writing = False

    def put(self, name: str, data: bytes) -> None:
        self._step(lambda: Storage.put(self, name, data))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        answer: list[bool] = []
        self._step(lambda: answer.append(Storage.put_if_absent(self, name, data)))
        return answer[0]

    def delete(self, name: str) -> None:
        self._step(lambda: Storage.delete(self, name))

    def _step(self, write: Callable[[], None]) -> None:
        if FailingStorage.writes_left == 0 and not FailingStorage.dies_after_writing:
            raise Killed
        write()
        if FailingStorage.writes_left == 0:
            raise Killed
        FailingStorage.writes_left -= 1


class Driver:
    """The shortest honest driver: list, plan, compute what is owed, publish."""

    def __init__(self, uri: str, computed: Counter[str], duplicate_attempts: bool) -> None:
        self.uri = uri
        self.computed = computed
        self.duplicate_attempts = duplicate_attempts
        self.clock = SteppingClock()

    def run(self) -> None:
        storage = FailingStorage(self.uri)
        cache = ListingCache(storage, "settings")
        for batch in (SOURCES[:2], SOURCES[2:]):
            fresh = cache.to_probe(sources_table(batch))
            if fresh.num_rows:
                indexes = set(fresh["source_index"].to_pylist())
                units = units_table([unit for unit in UNITS if unit["source_index"] in indexes])
                write_plan_part(storage, units, fresh, "settings")
        ledger = Ledger(storage)
        ledger.sweep(grace_seconds=0)
        sink = WriteRecords(WriteRecordsConfig(run_uri=self.uri, run_id="r"))
        sink._ledger.storage = storage
        committed = ledger.committed_records()
        for table in owed_units(PlanReader(storage), committed):
            for unit in as_units(table).to_pylist():
                assert not any(key in committed for key in unit["record_keys"])
                self._compute(sink, unit)
        publish(storage, "r")

    def _compute(self, sink: WriteRecords, unit: dict) -> None:
        self.computed.update(unit["record_keys"])
        rows = records_of(unit)
        if unit["source_index"] == 0:
            rows[0] |= {"status": None, "text": None, "error": failure("render")}
        # Two halves, as an engine returns rows in any order: a unit may be covered by several commits.
        halves = [rows[1:], rows[:1]]
        for half in halves:
            if half:
                sink(records_table(half))
                if self.duplicate_attempts:
                    sink(records_table(half))


def published(uri: str) -> dict[str, pa.Table]:
    storage = Storage(uri)
    manifest = read_manifest(storage)
    assert manifest is not None
    assert manifest.paths() == {name for table in TABLES for name in storage.list(table)}
    found = {}
    for name, schema in TABLES.items():
        columns = [column for column in schema.names if column != "created_at"]
        empty = pa.schema([schema.field(column) for column in columns]).empty_table()
        found[name] = pa.concat_tables([empty, *published_tables(storage, manifest, name, columns)])
    return found


def count_writes(uri: str, duplicate_attempts: bool) -> int:
    FailingStorage.writes_left = 10**9
    Driver(uri, Counter(), duplicate_attempts).run()
    return 10**9 - FailingStorage.writes_left


@pytest.mark.parametrize("dies_after_writing", [False, True])
def test_a_kill_at_any_write_changes_no_row(root: str, dies_after_writing: bool) -> None:
    FailingStorage.dies_after_writing = dies_after_writing
    writes = count_writes(f"{root}/calm", duplicate_attempts=True)
    expected = published(f"{root}/calm")
    assert expected["pages"].num_rows == 6
    assert writes > 40
    for fatal in range(writes):
        uri = f"{root}/killed-{fatal}"
        computed: Counter[str] = Counter()
        driver = Driver(uri, computed, duplicate_attempts=True)
        FailingStorage.writes_left = fatal
        with pytest.raises(Killed):
            driver.run()
        FailingStorage.writes_left = 10**9
        committed = Ledger(Storage(uri)).committed_records()
        done = {key: computed[key] for key in ALL_KEYS if key in committed}
        driver.run()
        assert published(uri) == expected, f"killed at write {fatal}"
        assert account(Storage(uri), check_parts=True).complete
        assert done == {key: computed[key] for key in done}
        before = dict(computed)
        driver.run()
        assert before == computed, "a finished run computes nothing"


def test_two_kills_in_a_row_change_no_row_on_a_local_disk(tmp_path: Path) -> None:
    FailingStorage.dies_after_writing = False
    writes = count_writes(str(tmp_path / "calm"), duplicate_attempts=False)
    expected = published(str(tmp_path / "calm"))
    for first in range(2, writes, 6):
        for second in range(1, writes, 9):
            uri = str(tmp_path / f"killed-{first}-{second}")
            driver = Driver(uri, Counter(), duplicate_attempts=False)
            for fatal in (first, second):
                FailingStorage.writes_left = fatal
                with contextlib.suppress(Killed):
                    driver.run()
            FailingStorage.writes_left = 10**9
            driver.run()
            assert published(uri) == expected, f"killed at writes {first} and {second}"
