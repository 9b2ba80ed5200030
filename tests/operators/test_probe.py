"""Sources to units."""

import hashlib

import pymupdf
import pytest
from PIL import Image

from operators.base import rows_to_table
from operators.probe import ProbeConfig, ProbeSources, owed_pages, owed_segments, parse_page_ranges, segment_step
from schemas.errors import ConfigError, ContractError, DecodeError, FetchError, error_struct
from schemas.ids import record_key
from schemas.source import SOURCE, UNIT


def config(**options):
    return ProbeConfig(**({"task": "ocr", "page_settings": "P", "segment_settings": "S"} | options))


@pytest.fixture
def probe():
    """Return the units of sources, probed with the given options."""
    opened = []

    def run(*sources, **options):
        operator = ProbeSources(config(**options))
        opened.append(operator)
        return operator(rows_to_table(list(sources), SOURCE)).to_pylist()

    yield run
    for operator in opened:
        operator.close()


def source_of(path, **columns):
    return {"source_index": 3, "source_uri": str(path)} | columns


def pdf_of(path, page_count, **options):
    document = pymupdf.open()
    for number in range(1, page_count + 1):
        document.new_page().insert_text((72, 72), f"page {number}")
    document.set_metadata({"title": "A title"})
    document.save(path, **options)
    return path


def test_a_document_is_cut_into_units_of_ten_pages(probe, tmp_path):
    path = pdf_of(tmp_path / "a.pdf", 23)
    units = probe(source_of(path))
    assert [unit["page_numbers"] for unit in units] == [
        list(range(1, 11)), list(range(11, 21)), [21, 22, 23],
    ]  # fmt: skip
    doc_id = hashlib.sha256(path.read_bytes()).hexdigest()
    assert {unit["doc_id"] for unit in units} == {doc_id}
    assert units[2]["record_keys"][1] == record_key(doc_id, 22, {"settings": "P"})
    assert all(len(unit["record_keys"]) == len(unit["page_numbers"]) for unit in units)
    assert len({unit["unit_id"] for unit in units}) == 3
    first = units[0]
    assert (first["kind"], first["mime_type"], first["page_count"], first["title"]) == (
        "pdf", "application/pdf", 23, "A title",
    )  # fmt: skip
    assert (first["task"], first["source_index"], first["segments"], first["error"]) == ("ocr", 3, None, None)


def test_ids_and_keys_are_the_same_in_another_run_and_differ_with_the_settings(probe, tmp_path):
    path = pdf_of(tmp_path / "a.pdf", 2)
    [first], [again], [other] = (
        probe(source_of(path)), probe(source_of(path)), probe(source_of(path), page_settings="Q"),
    )  # fmt: skip
    assert (first["unit_id"], first["record_keys"]) == (again["unit_id"], again["record_keys"])
    assert first["unit_id"] != other["unit_id"]
    assert not set(first["record_keys"]) & set(other["record_keys"])


def test_the_same_bytes_elsewhere_owe_the_same_records(probe, tmp_path):
    path = pdf_of(tmp_path / "a.pdf", 2)
    copy = tmp_path / "b.pdf"
    copy.write_bytes(path.read_bytes())
    first, second = probe(source_of(path), source_of(copy))
    assert first["record_keys"] == second["record_keys"]
    assert first["unit_id"] != second["unit_id"]


def test_only_the_pages_asked_for_are_owed(probe, tmp_path):
    path = pdf_of(tmp_path / "a.pdf", 12)
    units = probe(source_of(path, page_ranges="11-,2,1-3,40"), unit_pages=3)
    assert [unit["page_numbers"] for unit in units] == [[1, 2, 3], [11, 12]]


@pytest.mark.parametrize(
    ("text", "count", "pages"),
    [
        (None, 3, [1, 2, 3]),
        (" ", 2, [1, 2]),
        ("2", 3, [2]),
        ("1-2, 2-3", 5, [1, 2, 3]),
        ("-2", 5, [1, 2]),
        ("4-", 5, [4, 5]),
        ("2-1000000000", 3, [2, 3]),
    ],
)
def test_page_ranges(text, count, pages):
    assert owed_pages(text, count) == pages


@pytest.mark.parametrize("text", ["a", "0", "3-1", "-", "1,,2", "1-2-3", "1.5", "-0"])
def test_page_ranges_that_cannot_be_read(text):
    with pytest.raises(ConfigError, match="pages"):
        parse_page_ranges(text)


def test_pages_beyond_the_end_are_an_error_when_none_remains(probe, tmp_path):
    path = pdf_of(tmp_path / "a.pdf", 2)
    units = probe(source_of(path, page_ranges="3-5"), source_of(path, page_ranges="x"))
    assert [unit["error"]["error_code"] for unit in units] == ["page_missing", "page_missing"]
    assert [unit["page_numbers"] for unit in units] == [None, None]


def test_failures_of_different_ranges_of_one_file_have_different_ids(probe, tmp_path):
    path = pdf_of(tmp_path / "a.pdf", 3)
    gone = tmp_path / "gone.mp4"
    sources = [
        source_of(path, page_ranges="9"), source_of(path, page_ranges="10"),
        source_of(gone, start_seconds=1.0), source_of(gone, stop_seconds=1.0), source_of(gone),
    ]  # fmt: skip
    units = probe(*sources)
    assert [unit["error"]["error_code"] for unit in units] == ["page_missing"] * 2 + ["not_found"] * 3
    assert len({unit["unit_id"] for unit in units}) == 5
    assert [unit["unit_id"] for unit in probe(*sources)] == [unit["unit_id"] for unit in units]


