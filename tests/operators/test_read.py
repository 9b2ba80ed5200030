"""The CPU engine: it reads Latin and Chinese print, abstains elsewhere, and puts boxes where the page shows them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pymupdf
import pytest

from operators.minicpmv.slicing import SliceConfig, slice_image
from operators.read import READS, ReadPages, ReadPagesConfig, join_lines, page_image
from operators.text_lines import odd_word_share, with_spaces
from schemas.document import BLOCK
from schemas.errors import ContractError, GenerationError
from schemas.generation import RECORD
from schemas.vocabulary import STATUSES
from tests.operators.reading_pages import (
    LANGUAGES,
    character_error_rate,
    page_of,
    page_row,
    read_page,
    read_row,
    render,
    rendered,
)

DATA = Path(__file__).parent.parent / "data"
READABLE = ("english", "german", "chinese")
UNREADABLE = ("russian", "greek", "arabic", "hebrew", "hindi", "thai", "korean", "japanese")


@pytest.fixture(scope="module")
def operator() -> ReadPages:
    return ReadPages(ReadPagesConfig())


@pytest.mark.parametrize("language", READABLE)
def test_print_is_read(operator, language) -> None:
    row = read_page(operator, *page_of(LANGUAGES[language]))
    assert row["status"] == "success"
    assert row["error"] is None
    assert character_error_rate(row["text"], LANGUAGES[language]) < 0.03
    assert row["confidence"] > 0.95
    assert (row["engine"], row["weights_kind"], row["finish_reason"]) == ("cpu", "released", None)
    assert row["model_id"].startswith("rapidocr-onnxruntime/")
    assert row["blocks"] is None


@pytest.mark.parametrize("language", UNREADABLE)
def test_other_scripts_are_given_up_and_not_returned_as_text(operator, language) -> None:
    row = read_page(operator, *page_of(LANGUAGES[language]))
    assert row["status"] == "failure"
    assert row["text"] is None
    assert row["plain_text"] is None
    assert row["raw_output"] is not None
    assert (row["error"]["error_code"], row["error"]["stage"]) == ("abstained", "generate")
    assert row["error"]["retryable"] is False


def test_a_page_with_a_few_unreadable_lines_loses_only_those(operator) -> None:
    row = read_page(operator, *page_of(f"{LANGUAGES['english']} {LANGUAGES['english']}<br>{LANGUAGES['hindi'][:40]}"))
    assert row["status"] == "partial_success"
    assert "without distinction of any kind" in row["text"]
    [failure] = row["recovered"]
    assert failure["error_code"] == "abstained"
    assert row["error"] is None


def test_two_columns_are_read_within_five_percent(operator) -> None:
    row = read_page(operator, *render(DATA / "ccitt.pdf"))
    truth = (DATA / "transcriptions" / "ccitt-page1.txt").read_text()
    assert row["status"] == "success"
    assert character_error_rate(row["text"], truth) <= 0.05
    assert character_error_rate(row["plain_text"], truth) <= 0.02


def test_a_page_put_together_from_its_slices_is_read(operator) -> None:
    image, size = page_of(LANGUAGES["english"])
    sliced = slice_image(image, SliceConfig())
    assert sliced.grid.rows > 1
    pixels = b"".join(part.tobytes() for part in sliced.slices)
    columns = {
        "pixels": pa.compress(pixels, codec="zstd", asbytes=True),
        "pixel_encoding": "zstd",
        "slice_shapes": [{"height_px": part.shape[0], "width_px": part.shape[1]} for part in sliced.slices],
        "slice_grids": [{"rows": sliced.grid.rows, "cols": sliced.grid.cols}],
    }
    row = page_row(image, size, **columns)
    height, width = page_image(row).shape[:2]
    assert height / width == pytest.approx(image.shape[0] / image.shape[1], rel=0.15)
    assert character_error_rate(read_row(operator, row)["text"], LANGUAGES["english"]) < 0.03


@pytest.mark.parametrize("turn", [{}, {"rotation": 90, "skew_degrees": 5.0}])
def test_boxes_lie_where_the_page_that_was_read_shows_the_text(operator, turn) -> None:
    with pymupdf.open() as document:
        page = document.new_page(width=500, height=400)
        page.insert_text((60, 300), "Standing in the lower left corner", fontsize=14)
        page.insert_text((60, 320), "of a page that is not square", fontsize=14)
        image, size = rendered(page)
    table = pa.Table.from_pylist([page_row(image, size, task="parse", **turn)], schema=RECORD)
    [row] = operator(table).to_pylist()
    found = np.array([block["bbox"] for block in row["blocks"]])
    ink_ys, ink_xs = np.nonzero(image.min(axis=2) < 128)
    points = size[0] / image.shape[1]
    ink = np.array([ink_xs.min(), ink_ys.min(), ink_xs.max(), ink_ys.max()]) * points
    assert [*found[:, :2].min(axis=0), *found[:, 2:].max(axis=0)] == pytest.approx(ink.tolist(), abs=8.0)


def test_the_pixels_of_a_row_end_where_they_were_read(operator) -> None:
    image, size = page_of(LANGUAGES["english"])
    rows = [page_row(image, size), page_row(image, size, task="caption"), page_row(image, size, status="success")]
    read, failed, passed = operator(pa.Table.from_pylist(rows, schema=RECORD)).to_pylist()
    assert (read["status"], failed["status"]) == ("success", "failure")
    assert (read["pixels"], failed["pixels"]) == (None, None)
    assert passed["pixels"] == rows[2]["pixels"]


def test_parse_gives_blocks_with_labels_boxes_and_scores(operator) -> None:
    title = '<span style="font-size:24pt"><b>A Declaration</b></span>'
    image, size = page_of(f"{title}</p><p style='font-size:12pt'>{LANGUAGES['english']}")
    row = read_row(operator, page_row(image, size, task="parse"))
    assert [block["label"] for block in row["blocks"]][:2] == ["section_header", "text"]
    assert row["blocks"][0]["markdown"] == "## A Declaration"
    assert row["text"].startswith("## A Declaration\n\nAll human beings")
    assert row["plain_text"].startswith("A Declaration\n\nAll human beings")
    assert row["parse_status"] == "ok"
    for block in row["blocks"]:
        left, top, right, bottom = block["bbox"]
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        assert block["label_raw"] == "rapidocr"
        assert 0.9 < block["score"] <= 1


def test_a_blank_page_is_blank(operator) -> None:
    row = read_row(operator, page_row(np.full((800, 600, 3), 255, np.uint8), (300, 400)))
    assert (row["status"], row["text"], row["error"]) == ("blank", "", None)


def test_a_row_after_a_failed_model_attempt_ends_as_fallback(operator) -> None:
    image, size = page_of(LANGUAGES["english"])
    row = read_row(operator, page_row(image, size, raw_output="the the the the"))
    assert row["status"] == "fallback"
    assert row["raw_output"] == "the the the the"
    assert row["text"].startswith("All human beings")


def test_captions_are_not_written(operator) -> None:
    row = read_row(operator, page_row(np.full((80, 60, 3), 255, np.uint8), (30, 40), task="caption"))
    assert row["error"]["error_code"] == "abstained"


@pytest.mark.parametrize(
    "columns",
    [
        {"route": "model"},
        {"status": "success"},
        {"error": {"stage": "open", "error_code": "damaged", "error_category": "corrupt_input", "message": "gone"}},
    ],
)
def test_other_rows_pass_through(operator, columns) -> None:
    before = page_row(np.full((80, 60, 3), 255, np.uint8), (30, 40), **columns)
    after = read_row(operator, before)
    assert after["text"] is None
    assert after["engine"] is None
    assert after["status"] == columns.get("status")
    assert after["pixels"] == before["pixels"]
    if "error" in columns:
        assert after["error"]["message"] == "gone"


def test_an_empty_table_keeps_its_schema(operator) -> None:
    assert operator(RECORD.empty_table()).schema.names == operator.outgoing(RECORD).names


def test_a_full_record_keeps_its_columns_and_types(operator) -> None:
    image, size = page_of("Only a short line of text.")
    table = pa.Table.from_pylist([page_row(image, size, task="parse")], schema=RECORD)
    after = operator(table)
    assert {field.name: field.type for field in after.schema} == {field.name: field.type for field in RECORD}
    assert after.schema.field("blocks").type == pa.list_(BLOCK)
    assert after.column("status").to_pylist()[0] in STATUSES


def test_a_missing_column_is_a_contract_error(operator) -> None:
    with pytest.raises(ContractError, match="pixels"):
        operator(READS.empty_table().drop_columns(["pixels"]))


def test_pixels_that_do_not_fit_their_shapes_are_refused() -> None:
    row = page_row(np.zeros((8, 6, 3), np.uint8), (3, 4))
    with pytest.raises(GenerationError, match="144"):
        page_image(row | {"slice_shapes": [{"height_px": 9, "width_px": 6}]})
    with pytest.raises(GenerationError, match="wanted the slices of one page"):
        page_image(row | {"slice_grids": []})


def test_a_very_tall_page_is_read_in_windows(operator) -> None:
    # Without ones and zeros, which print does not always tell from letters.
    numbers = [int(f"{n:03o}") + 222 for n in range(90)]
    text = "<br>".join(f"This is line number {number} of a tall page." for number in numbers)
    image, _ = page_of(text, size=(300, 2200))
    row = read_row(operator, page_row(image, (300, 2200)))
    assert row["status"] == "success"
    assert [int(word) for word in row["text"].split() if word.isdigit()] == numbers


def test_lines_are_joined_by_what_their_script_needs() -> None:
    assert join_lines([["a full func-"], ["tion and"], ["more"]]) == "a full function and more"
    assert join_lines([["商品的这些"], ["尺度之所以"]]) == "商品的这些尺度之所以"
    assert join_lines([["a", "1"], ["b", "2"]]) == "a 1\nb 2"


def test_spaces_are_put_where_the_picture_shows_them() -> None:
    ink = np.ones(40, bool)
    ink[18:24] = False
    assert with_spaces("abcd", [5, 14, 27, 36], ink, 20) == "ab cd"
    assert with_spaces("中文字母", [5, 14, 27, 36], ink, 20) == "中文字母"


def test_words_that_print_would_not_hold_are_odd() -> None:
    assert odd_word_share("The quick LinnSequencer has 32 tracks at 30fps and a MIDI port") < 0.2
    assert odd_word_share("CBO6OIHbIMN IpaBaX pa3yMOM JOJIKHbI HaIeJIeHbI") > 0.7
    assert odd_word_share("人人生而自由 12") == 0.0
