"""Units of documents to pages."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pymupdf
import pytest
from PIL import Image

from operators.base import rows_to_table
from operators.decode.documents import DecodeDocuments, DecodeDocumentsConfig, choose_route, page_options
from operators.decode.pages import TextVerdict
from operators.decode.process import BoxLimits
from operators.fetch import sha256_of
from schemas.errors import ContractError, DecodeError, error_struct
from schemas.generation import DECODED
from schemas.source import UNIT

SENTENCE = "The quick brown fox jumps over the lazy dog near the quiet river bank. "


def config(**options):
    return DecodeDocumentsConfig(**({"read_route": "model", "correct_orientation": False} | options))


@pytest.fixture
def decode():
    """Return the rows of units, decoded with the given options."""
    opened = []

    def run(*units, **options):
        operator = DecodeDocuments(config(**options))
        opened.append(operator)
        return operator(rows_to_table(list(units), UNIT)).to_pylist()

    yield run
    for operator in opened:
        operator.close()


def unit_of(path, page_numbers, kind="pdf", **columns):
    keys = [f"key{number}" for number in page_numbers]
    return {
        "unit_id": "u",
        "source_index": 7,
        "source_uri": str(path),
        "task": "ocr",
        "doc_id": sha256_of(path) if Path(path).exists() else None,
        "kind": kind,
        "page_count": len(page_numbers),
        "page_numbers": list(page_numbers),
        "record_keys": keys,
    } | columns


def text_page(document, text):
    page = document.new_page()
    page.insert_textbox((50, 50, 545, 792), text)


@pytest.fixture
def mixed(tmp_path):
    """Text, a drawing, nothing, text."""
    document = pymupdf.open()
    text_page(document, "First. " + SENTENCE * 8)
    document.new_page().draw_circle((300, 400), 100, fill=(0, 0.5, 0))
    document.new_page()
    text_page(document, "Last. " + SENTENCE * 8)
    document.save(tmp_path / "mixed.pdf")
    return tmp_path / "mixed.pdf"


BOMB = b"""%%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[%s]/Count %d>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</XObject<</X 10 0 R>>>>/Contents 20 0 R>>endobj
4 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]>>endobj
%s
20 0 obj<</Length 5>>stream
/X Do
endstream endobj
trailer<</Root 1 0 R/Size 30>>
"""


def bomb(path, pages):
    """Write a PDF whose bomb pages ("x") call 10^10 forms, and whose others ("o") are empty."""
    kids = b" ".join(b"3 0 R" if page == "x" else b"4 0 R" for page in pages)
    level = (
        b"%d 0 obj<</Type/XObject/Subtype/Form/BBox[0 0 612 792]/Resources<</XObject<</X %d 0 R>>>>/Length 59>>stream\n"
    )
    forms = b"".join(
        level % (number, number + 1) + b"/X Do " * 9 + b"/X Do\nendstream endobj\n" for number in range(10, 19)
    )
    leaf = (
        b"19 0 obj<</Type/XObject/Subtype/Form/BBox[0 0 612 792]/Length 15>>stream\n0 0 1 1 re f   \nendstream endobj\n"
    )
    path.write_bytes(BOMB % (kids, len(pages), forms + leaf))
    return path


def test_each_owed_page_is_a_row_with_its_route(decode, mixed):
    rows = decode(unit_of(mixed, [1, 2, 3, 4]))
    assert [row["page_number"] for row in rows] == [1, 2, 3, 4]
    assert [row["record_key"] for row in rows] == ["key1", "key2", "key3", "key4"]
    assert [row["route"] for row in rows] == ["text_layer", "model", "none", "text_layer"]
    assert rows[2]["route_reason"] == "blank"
    assert [row["image"] is None for row in rows] == [True, False, True, True]
    drawing = rows[1]
    assert len(drawing["image"]) == drawing["image_height_px"] * drawing["image_width_px"] * 3
    assert drawing["dpi"] == pytest.approx(200)
    assert "First." in rows[0]["text_layer_text"]
    assert {row["unit_id"] for row in rows} == {"u"}
    assert {row["source_index"] for row in rows} == {7}
    assert {row["page_count"] for row in rows} == {4}
    assert all(row["error"] is None and row["recovered"] is None for row in rows)


def test_one_small_table_comes_for_each_page(mixed):
    operator = DecodeDocuments(config())
    tables = list(operator.run(rows_to_table([unit_of(mixed, [1, 2, 3, 4])], UNIT)))
    operator.close()
    assert [table.num_rows for table in tables if table.num_rows] == [1, 1, 1, 1]
    assert all(table.schema == DECODED for table in tables)


def test_a_unit_with_an_error_has_no_records(decode):
    failed = error_struct(DecodeError("no pages", code="no_pages"), "ProbeSources")
    unit = {"unit_id": "u", "source_uri": "a.pdf", "task": "ocr", "error": failed}
    assert decode(unit) == []


def test_an_empty_table_keeps_its_schema():
    table = DecodeDocuments(config())(UNIT.empty_table())
    assert table.num_rows == 0
    assert table.schema == DECODED


def test_a_missing_column_is_a_contract_error():
    with pytest.raises(ContractError, match="record_keys"):
        DecodeDocuments(config())(UNIT.empty_table().drop_columns(["record_keys"]))


def test_a_video_unit_is_a_contract_error(decode):
    with pytest.raises(ContractError, match="video"):
        decode(unit_of("a.mp4", [1], kind="video"))


def test_a_source_that_is_gone_is_an_error_for_each_page(decode, tmp_path):
    rows = decode(unit_of(tmp_path / "gone.pdf", [3, 4]))
    assert [row["error"]["error_code"] for row in rows] == ["not_found", "not_found"]
    assert [row["page_number"] for row in rows] == [3, 4]
    assert [row["error"]["stage"] for row in rows] == ["fetch", "fetch"]


def test_a_source_that_changed_since_it_was_planned_is_an_error_for_each_page(decode, mixed):
    rows = decode(unit_of(mixed, [1, 2], doc_id="0" * 64))
    assert [row["error"]["error_code"] for row in rows] == ["unreadable", "unreadable"]
    assert "changed" in rows[0]["error"]["message"]


def test_a_document_that_cannot_be_opened_is_an_error_for_each_page(decode, tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.7 garbage")
    rows = decode(unit_of(tmp_path / "a.pdf", [1, 2]))
    assert [row["error"]["error_code"] for row in rows] == ["damaged", "damaged"]


def test_a_page_that_hangs_is_one_row_and_the_others_come(decode, tmp_path):
    path = bomb(tmp_path / "a.pdf", "oxo")
    rows = decode(unit_of(path, [1, 2, 3]), page_timeout_seconds=3.0)
    assert [row["error"] and row["error"]["error_code"] for row in rows] == [None, "time_limit", None]
    assert rows[1]["page_width_pt"] == 612
    assert [row["route"] for row in rows] == ["none", None, "none"]
    assert [row["record_key"] for row in rows] == ["key1", "key2", "key3"]


def test_after_three_deaths_the_rest_of_the_unit_is_not_tried(decode, tmp_path):
    path = bomb(tmp_path / "a.pdf", "xoxxoo")
    rows = decode(unit_of(path, range(1, 7)), page_timeout_seconds=3.0)
    assert [row["error"] and row["error"]["error_code"] for row in rows] == [
        "time_limit", None, "time_limit", "time_limit", "time_limit", "time_limit",
    ]  # fmt: skip
    assert "not tried" in rows[4]["error"]["message"]
    assert "not tried" not in rows[3]["error"]["message"]


def test_a_page_that_was_planned_and_is_missing_is_one_row(decode, mixed):
    rows = decode(unit_of(mixed, [4, 5]))
    assert [row["error"] and row["error"]["error_code"] for row in rows] == [None, "page_missing"]


def test_a_decoder_without_memory_is_a_capacity_error(decode, tmp_path):
    Image.new("RGB", (9000, 9000)).save(tmp_path / "a.png", compress_level=1)
    box = BoxLimits(address_space_bytes=600_000_000)
    [row] = decode(unit_of(tmp_path / "a.png", [1], kind="image"), box=box)
    assert row["error"]["error_code"] == "memory_limit"
    assert row["error"]["error_category"] == "capacity"
    assert row["page_width_pt"] == 9000


def test_an_image_is_a_page_to_be_read(decode, tmp_path):
    Image.new("RGB", (300, 200), "teal").save(tmp_path / "a.png")
    picture = Image.new("RGB", (300, 200), "white")
    picture.paste("black", (100, 50, 150, 150))
    picture.save(tmp_path / "b.png", dpi=(100, 100))
    blank, page = decode(
        unit_of(tmp_path / "a.png", [1], kind="image"),
        unit_of(tmp_path / "b.png", [1], kind="image"),
        read_route="cpu",
    )
    assert (blank["route"], blank["route_reason"]) == ("none", "blank")
    assert (page["route"], page["route_reason"]) == ("cpu", "image")
    assert page["page_width_pt"] == pytest.approx(216, rel=1e-3)
    assert np.array_equal(np.frombuffer(page["image"], np.uint8).reshape(200, 300, 3), np.asarray(picture))


def test_a_caption_always_has_pixels(decode, mixed):
    rows = decode(unit_of(mixed, [1, 3], task="caption"))
    assert [row["route"] for row in rows] == ["model", "model"]
    assert all(row["image"] for row in rows)


def test_text_layers_can_be_ignored_or_be_all_that_is_used(decode, mixed):
    rows = decode(unit_of(mixed, [1, 2, 3]), text_layer="ignore")
    assert [row["route"] for row in rows] == ["model", "model", "none"]
    assert "First." in rows[0]["text_layer_text"]
    rows = decode(unit_of(mixed, [1, 2, 3]), text_layer="only")
    assert [row["route"] for row in rows] == ["text_layer", "none", "none"]
    assert all(row["image"] is None for row in rows)
    assert rows[1]["route_reason"] != "blank"


def scan_turned(path, degrees):
    """Save a page of text as an image, turned counter-clockwise."""
    document = pymupdf.open()
    text_page(document, SENTENCE * 40)
    pixmap = document[0].get_pixmap(dpi=150)
    image = Image.frombytes("RGB", (pixmap.width, pixmap.height), pixmap.samples)
    image.rotate(degrees, expand=True, fillcolor="white").save(path, dpi=(150, 150))
    return image


@pytest.mark.parametrize(("degrees", "rotation"), [(0, 0), (90, 90), (180, 180)])
def test_a_scan_is_put_upright(decode, tmp_path, degrees, rotation):
    image = scan_turned(tmp_path / "a.png", degrees)
    [row] = decode(unit_of(tmp_path / "a.png", [1], kind="image"), correct_orientation=True)
    assert row["rotation"] == rotation
    assert abs(row["skew_degrees"]) < 0.5
    width, height = row["image_width_px"], row["image_height_px"]
    assert abs(width - image.width) < 20
    assert abs(height - image.height) < 20
    assert row["page_width_pt"] * 150 / 72 == pytest.approx(width, abs=2)
    assert row["page_height_pt"] * 150 / 72 == pytest.approx(height, abs=2)
    assert len(row["image"]) == width * height * 3


def test_large_pages_share_one_bounded_process(decode, tmp_path):
    document = pymupdf.open()
    for _ in range(20):
        document.new_page(width=4000, height=4000).draw_line((0, 0), (4000, 4000), width=20)
    document.save(tmp_path / "a.pdf")
    operator = DecodeDocuments(config(max_pixels=2_000_000))
    total = 0
    for table in operator.run(rows_to_table([unit_of(tmp_path / "a.pdf", range(1, 21))], UNIT)):
        total += table.num_rows
    assert total == 20
    assert operator.box.start_count == 1
    assert operator.box.peak_rss_bytes < 1_000_000_000
    operator.close()


TRUSTED = TextVerdict(True, True, "born digital", is_scan=False)
DOUBTED = TextVerdict(True, False, "garbled", is_scan=False)


@pytest.mark.parametrize(
    ("verdict", "blank", "task", "text_layer", "route"),
    [
        (None, False, "ocr", "auto", (None, None)),
        (TRUSTED, False, "ocr", "auto", ("text_layer", "born digital")),
        (TRUSTED, False, "parse", "only", ("text_layer", "born digital")),
        (TRUSTED, False, "ocr", "ignore", ("model", "the text layer is ignored")),
        (TRUSTED, False, "caption", "auto", ("model", "captions need pixels")),
        (DOUBTED, False, "ocr", "auto", ("model", "garbled")),
        (DOUBTED, False, "ocr", "only", ("none", "no trustworthy text layer: garbled")),
        (DOUBTED, True, "ocr", "auto", ("none", "blank")),
        (TRUSTED, True, "ocr", "ignore", ("none", "blank")),
    ],
)
def test_the_route_follows_the_verdict_the_task_and_the_wish(verdict, blank, task, text_layer, route):
    assert choose_route(verdict, blank, task, config(text_layer=text_layer)) == route


def test_layout_is_only_made_for_text_that_may_be_used():
    assert page_options("parse", config(layout=True)).layout
    assert not page_options("parse", config(layout=True, text_layer="ignore")).layout
    assert not page_options("caption", config(layout=True)).layout


def test_the_image_column_holds_the_pixels(decode, mixed):
    table = pa.Table.from_pylist(decode(unit_of(mixed, [2])), schema=DECODED)
    assert table.column("image").type == pa.large_binary()
