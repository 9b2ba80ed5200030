"""Publication: plain tables, sorted, each record once."""

import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.plan import write_plan_part
from pipeline.publish import MANIFEST, publish, read_manifest, read_run_rows, write_run_row
from pipeline.sink import WriteRecords, WriteRecordsConfig
from pipeline.storage import Storage
from pipeline.table_writer import TableWriter
from schemas.errors import ConfigError
from schemas.tables import DOCUMENTS, PAGES, TABLES
from tests.pipeline.made_rows import (
    document_unit,
    failed_unit,
    failure,
    loop_failure,
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


def plan(storage: Storage, units: list[dict[str, Any]]) -> None:
    indexes = dict.fromkeys(unit["source_index"] for unit in units)
    write_plan_part(storage, units_table(units), sources_table([source(index) for index in indexes]), "s", run_id="r")


def write(storage: Storage, rows: list[dict[str, Any]], **options: Any) -> None:
    WriteRecords(WriteRecordsConfig(run_uri=storage.uri, run_id="r", **options))(records_table(rows))


def read(storage: Storage, table_name: str) -> list[dict[str, Any]]:
    """Read as a stranger would: every Parquet file of the folder."""
    return pq.read_table(storage.path(table_name)).to_pylist()


def test_rows_come_out_in_page_order_once_each_however_they_were_committed(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.publish.RECORDS_AT_ONCE", 4)
    units = [document_unit(index, list(range(1, 1 + index))) for index in range(1, 8)]
    plan(storage, units)
    records = [record for unit in units for record in records_of(unit)]
    for record in records:
        record["blocks"] = [{"label": "text", "text": f"{place}"} for place in range(3)]
    shuffled = records * 2
    random.Random(0).shuffle(shuffled)
    for start in range(0, len(shuffled), 5):
        write(storage, shuffled[start : start + 5])
    publish(storage, "r")
    pages, blocks = read(storage, "pages"), read(storage, "blocks")
    assert [page["record_key"] for page in pages] == [record["record_key"] for record in records]
    expected = [(record["record_key"], order) for record in records for order in range(3)]
    assert [(row["record_key"], row["reading_order"]) for row in blocks] == expected


def test_the_first_commit_of_a_record_is_published(storage: Storage) -> None:
    unit = document_unit(0, [1])
    plan(storage, [unit])
    write(storage, records_of(unit, text="first"))
    write(storage, records_of(unit, text="second", status="fallback", recovered=[loop_failure()]))
    publish(storage, "r")
    assert [page["text"] for page in read(storage, "pages")] == ["first"]
    assert read(storage, "errors") == []


def test_a_second_pass_is_published_in_place_of_the_first(storage: Storage) -> None:
    unit = document_unit(0, [1])
    plan(storage, [unit])
    write(storage, records_of(unit, status=None, error=failure()))
    publish(storage, "r")
    write(storage, records_of(unit, text="at last"), pass_index=1)
    publish(storage, "r")
    [page] = read(storage, "pages")
    assert (page["status"], page["text"]) == ("success", "at last")
    assert read(storage, "documents")[0]["success_count"] == 1


def test_documents_add_up(storage: Storage) -> None:
    mixed, video = document_unit(0, [1, 2, 3, 4], title="A"), video_unit(1, [0, 1])
    plan(storage, [mixed, video, failed_unit(2), document_unit(3, [1]), document_unit(4, [1, 2])])
    good, blank, rescued, bad = records_of(mixed)
    write(
        storage,
        [
            good,
            blank | {"status": "blank", "route": "text_layer"},
            rescued | {"status": "fallback", "recovered": [loop_failure()]},
            bad | {"status": None, "error": failure()},
            *records_of(video),
            records_of(document_unit(4, [1, 2]))[0],
            *records_of(document_unit(3, [1]), status="skipped", route=None),
        ],
    )
    manifest = publish(storage, "r")
    assert manifest.owed_records == 1
    rows = read(storage, "documents")
    first, second, failed, skipped, unfinished = rows
    counts = ("success_count", "partial_count", "fallback_count", "failed_count", "skipped_count", "owed_count")
    assert [first[name] for name in counts] == [2, 0, 1, 1, 0, 0]
    assert (first["status"], first["route"], first["pages_requested"]) == ("partial_success", "mixed", 4)
    assert (first["title"], first["size_bytes"]) == ("A", 100)
    assert (second["status"], second["segment_count"], second["codec"]) == ("success", 2, "h264")
    assert second["pages_requested"] is None
    assert (failed["status"], failed["doc_id"], failed["pages_requested"]) == ("failure", None, 0)
    assert (skipped["status"], skipped["route"]) == ("skipped", None)
    assert (unfinished["status"], unfinished["owed_count"]) == (None, 1)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["success", "blank", "skipped"], "success"),
        (["blank", "blank"], "blank"),
        (["skipped"], "skipped"),
        (["failure", "truncated", "repetition"], "failure"),
        (["success", "failure"], "partial_success"),
        (["fallback", "fallback"], "fallback"),
        (["success", "fallback"], "partial_success"),
        (["success", None], None),
        ([], "skipped"),
    ],
)
def test_the_status_of_a_document_follows_from_its_pages(
    storage: Storage, statuses: list[str | None], expected: str | None
) -> None:
    unit = document_unit(0, list(range(1, 1 + len(statuses))))
    plan(storage, [unit])
    records = [
        record | {"status": status, "recovered": [loop_failure()]}
        for record, status in zip(records_of(unit), statuses, strict=True)
        if status is not None
    ]
    write(storage, records)
    publish(storage, "r")
    assert [row["status"] for row in read(storage, "documents")] == [expected]


