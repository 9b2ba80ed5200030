"""From finished records to part files and a commit."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.commits import COMMITS
from pipeline.ledger import Ledger
from pipeline.rows import norm1000, repro_command, section_paths
from pipeline.sink import SUMMARY, UNREAD, WriteRecords, WriteRecordsConfig
from pipeline.storage import Storage
from schemas.errors import ContractError
from schemas.ids import page_id, segment_id
from tests.pipeline.made_rows import (
    document_unit,
    failure,
    loop_failure,
    records_of,
    records_table,
    video_unit,
)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def sink(storage: Storage, **options: Any) -> WriteRecords:
    return WriteRecords(WriteRecordsConfig(run_uri=storage.uri, run_id="run-1", **options))


def rows_of(storage: Storage, table_name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for commit in Ledger(storage).commits():
        for part in commit.parts:
            if part.table == table_name:
                with storage.open_input(part.path) as file:
                    rows += pq.read_table(file).to_pylist()
    return rows


def block(label: str, text: str = "x", **changes: Any) -> dict[str, Any]:
    return {"label": label, "label_raw": label, "text": text, "bbox": [61.2, 79.2, 306.0, 396.0]} | changes


def one_page(**changes: Any) -> dict[str, Any]:
    return records_of(document_unit(0, [7]))[0] | changes


def test_a_page_becomes_a_row_with_its_ids(storage: Storage) -> None:
    record = one_page(slice_grids=[{"rows": 2, "cols": 3}], thought="hm")
    sink(storage, downsample_mode="4x", max_slice_nums=9)(records_table([record]))
    [row] = rows_of(storage, "pages")
    assert row["page_id"] == page_id(record["doc_id"], 7)
    assert (row["run_id"], row["status"], row["text"]) == ("run-1", "success", record["text"])
    assert (row["slice_count"], row["downsample_mode"], row["max_slice_nums"]) == (6, "4x", 9)
    assert (row["ledger_hit"], row["thought"], row["block_count"]) == (False, "hm", None)
    assert row["created_at"] <= datetime.now(UTC)


@pytest.mark.parametrize(
    ("packing", "temporal_ids", "slice_count"),
    [("3d_resampler", [[0, 2, 4], [6]], 8), ("stack", [[0], [2, 4]], 4), ("none", [[0], [2]], 4)],
)
def test_a_segment_counts_the_slices_of_every_frame(storage, packing, temporal_ids, slice_count):
    grids = [{"rows": 1, "cols": 2}] * 2
    [record] = records_of(video_unit(0, [1]), slice_grids=grids, packing=packing, temporal_ids=temporal_ids)
    sink(storage, max_slice_nums=9, clip_max_slice_nums=2)(records_table([record]))
    [row] = rows_of(storage, "video_segments")
    assert (row["slice_count"], row["max_slice_nums"], row["packing"]) == (slice_count, 2, packing)


def test_a_summary_row_leaves_for_each_record(storage: Storage) -> None:
    records = [*records_of(document_unit(0, [1, 2])), *records_of(video_unit(1, [0]))]
    summary = sink(storage)(records_table(records))
    assert summary.schema.equals(SUMMARY)
    assert summary["record_key"].to_pylist() == [record["record_key"] for record in records]
    assert summary["kind"].to_pylist() == ["pdf", "pdf", "video"]
    assert summary["output_tokens"].to_pylist() == [5, 5, 5]
    [commit] = Ledger(storage).commits()
    assert commit.tokens["output_tokens"] == 15
    assert set(summary["part_id"].to_pylist()) == {commit.part_id}


def test_pixels_need_not_reach_the_sink(storage: Storage) -> None:
    table = records_table([one_page()]).drop_columns(list(UNREAD))
    assert sink(storage)(table).num_rows == 1


def test_a_caption_and_on_screen_text_go_to_their_own_columns(storage: Storage) -> None:
    caption = records_of(video_unit(0, [1]))[0] | {"text": "a dog", "frame_count_sampled": 4}
    reading = records_of(video_unit(1, [0]))[0] | {"text": "EXIT", "task": "ocr"}
    sink(storage)(records_table([caption, reading]))
    first, second = rows_of(storage, "video_segments")
    assert (first["caption"], first["ocr_text"], first["frame_count"]) == ("a dog", None, 4)
    assert (second["caption"], second["ocr_text"]) == (None, "EXIT")
    assert first["segment_id"] == segment_id(caption["doc_id"], 30.0, 60.0)
    assert (first["start_seconds"], first["stop_seconds"]) == (30.0, 60.0)


def test_a_failed_row_has_no_text_and_one_error_row(storage: Storage) -> None:
    record = one_page(status=None, error=failure("render"), text="half a pa")
    sink(storage)(records_table([record]))
    [row], [error] = rows_of(storage, "pages"), rows_of(storage, "errors")
    assert (row["status"], row["text"], row["raw_output"]) == ("failure", None, "half a pa")
    assert (error["error_code"], error["error_category"], error["recovered"]) == ("render", "backend_failure", False)
    assert (error["page_id"], error["record_key"]) == (row["page_id"], row["record_key"])
    assert error["repro_command"] == "pagereel ocr /in/0.pdf --pages 7 -o repro"


def test_a_survived_failure_is_an_error_row_that_says_so(storage: Storage) -> None:
    record = one_page(status="fallback", recovered=[loop_failure(), failure("crash")])
    sink(storage)(records_table([record]))
    errors = rows_of(storage, "errors")
    assert [error["error_code"] for error in errors] == ["repetition", "crash"]
    assert all(error["recovered"] for error in errors)
    assert rows_of(storage, "pages")[0]["text"] == record["text"]


def test_error_ids_are_the_same_in_another_attempt(storage: Storage) -> None:
    record = one_page(status=None, error=failure(), recovered=[loop_failure()])
    for _ in range(2):
        sink(storage)(records_table([record]))
    ids = [error["error_id"] for error in rows_of(storage, "errors")]
    assert ids[:2] == ids[2:]
    assert ids[0] != ids[1]


def test_a_failed_segment_belongs_to_its_video(storage: Storage) -> None:
    record = records_of(video_unit(0, [2]))[0] | {"status": None, "error": failure("codec")}
    sink(storage)(records_table([record]))
    [error], [row] = rows_of(storage, "errors"), rows_of(storage, "video_segments")
    assert (error["video_id"], error["doc_id"], error["segment_id"]) == (record["doc_id"], None, row["segment_id"])
    assert row["failure_reason"] == "codec"


def test_blocks_get_ids_places_and_headings(storage: Storage) -> None:
    blocks = [
        block("page_header", "running head"),
        block("title", "T"),
        block("section_header", "A", level=1),
        block("text", "a"),
        block("section_header", "A.1", level=2),
        block("list_item", "i", parent=3),
        block("section_header", "B", level=1, bbox=None),
        block("text", "b", bbox=[-50.0, 0.0, 700.0, 792.0]),
    ]
    sink(storage)(records_table([one_page(task="parse", blocks=blocks, parse_status="ok")]))
    rows = rows_of(storage, "blocks")
    names = {row["block_id"]: row["text"] for row in rows}
    paths = [row["section_path"] and [names[own] for own in row["section_path"]] for row in rows]
    assert paths == [None, [], ["T"], ["T", "A"], ["T", "A"], ["T", "A", "A.1"], ["T"], ["T", "B"]]
    assert [row["reading_order"] for row in rows] == list(range(8))
    assert rows[0]["is_furniture"]
    assert not rows[1]["is_furniture"]
    assert rows[5]["parent_id"] == rows[3]["block_id"]
    assert rows[1]["bbox_norm1000"] == [100, 100, 500, 500]
    assert rows[6]["bbox_norm1000"] is None
    assert rows[7]["bbox_norm1000"] == [0, 0, 1000, 1000]
    [page] = rows_of(storage, "pages")
    assert (page["block_count"], page["blocks_out_of_page_count"], page["parse_status"]) == (8, 1, "ok")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": None}, "neither a status nor an error"),
        ({"status": "truncated"}, "no failure is recorded"),
        ({"status": "fallback", "recovered": []}, "no failure is recorded"),
        ({"status": "done"}, "'done'"),
        ({"page_number": None}, "no place"),
        ({"route": "guess"}, "pages.route is 'guess'"),
        ({"blocks": [block("paragraph")]}, "blocks.label is 'paragraph'"),
        ({"blocks": [block("text", parent=4)]}, "parent 4"),
        ({"record_key": None}, "no key"),
    ],
)
def test_a_record_that_breaks_the_contract_stops_the_call_before_anything_counts(
    storage: Storage, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ContractError, match=message):
        sink(storage)(records_table([one_page(), records_of(document_unit(0, [8]))[0] | changes]))
    assert storage.list(COMMITS) == []


def test_a_looping_answer_keeps_its_status_and_loses_its_text(storage: Storage) -> None:
    record = one_page(status="repetition", error=loop_failure(), text="la la la")
    sink(storage)(records_table([record]))
    [row] = rows_of(storage, "pages")
    assert (row["status"], row["text"], row["raw_output"]) == ("repetition", None, "la la la")


def test_a_record_that_comes_twice_in_one_call_is_written_once(storage: Storage) -> None:
    summary = sink(storage)(records_table([one_page(text="first"), one_page(text="second")]))
    assert summary.num_rows == 2
    assert [row["text"] for row in rows_of(storage, "pages")] == ["first"]


def test_an_empty_batch_keeps_its_schema_and_commits_nothing(storage: Storage) -> None:
    result = sink(storage)(records_table([]))
    assert result.schema.equals(SUMMARY)
    assert storage.list() == []


def test_a_missing_column_is_a_contract_error(storage: Storage) -> None:
    with pytest.raises(ContractError, match="'status' is missing"):
        sink(storage)(records_table([one_page()]).drop_columns(["status"]))


def test_a_row_whose_answer_was_given_before_is_marked(storage: Storage) -> None:
    sink(storage)(records_table([one_page(ledger_hit=True)]))
    assert rows_of(storage, "pages")[0]["ledger_hit"]
    assert next(iter(Ledger(storage).commits())).ledger_hits == 1


def test_boxes_in_thousandths_are_clamped_and_never_invented() -> None:
    assert norm1000([0.0, 0.0, 612.0, 396.0], 612.0, 792.0) == [0, 0, 1000, 500]
    assert norm1000([-9.0, 5.0, 9999.0, 1e9], 612.0, 792.0) == [0, 6, 1000, 1000]
    assert norm1000(None, 612.0, 792.0) is None
    assert norm1000([0.0, 0.0, 1.0, 1.0], None, None) is None
    assert norm1000([0.0, float("nan"), 1.0, 1.0], 10.0, 10.0) is None


def test_a_hostile_file_name_stays_one_word_of_the_repro_command() -> None:
    command = repro_command("pagereel ocr {source} {part} -o repro", "/in/$(rm -rf x) {a}'b.pdf", 3)
    assert command == """pagereel ocr '/in/$(rm -rf x) {a}'"'"'b.pdf' --pages 3 -o repro"""


def test_a_page_without_headings_has_empty_paths() -> None:
    assert section_paths([{"label": "text", "level": None}], ["p/b0000"]) == [[]]


def test_no_table_holds_a_secret_of_an_address(storage: Storage, tmp_path: Path) -> None:
    address = "https://user:pw-pw@host/a.pdf?token=hush"
    told = {"message": f"{address}: broke", "traceback": f"in {address}"}
    records = [
        one_page(source_uri=address, recovered=[failure() | told]),
        one_page(source_uri=address, status=None, error=failure() | told, record_key="other"),
        *records_of(video_unit(1, [0], source_uri=address)),
    ]
    sink(storage)(records_table(records))
    for name, count in (("pages", 2), ("video_segments", 1), ("errors", 2)):
        assert [row["source_uri"] for row in rows_of(storage, name)] == ["https://host/a.pdf"] * count
    assert all("https://host/a.pdf" in row["repro_command"] for row in rows_of(storage, "errors"))
    tables = [row for name in ("pages", "blocks", "video_segments", "errors") for row in rows_of(storage, name)]
    commits = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert not any(secret in f"{tables} {commits}" for secret in ("hush", "pw-pw"))
