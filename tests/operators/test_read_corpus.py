"""The CPU engine on real files of the wider corpus: accuracy, and what it must give up."""

from pathlib import Path

import pytest

from operators.read import ReadPages, ReadPagesConfig
from tests.operators.reading_pages import character_error_rate, read_page, render

pytestmark = pytest.mark.needs_corpus
TRANSCRIPTIONS = Path(__file__).parent.parent / "data" / "transcriptions"


@pytest.fixture(scope="module")
def operator() -> ReadPages:
    return ReadPages(ReadPagesConfig())


@pytest.mark.parametrize("name", ["ccitt", "scan_ccitt_8pages"])
def test_first_pages_are_read_within_five_percent(corpus, operator, name) -> None:
    row = read_page(operator, *render(corpus / "pdf" / f"{name}.pdf"))
    truth = (TRANSCRIPTIONS / f"{name}-page1.txt").read_text()
    assert row["status"] == "success"
    assert character_error_rate(row["text"], truth) <= 0.05


@pytest.mark.parametrize(
    ("name", "page_index", "words"),
    [
        ("scan_ccitt_8pages", 7, "商品"),
        ("rotated_skew", 0, "TIMING CORRECTION works during playback"),
        ("nics-background-checks-2015-11-rotated", 0, "Kentucky"),
        ("scan-bad", 0, "pdf.js"),
        ("jbig2_jpx_ocr_layer_book", 1, "crashing through a tent"),
        ("WARN-Report-for-7-1-2015-to-03-25-2016", 0, "Maxim Integrated Product San Jose 150"),
        ("multicolumn", 0, "dictum gravida mauris"),
    ],
)
def test_readable_pages_are_read(corpus, operator, name, page_index, words) -> None:
    row = read_page(operator, *render(corpus / "pdf" / f"{name}.pdf", page_index))
    assert row["status"] in ("success", "partial_success")
    assert words in row["plain_text"]


@pytest.mark.parametrize(
    ("name", "page_index"),
    [
        ("devanagari_hindi_udhr_art1", 0),
        ("issue13211", 0),
        ("BidiSample", 0),
        ("habibi-rotated", 1),
        ("handwriting_bad_ocr", 0),
        ("handwriting_bad_ocr", 1),
        ("javauninstall-7r", 0),
    ],
)
def test_unreadable_pages_are_given_up(corpus, operator, name, page_index) -> None:
    row = read_page(operator, *render(corpus / "pdf" / f"{name}.pdf", page_index))
    assert row["status"] == "failure"
    assert row["text"] is None
    assert row["error"]["error_code"] == "abstained"


@pytest.mark.parametrize("name", ["lichtenstein", "blank", "transparency_group"])
def test_pictures_without_text_are_blank(corpus, operator, name) -> None:
    row = read_page(operator, *render(corpus / "pdf" / f"{name}.pdf"))
    assert (row["status"], row["text"]) == ("blank", "")
