"""The plan: what is owed, and which sources need no second look."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.committed import Again
from pipeline.key_index import SourceIndex
from pipeline.ledger import Ledger
from pipeline.listing_cache import ListingCache
from pipeline.plan import (
    PLAN,
    PlanReader,
    as_units,
    count_plan,
    owed_units,
    read_plan,
    unit_blocks,
    write_plan_part,
)
from pipeline.sink import WriteRecords, WriteRecordsConfig
from pipeline.storage import Storage
from schemas.errors import ContractError
from schemas.source import UNIT
from tests.pipeline.made_rows import (
    document_unit,
    failed_unit,
    records_of,
    records_table,
    source,
    sources_table,
    units_table,
    video_unit,
)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def plan(storage: Storage, units: list[dict], settings: str = "s", **source_changes: object) -> None:
    indexes = dict.fromkeys(unit["source_index"] for unit in units)
    sources = sources_table([source(index, **source_changes) for index in indexes])
    write_plan_part(storage, units_table(units), sources, settings)


def write(storage: Storage, rows: list[dict]) -> None:
    WriteRecords(WriteRecordsConfig(run_uri=storage.uri, run_id="r"))(records_table(rows))


def owed(storage: Storage, again: Again | None = None) -> list[dict]:
    tables = owed_units(PlanReader(storage), Ledger(storage).committed_records(), again)
    return [row for table in tables for row in as_units(table).to_pylist()]


def test_a_plan_comes_back_in_source_order_whatever_the_order_of_its_parts(storage: Storage) -> None:
    plan(storage, [document_unit(5, [1]), video_unit(3, [0, 1])])
    plan(storage, [document_unit(0, [11, 12]), document_unit(0, [1, 2]), failed_unit(4)])
    rows = [row for table in read_plan(storage) for row in table.to_pylist()]
    assert [row["source_index"] for row in rows] == [0, 0, 3, 4, 5]
    assert [row["page_numbers"] for row in rows[:2]] == [[1, 2], [11, 12]]
    assert next(read_plan(storage)).schema.equals(UNIT)


def test_a_password_is_never_written(storage: Storage, tmp_path: Path) -> None:
    units = units_table([document_unit(0, [1], password="hunter2")])
    write_plan_part(storage, units, sources_table([source(0, password="hunter2")]), "s")
    assert all(b"hunter2" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    [table] = PlanReader(storage)
    assert as_units(table, {0: "hunter2"})["password"].to_pylist() == ["hunter2"]


def test_a_source_without_a_unit_is_a_contract_error(storage: Storage) -> None:
    with pytest.raises(ContractError, match="not probed"):
        write_plan_part(storage, units_table([document_unit(0, [1])]), sources_table([source(0), source(1)]), "s")


def test_a_missing_column_is_a_contract_error(storage: Storage) -> None:
    units = units_table([document_unit(0, [1])]).drop_columns(["record_keys"])
    with pytest.raises(ContractError, match="record_keys"):
        write_plan_part(storage, units, sources_table([source(0)]), "s")


def test_only_owed_pages_and_segments_stay_in_a_unit(storage: Storage) -> None:
    document, video = document_unit(0, [1, 2, 3]), video_unit(1, [0, 1, 2])
    plan(storage, [document, video, failed_unit(2), document_unit(3, [1])])
    write(storage, [records_of(document)[1], records_of(video)[0], *records_of(document_unit(3, [1]))])
    first, second = owed(storage)
    assert first["page_numbers"] == [1, 3]
    assert first["segments"] is None
    assert first["record_keys"] == [document["record_keys"][0], document["record_keys"][2]]
    assert [segment["segment_index"] for segment in second["segments"]] == [1, 2]
    assert second["page_numbers"] is None
    assert second["record_keys"] == video["record_keys"][1:]


def test_a_finished_plan_owes_nothing(storage: Storage) -> None:
    plan(storage, [document_unit(0, [1, 2])])
    write(storage, records_of(document_unit(0, [1, 2])))
    assert owed(storage) == []


def test_a_page_of_two_equal_files_is_owed_once(storage: Storage) -> None:
    plan(storage, [document_unit(0, [1, 2], doc="same"), document_unit(1, [1, 2, 3], doc="same")])
    assert [row["page_numbers"] for row in owed(storage)] == [[1, 2], [3]]
    assert count_plan(read_plan(storage)).records == 3


def test_a_later_pass_owes_failed_records_again(storage: Storage) -> None:
    unit = document_unit(0, [1, 2])
    plan(storage, [unit])
    good, bad = records_of(unit)
    bad |= {"status": None, "error": failed_unit(0)["error"]}
    write(storage, [good, bad])
    assert owed(storage) == []
    [again] = owed(storage, Again())
    assert again["page_numbers"] == [2]


def test_lists_that_are_not_parallel_are_a_contract_error(storage: Storage) -> None:
    plan(storage, [document_unit(0, [1, 2]) | {"page_numbers": [1]}])
    with pytest.raises(ContractError, match="not parallel"):
        owed(storage)


def test_counts_of_a_plan(storage: Storage) -> None:
    plan(storage, [document_unit(0, [1, 2]), document_unit(0, [3]), video_unit(1, [0]), failed_unit(2)])
    counts = count_plan(read_plan(storage))
    assert (counts.sources, counts.failed_sources, counts.units, counts.records) == (3, 1, 4, 4)
    assert counts.records_by_kind == {"pdf": 3, "video": 1}


def test_an_unchanged_source_is_not_probed_again(storage: Storage) -> None:
    listed = sources_table([source(0), source(1)])
    assert ListingCache(storage, "s").to_probe(listed).num_rows == 2
    write_plan_part(storage, units_table([document_unit(0, [1])]), listed.slice(0, 1), "s")
    assert ListingCache(storage, "s").to_probe(listed)["source_index"].to_pylist() == [1]


@pytest.mark.parametrize("change", [{"size_bytes": 7}, {"version_tag": "v2"}])
def test_a_changed_source_is_planned_again_in_its_old_place(storage: Storage, change: dict) -> None:
    plan(storage, [document_unit(0, [1]), document_unit(1, [1])])
    fresh = ListingCache(storage, "s").to_probe(sources_table([source(0, source_uri="/new"), source(1) | change]))
    assert fresh["source_uri"].to_pylist() == ["/new", "/in/1.pdf"]
    assert fresh["source_index"].to_pylist() == [2, 1]
    write_plan_part(storage, units_table([document_unit(2, [1]), document_unit(1, [1, 2], doc="changed")]), fresh, "s")
    rows = [row for table in read_plan(storage) for row in table.to_pylist()]
    assert [(row["source_index"], row["page_numbers"]) for row in rows] == [(0, [1]), (1, [1, 2]), (2, [1])]


def test_other_settings_plan_every_source_again(storage: Storage) -> None:
    plan(storage, [document_unit(0, [1])], settings="old")
    fresh = ListingCache(storage, "new").to_probe(sources_table([source(0)]))
    assert fresh["source_index"].to_pylist() == [0]


def test_the_same_file_with_other_pages_is_another_source(storage: Storage) -> None:
    listed = sources_table([source(0), source(1, source_uri="/in/0.pdf", size_bytes=100, page_ranges="1-2"), source(0)])
    assert ListingCache(storage, "s").to_probe(listed)["source_index"].to_pylist() == [0, 1]


def test_a_source_whose_failure_may_pass_is_probed_again_and_a_damaged_one_is_not(storage: Storage) -> None:
    plan(storage, [failed_unit(0, "unreadable", retryable=True), failed_unit(1, "damaged")])
    fresh = ListingCache(storage, "s").to_probe(sources_table([source(0), source(1)]))
    assert fresh["source_index"].to_pylist() == [0]


def test_passwords_are_found_again_by_their_place_in_the_plan(storage: Storage) -> None:
    plan(storage, [document_unit(0, [1]), document_unit(1, [1])])
    cache = ListingCache(storage, "s")
    listed = sources_table([source(1) | {"source_index": 0, "password": "x"}, source(0) | {"source_index": 1}])
    assert cache.to_probe(listed).num_rows == 0
    assert cache.passwords(listed) == {1: "x"}


def test_a_plan_read_with_small_batches_loses_nothing(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.plan.SOURCES_AT_ONCE", 3)
    for start in range(0, 40, 4):
        plan(storage, [document_unit(index, [1]) for index in range(start, start + 4)])
    plan(storage, [document_unit(index, [1, 2]) for index in range(0, 40, 5)])
    assert len(storage.list(PLAN)) == 11
    rows = [row for table in read_plan(storage) for row in table.to_pylist()]
    assert [row["source_index"] for row in rows] == list(range(40))
    assert [len(row["page_numbers"]) for row in rows] == [2 if index % 5 == 0 else 1 for index in range(40)]


def test_an_empty_run_has_an_empty_plan(storage: Storage) -> None:
    assert list(read_plan(storage)) == []
    assert owed(storage) == []
    assert count_plan(read_plan(storage)).sources == 0
    assert ListingCache(storage, "s").to_probe(sources_table([])).num_rows == 0
    assert isinstance(PlanReader(storage), PlanReader)
    assert pa.concat_tables([sources_table([])]).num_rows == 0


def test_seventy_thousand_sources_are_known_by_name_with_the_version_put_last() -> None:
    known = SourceIndex()
    # Names and versions that end in zero bytes are the ones a careless byte string would cut.
    names = [number.to_bytes(8, "big") + bytes(8) for number in range(1, 70_001)]
    for index, name in enumerate(names):
        known.put(name, index, name[::-1])
    known.put(names[3], 3, b"v" * 15 + b"\0")
    assert len(known) == 70_000
    assert known.get(names[3]) == (3, b"v" * 15 + b"\0")
    assert known.get(names[69_999]) == (69_999, names[69_999][::-1])
    assert known.get(b"z" * 16) is None


def test_new_sources_never_take_an_index_that_another_has(storage: Storage) -> None:
    plan(storage, [document_unit(0, [1]), document_unit(3, [1])])
    listed = [source(index, source_uri=f"/new/{index}") for index in range(6)]
    cache = ListingCache(storage, "s")
    taken = [*cache.to_probe(sources_table(listed[:3]))["source_index"].to_pylist()]
    taken += cache.to_probe(sources_table(listed[3:]))["source_index"].to_pylist()
    assert taken == [4, 1, 2, 5, 6, 7]


SIGNED = "https://user:pw-pw@host/get?id=7&X-Amz-Date=1&X-Amz-Signature=hush"


def test_secrets_of_an_address_are_never_written_and_come_back_from_the_listing(
    storage: Storage, tmp_path: Path
) -> None:
    failed = failed_unit(1, "forbidden")
    failed["error"] |= {"message": f"{SIGNED}2: status 403"}
    units = units_table([document_unit(0, [1], source_uri=SIGNED), failed | {"source_uri": f"{SIGNED}2"}])
    listed = sources_table([source(0, source_uri=SIGNED), source(1, source_uri=f"{SIGNED}2", page_ranges="2")])
    write_plan_part(storage, units, listed, "s")
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not any(secret in data for secret in (b"hush", b"pw-pw", b"user") for data in written)
    [table] = PlanReader(storage)
    [kept, _] = table["source_uri"].to_pylist()
    assert kept.startswith("https://host/get#q=")
    assert as_units(table)["source_uri"].to_pylist()[0] == kept
    cache = ListingCache(storage, "s")
    again = sources_table([source(0, source_uri=SIGNED.replace("hush", "new")), source(5)])
    assert cache.to_probe(again)["source_index"].to_pylist() == [5]
    addresses = cache.addresses(again)
    assert addresses == {0: SIGNED.replace("hush", "new")}
    assert as_units(table, None, addresses)["source_uri"].to_pylist()[0] == SIGNED.replace("hush", "new")


def test_two_queries_of_one_path_are_two_sources(storage: Storage) -> None:
    listed = sources_table([source(index, source_uri=f"https://host/get?id={index}") for index in range(2)])
    assert ListingCache(storage, "s").to_probe(listed).num_rows == 2


def test_an_encrypted_source_is_probed_again_once_there_is_a_password(storage: Storage) -> None:
    plan(storage, [failed_unit(0, "encrypted"), failed_unit(1, "damaged")])
    without, given = [source(0), source(1)], [source(0, password="p"), source(1, password="p")]
    assert ListingCache(storage, "s").to_probe(sources_table(without)).num_rows == 0
    cache = ListingCache(storage, "s")
    fresh = cache.to_probe(sources_table([*given, *given]))
    assert fresh["source_index"].to_pylist() == [0]
    assert cache.passwords(sources_table(given)) == {0: "p", 1: "p"}
    write_plan_part(storage, units_table([document_unit(0, [1])]), fresh, "s")
    assert ListingCache(storage, "s").to_probe(sources_table(given)).num_rows == 0


def test_failed_sources_are_probed_again_when_asked_for(storage: Storage) -> None:
    plan(storage, [failed_unit(0, "damaged"), document_unit(1, [1]), failed_unit(2, "encrypted")])
    listed = sources_table([source(index) for index in range(3)])
    cache = ListingCache(storage, "s", retry_failed=True)
    assert cache.to_probe(listed)["source_index"].to_pylist() == [0, 2]
    assert cache.to_probe(listed).num_rows == 0


def test_a_remote_source_without_a_version_tag_is_never_taken_for_planned(storage: Storage) -> None:
    uris = ["https://host/a.pdf", "s3://bucket/b.pdf", "/in/c.pdf"]
    tags = ["", "v1", ""]
    rows = [
        source(place, source_uri=uri, version_tag=tag) for place, (uri, tag) in enumerate(zip(uris, tags, strict=True))
    ]
    units = [document_unit(place, [1], source_uri=uri) for place, uri in enumerate(uris)]
    write_plan_part(storage, units_table(units), sources_table(rows), "s")
    cache = ListingCache(storage, "s")
    assert cache.to_probe(sources_table([*rows, *rows]))["source_index"].to_pylist() == [0]


@pytest.mark.parametrize(
    ("least_units", "least_records", "sizes"),
    [(1, 0, [1, 1, 1, 1, 1]), (1, 4, [2, 1, 2]), (2, 0, [2, 2, 1]), (9, 99, [5])],
)
def test_small_sources_go_together_and_no_unit_is_cut(least_units, least_records, sizes) -> None:
    units = units_table(
        [document_unit(index, list(range(1, 1 + count))) for index, count in enumerate((1, 3, 5, 1, 1))]
    )
    blocks = list(unit_blocks(units, least_units, least_records))
    assert [block.num_rows for block in blocks] == sizes
    assert pa.concat_tables(blocks).equals(units)
    assert list(unit_blocks(units.slice(0, 0), least_units, least_records)) == []