def test_a_file_that_cannot_be_opened_has_one_error_row_and_no_page(storage: Storage) -> None:
    plan(storage, [failed_unit(0), document_unit(1, [1])])
    write(storage, records_of(document_unit(1, [1]), status=None, error=failure("render")))
    publish(storage, "r")
    first, second = read(storage, "errors")
    assert (first["error_code"], first["record_key"], first["doc_id"]) == ("encrypted", None, None)
    assert first["repro_command"] == "pagereel ocr /in/0.pdf -o repro"
    assert second["error_code"] == "render"
    assert len(read(storage, "pages")) == 1


def test_facts_of_the_video_are_in_each_segment(storage: Storage) -> None:
    plan(storage, [document_unit(0, [1]), video_unit(1, [0, 1])])
    write(storage, records_of(video_unit(1, [0, 1])))
    publish(storage, "r")
    for row in read(storage, "video_segments"):
        assert (row["video_duration_seconds"], row["video_width_px"], row["video_codec"]) == (300.0, 640, "h264")


def test_equal_files_share_their_pages_and_each_has_a_document(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.publish.RECORDS_AT_ONCE", 1)
    plan(storage, [document_unit(0, [1], doc="same"), document_unit(1, [1, 2], doc="same")])
    write(storage, records_of(document_unit(0, [1, 2], doc="same")))
    publish(storage, "r")
    assert [page["page_number"] for page in read(storage, "pages")] == [1, 2]
    assert [row["success_count"] for row in read(storage, "documents")] == [1, 2]


def test_rows_of_an_earlier_plan_are_kept_in_the_ledger_but_not_published(storage: Storage) -> None:
    plan(storage, [document_unit(0, [1])])
    write(storage, records_of(document_unit(0, [1])))
    plan(storage, [document_unit(0, [1], doc="changed")])
    publish(storage, "r")
    assert read(storage, "pages") == []
    write(storage, records_of(document_unit(0, [1], doc="changed")))
    publish(storage, "r")
    assert len(read(storage, "pages")) == 1


def test_nothing_is_written_when_nothing_changed(storage: Storage) -> None:
    plan(storage, [document_unit(0, [1])])
    write(storage, records_of(document_unit(0, [1])))
    write_run_row(storage, {"run_id": "r", "record_count": 1})
    first = publish(storage, "r")
    assert publish(storage, "r") == first
    write_run_row(storage, {"run_id": "later", "record_count": 0})
    second = publish(storage, "later")
    assert second.tables["pages"] == first.tables["pages"]
    assert [row["run_id"] for row in read(storage, "runs")] == ["later", "r"]
    assert second.paths() == {name for table in TABLES for name in storage.list(table)}


def test_run_rows_come_back_with_their_times(storage: Storage) -> None:
    started = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
    write_run_row(storage, {"run_id": "b", "started_at": started, "pages_per_second_warm": 1.5})
    write_run_row(storage, {"run_id": "a", "started_at": datetime(2026, 1, 1, tzinfo=UTC)})
    rows = read_run_rows(storage).to_pylist()
    assert [row["run_id"] for row in rows] == ["a", "b"]
    assert rows[1]["started_at"] == started


def test_files_of_a_publication_that_was_killed_are_cleared(storage: Storage) -> None:
    plan(storage, [document_unit(0, [1])])
    write(storage, records_of(document_unit(0, [1])))
    publish(storage, "r")
    storage.put("pages/pages-g0002-00000-half.parquet", b"half a publication")
    manifest = publish(storage, "r")
    assert storage.list("pages") == [file.path for file in manifest.tables["pages"]]


def test_an_empty_run_is_published_with_all_columns(storage: Storage) -> None:
    publish(storage, "r")
    for name, schema in TABLES.items():
        found = pq.read_schema(storage.path(storage.list(name)[0]))
        assert found.equals(schema)
        assert found.metadata == schema.metadata
    assert duckdb.sql(f"select count(*) from '{storage.path('pages')}/*.parquet'").fetchall() == [(0,)]


def test_text_is_assembled_with_its_page_spans(storage: Storage) -> None:
    unit = document_unit(0, [1, 2])
    plan(storage, [unit])
    first, second = records_of(unit)
    write(storage, [second | {"text": "zweite"}, first | {"text": "erste"}])
    publish(storage, "r", assemble_text=True)
    [row] = read(storage, "documents")
    assert row["text"] == "erste\n\nzweite"
    assert [row["text"][span["start"] : span["end"]] for span in row["page_spans"]] == ["erste", "zweite"]


def test_large_tables_are_cut_into_files_and_row_groups(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.table_writer.ROW_GROUP_ROWS", 100)
    monkeypatch.setattr("pipeline.table_writer.FILE_ROWS", 250)
    writer = TableWriter(storage, "pages", 3, "t")
    rows = [{"record_key": f"{place:04d}", "status": "success", "page_number": place} for place in range(930)]
    for start in range(0, 930, 70):
        writer.append(pa.Table.from_pylist(rows[start : start + 70], schema=PAGES))
    files = writer.close()
    assert sum(file.rows for file in files) == 930
    assert len(files) == 4
    metadata = pq.ParquetFile(storage.path(files[0].path)).metadata
    assert metadata.num_row_groups == 2
    place = metadata.schema.names.index("page_number")
    assert metadata.row_group(1).column(place).statistics.has_min_max
    assert pq.read_table(storage.path("pages"))["record_key"].to_pylist() == [row["record_key"] for row in rows]


def test_one_very_wide_row_is_a_row_group_of_its_own(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.table_writer.ROW_GROUP_BYTES", 1000)
    writer = TableWriter(storage, "documents", 1, "t")
    writer.append(pa.Table.from_pylist([{"text": "x" * 5000, "status": "success"}] * 3, schema=DOCUMENTS))
    [file] = writer.close()
    assert pq.ParquetFile(storage.path(file.path)).metadata.num_row_groups == 3


def test_the_manifest_is_absent_before_the_first_publication(storage: Storage) -> None:
    assert read_manifest(storage) is None
    publish(storage, "r")
    assert storage.exists(MANIFEST)


def test_published_files_that_are_gone_are_published_again(storage: Storage) -> None:
    unit = document_unit(0, [1, 2])
    plan(storage, [unit])
    write(storage, records_of(unit))
    first = publish(storage, "r")
    storage.delete(first.tables["pages"][0].path)
    second = publish(storage, "r")
    assert second.generation == first.generation + 1
    assert all(storage.exists(path) for path in second.paths())
    assert publish(storage, "r") == second


def test_a_driver_that_lost_the_run_publishes_nothing(storage: Storage) -> None:
    unit = document_unit(0, [1, 2])
    plan(storage, [unit])
    write(storage, records_of(unit))

    def lost() -> None:
        raise ConfigError("taken over")

    with pytest.raises(ConfigError):
        publish(storage, "r", confirm=lost)
    assert read_manifest(storage) is None
    assert not [name for table in TABLES for name in storage.list(table)]