def test_passwords_are_used_and_travel_on(probe, tmp_path):
    path = pdf_of(tmp_path / "a.pdf", 1, encryption=pymupdf.PDF_ENCRYPT_AES_256, user_pw="secret", owner_pw="o")
    locked, opened = probe(source_of(path), source_of(path, password="secret"))
    assert locked["error"]["error_code"] == "encrypted"
    assert locked["error"]["error_category"] == "password_required"
    assert (opened["error"], opened["password"], opened["is_encrypted"]) == (None, "secret", True)


def test_an_image_is_a_document(probe, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg")
    frames = [Image.new("L", (8, 8))] * 3
    frames[0].save(tmp_path / "b.tif", save_all=True, append_images=frames[1:])
    picture, stack = probe(source_of(tmp_path / "a.jpg"), source_of(tmp_path / "b.tif"))
    assert (picture["kind"], picture["page_numbers"], picture["width_px"]) == ("image", [1], 30)
    assert stack["page_numbers"] == [1, 2, 3]


def test_what_cannot_be_done_is_one_unit_with_an_error(probe, tmp_path):
    (tmp_path / "empty.pdf").touch()
    (tmp_path / "page.pdf").write_bytes(b"<!DOCTYPE html><html></html>")
    (tmp_path / "clip.mp4").write_bytes(pdf_of(tmp_path / "a.pdf", 1).read_bytes())
    (tmp_path / "cut.pdf").write_bytes(b"%PDF-1.7 garbage")
    names = ["gone.pdf", "empty.pdf", "page.pdf", "clip.mp4", "cut.pdf"]
    units = probe(*(source_of(tmp_path / name) for name in names))
    assert [unit["error"]["error_code"] for unit in units] == ["not_found", "empty", "not_pdf", "not_video", "damaged"]
    assert [unit["kind"] for unit in units] == [None, None, None, None, "pdf"]
    assert [unit["doc_id"] is None for unit in units] == [True, False, False, False, False]
    assert all(unit["record_keys"] is unit["page_numbers"] is unit["segments"] is None for unit in units)
    assert all(unit["source_index"] == 3 and len(unit["unit_id"]) == 32 for unit in units)


def test_a_source_that_could_not_be_listed_passes_through(probe):
    failed = error_struct(FetchError("no such bucket", code="not_found", stage="list"), "list_sources")
    [unit] = probe(source_of("s3://gone/a.pdf", error=failed))
    assert unit["error"] == failed
    assert unit["record_keys"] is None


def test_an_empty_table_keeps_its_schema():
    table = ProbeSources(config())(SOURCE.empty_table())
    assert table.num_rows == 0
    assert table.schema == UNIT


def test_a_missing_column_is_a_contract_error():
    with pytest.raises(ContractError, match="page_ranges"):
        ProbeSources(config())(SOURCE.empty_table().drop_columns(["page_ranges"]))


def ranges(parts):
    return [(p.value["segment_index"], p.value["start_seconds"], p.value["stop_seconds"]) for p in parts]


@pytest.mark.parametrize(
    ("duration", "start", "stop", "expected"),
    [
        (65.0, None, None, [(0, 0, 30), (1, 30, 60), (2, 60, 65)]),
        (60.0, None, None, [(0, 0, 30), (1, 30, 60)]),
        (0.04, None, None, [(0, 0, 0.04)]),
        (0.0, None, None, [(0, 0, 0.001)]),
        (100.0, 45.0, 70.0, [(1, 45, 60), (2, 60, 70)]),
        (100.0, 95.0, 500.0, [(3, 95, 100)]),
    ],
)
def test_videos_are_cut_on_a_grid(duration, start, stop, expected):
    parts = owed_segments(duration, start, stop, 30.0, 20_000)
    assert ranges(parts) == expected
    assert [part.key for part in parts] == [(begin, end) for _, begin, end in expected]


def test_a_range_outside_the_video_is_an_error():
    for start, stop in ((100.0, None), (20.0, 10.0), (None, 0.0)):
        with pytest.raises(DecodeError) as caught:
            owed_segments(50.0, start, stop, 30.0, 20_000)
        assert caught.value.code == "no_frames"


def test_a_header_that_claims_years_is_too_long():
    assert len(owed_segments(360_000.0, None, None, 30.0, 20_000)) == 12_000
    with pytest.raises(DecodeError) as caught:
        owed_segments(1e9, None, None, 30.0, 20_000)
    assert caught.value.code == "too_long"


def test_a_video_is_cut_into_units_of_segments(probe, tmp_path):
    frames = [Image.new("RGB", (64, 48), (index, 0, 0)) for index in range(5)]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000)
    units = probe(source_of(path), segment_seconds=1.0, unit_segments=2)
    assert units[0]["error"] is None
    assert units[0]["kind"] == "video"
    indexes = [[segment["segment_index"] for segment in unit["segments"]] for unit in units]
    assert indexes[:2] == [[0, 1], [2, 3]]
    assert [len(unit["record_keys"]) for unit in units] == [len(unit["segments"]) for unit in units]
    assert all(unit["page_numbers"] is None for unit in units)
    assert units[0]["record_keys"][1] == record_key(units[0]["doc_id"], [1.0, 2.0], {"settings": "S"})


@pytest.mark.parametrize(
    ("duration", "frames", "step"),
    [
        (200.0, 4800, 30.0),
        (0.04, 1, 30.0),
        (360_000.0, 100, 60_000.0),
        (360_000.0, 1, 360_000.0),
        (36_000.0, 600, 990.0),
        (36_000.0, None, 30.0),
    ],
)
def test_a_sparse_video_has_longer_segments(duration, frames, step):
    assert segment_step(duration, frames, 30.0) == step
