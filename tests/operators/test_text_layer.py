import html
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pymupdf
import pytest

from operators.decode import text_layout
from operators.decode.image_text import text_chars
from operators.decode.reading_order import reading_order
from operators.decode.text_layer import TextLayer, read_text_layer
from operators.decode.text_lines import TEXT_FLAGS, frame_to_display, read_page_text, turn_box
from operators.decode.text_quality import is_byte_swapped, plausible_share, unmapped_share
from schemas.document import BLOCK
from schemas.vocabulary import BLOCK_LABELS

PROSE = (
    "The committee met on Tuesday and agreed to publish the report before the end of the year. "
    "Members asked for a second reading of the annex, which lists every station along the river. "
) * 4


def _document(text: str = PROSE, size: float = 11.0, **options: Any) -> pymupdf.Document:
    document = pymupdf.open()
    page = document.new_page(width=595, height=842)
    page.insert_textbox((72, 72, 523, 770), text, fontsize=size, **options)
    return document


def _with_image(document: pymupdf.Document, rect: tuple[float, ...] | None = None, *, overlay: bool = False) -> None:
    pixmap = pymupdf.Pixmap(pymupdf.csGRAY, (0, 0, 60, 80), False)
    pixmap.clear_with(220)
    document[0].insert_image(
        pymupdf.Rect(rect) if rect else document[0].rect, pixmap=pixmap, overlay=overlay, keep_proportion=False
    )


def _letters(text: str) -> Counter[str]:
    return Counter(char for char in text if char.isalnum())


def _shown(layer: TextLayer) -> Counter[str]:
    assert layer.markdown is not None
    tags = r"</?(?:table|tr|td)(?: [^<>]*)?>|<br>"
    return _letters(html.unescape(re.sub(tags, "", layer.markdown)))


def _columns_document() -> pymupdf.Document:
    """A page whose file order is not its reading order: right column, left column, title, page number between."""
    document = pymupdf.open()
    page = document.new_page(width=595, height=842)
    page.insert_text((292, 800), "17", fontsize=10)
    page.insert_textbox((310, 150, 530, 700), "right begins here. " + PROSE + "right ends here.", fontsize=10)
    page.insert_textbox((65, 150, 285, 700), "left begins here. " + PROSE + "left ends here.", fontsize=10)
    page.insert_text((150, 100), "A Title Over Two Columns", fontsize=22)
    return document


def test_born_digital_text_is_trusted() -> None:
    layer = read_text_layer(_document()[0], layout=False)
    assert (layer.has_text, layer.trustworthy, layer.is_scan, layer.image_share) == (True, True, False, 0.0)
    assert layer.reason == f"born digital, {layer.chars} characters"
    assert layer.chars == len("".join(PROSE.split()))
    assert layer.blocks is None


def test_a_page_without_text_has_no_text_layer() -> None:
    layer = read_text_layer(pymupdf.open().new_page(), layout=True)
    assert (layer.has_text, layer.trustworthy, layer.reason) == (False, False, "no text layer")
    assert (layer.markdown, layer.blocks) == (None, None)


def test_hidden_text_over_a_scan_is_trusted_when_its_words_are_words() -> None:
    document = _document(render_mode=3)
    _with_image(document)
    layer = read_text_layer(document[0], layout=False)
    assert layer.trustworthy
    assert layer.is_scan
    assert layer.reason.startswith("hidden text over a scan, ")
    assert layer.image_share > 0.99


def test_hidden_text_over_a_scan_is_not_trusted_when_it_is_noise() -> None:
    noise = "ciA# .A4)-0-A:fcfk 4A144:44. W|GL,41.44 -777d4v, 76 _Ali- itzt- YA*A--414*-40 ag,ae- Z.Y-et.guer " * 5
    document = _document(noise, render_mode=3)
    _with_image(document)
    layer = read_text_layer(document[0], layout=False)
    assert not layer.trustworthy
    assert "plausible words" in layer.reason
    assert (layer.markdown, layer.has_text) == (None, True)


def test_a_few_hidden_words_are_not_trusted() -> None:
    document = _document("stamped", render_mode=3)
    _with_image(document)
    assert not read_text_layer(document[0], layout=False).trustworthy


def test_text_that_a_page_sized_image_covers_is_hidden() -> None:
    document = _document("x7# qq-1 )(zz " * 40)
    _with_image(document, overlay=True)
    layer = read_text_layer(document[0], layout=False)
    assert layer.reason.startswith("hidden text over a scan")
    assert not layer.trustworthy


def test_a_stamp_on_a_scan_does_not_make_it_born_digital() -> None:
    document = _document("Filed 11/20/2026, page 3 of 8")
    _with_image(document)
    layer = read_text_layer(document[0], layout=False)
    assert not layer.trustworthy
    assert layer.is_scan
    assert "image covers" in layer.reason


def test_prose_on_a_background_picture_is_trusted() -> None:
    document = _document()
    _with_image(document)
    layer = read_text_layer(document[0], layout=False)
    assert layer.trustworthy
    assert not layer.is_scan


def test_a_figure_page_with_a_caption_is_trusted() -> None:
    document = _document("Figure 3: the valley in spring.")
    _with_image(document, (72, 120, 523, 700))
    layer = read_text_layer(document[0], layout=False)
    assert layer.trustworthy
    assert 0.4 < layer.image_share < 0.7


def test_a_notice_pasted_as_a_picture_is_not_lost() -> None:
    picture = _document()[0].get_pixmap(dpi=150, clip=(60, 60, 540, 400))
    document = pymupdf.open()
    page = document.new_page(width=595, height=842)
    page.insert_text((72, 60), "Notices, page 7 of 12", fontsize=10)
    page.insert_image(pymupdf.Rect(60, 100, 540, 440), pixmap=picture)
    layer = read_text_layer(page, layout=False)
    assert not layer.trustworthy
    assert layer.reason.startswith("images show about ")
    page.insert_textbox((60, 460, 540, 830), PROSE * 2, fontsize=10)
    assert read_text_layer(page, layout=False).trustworthy


def test_a_photograph_shows_no_text() -> None:
    rows, columns = np.mgrid[0:200, 0:300]
    gradient = ((rows + columns) % 256).astype(np.uint8)
    noise = np.random.default_rng(3).integers(0, 255, (200, 300)).astype(np.uint8)
    assert text_chars(gradient) == 0
    assert text_chars(noise) == 0
    assert text_chars(np.full((200, 300), 255, np.uint8)) == 0


def test_unmapped_characters_are_garbling() -> None:
    assert unmapped_share("ab cd") == 0.0
    assert unmapped_share("a\ufffd \ue000\x01") == 0.75
    assert is_byte_swapped("䴀甀氀琀椀")
    assert not is_byte_swapped("多色の黒")


def test_plausible_words_need_no_dictionary() -> None:
    assert plausible_share(PROSE) > 0.98
    assert plausible_share("Der Ausschuß tagte über längere Zeit in Łódź und Αθήνα, потом в Москве.") > 0.95
    assert plausible_share("xkcdfgh qwrtpsdf zZzQq a1b2c3 ,.-;:_ #'+*") < 0.2


def test_columns_are_read_one_after_the_other_whatever_the_order_in_the_file() -> None:
    for layout in (False, True):
        markdown = read_text_layer(_columns_document()[0], layout=layout).markdown
        assert markdown is not None
        found = [
            markdown.index(mark) for mark in ("A Title", "left begins", "left ends", "right begins", "right ends", "17")
        ]
        assert found == sorted(found)


def test_headings_come_from_the_font_size_and_lists_stay_lists() -> None:
    document = _document()
    page = document[0]
    page.insert_text((72, 400), "Second Part", fontsize=18)
    page.insert_textbox((72, 420, 500, 520), "· apples\n· pears\n1. first\n2. second", fontsize=11)
    markdown = read_text_layer(page, layout=False).markdown
    assert markdown is not None
    assert "\n\n# Second Part\n\n" in markdown
    assert "- apples\n- pears\n1. first\n2. second" in markdown


def test_hyphens_at_line_ends_are_undone_and_real_ones_stay() -> None:
    document = pymupdf.open()
    page = document.new_page()
    for number, line in enumerate(("The govern-", "ment of the well-known re-", "gion moved to FAA-", "2020 at last.")):
        page.insert_text((72, 100 + 13 * number), line, fontsize=11)
    markdown = read_text_layer(page, layout=False).markdown
    assert markdown == "The government of the well-known region moved to FAA-2020 at last."


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_boxes_lie_over_their_words_on_the_displayed_page(rotation: int, turn: int) -> None:
    document = pymupdf.open()
    page = document.new_page(width=500, height=700)
    page.insert_textbox((60, 60, 440, 640), PROSE, fontsize=12, rotate=turn)
    page.set_rotation(rotation)
    layer = read_text_layer(page, layout=True)
    assert layer.blocks
    assert page.rotation == rotation
    pixmap = page.get_pixmap(colorspace=pymupdf.csGRAY)
    boxes = [pymupdf.Rect(block["bbox"]) for block in layer.blocks]
    dark = np.frombuffer(pixmap.samples, np.uint8).reshape(pixmap.height, pixmap.stride)[:, : pixmap.width] < 128
    covered = np.zeros_like(dark)
    for box in boxes:
        covered[int(box.y0) : int(box.y1) + 1, int(box.x0) : int(box.x1) + 1] = True
    assert (dark & covered).sum() > 500
    assert (dark & ~covered).sum() < 0.02 * dark.sum()
    for box in boxes:
        assert page.rect.contains(box)
    assert layer.markdown is not None
    assert "The committee met on Tuesday and agreed" in layer.markdown


def test_four_quarter_turns_bring_a_box_back() -> None:
    box, width, height = (10.0, 20.0, 40.0, 90.0), 300.0, 500.0
    turned = box
    for _ in range(4):
        turned = turn_box(turned, 90, width, height)
        width, height = height, width
    assert turned == box


def test_layout_blocks_fit_the_schema_and_hold_every_word_once() -> None:
    document = _columns_document()
    layer = read_text_layer(document[0], layout=True)
    assert layer.blocks
    pa.array(layer.blocks, BLOCK)
    assert {block["label"] for block in layer.blocks} <= set(BLOCK_LABELS)
    words = Counter(word[4] for word in document[0].get_text("words", flags=TEXT_FLAGS))
    in_blocks = Counter(word for block in layer.blocks for word in block["text"].split())
    assert in_blocks == words


def test_a_ruled_table_becomes_html_with_its_cells() -> None:
    document = pymupdf.open()
    page = document.new_page(width=595, height=842)
    page.insert_text((72, 80), "Rainfall by station and year, in millimetres", fontsize=14)
    rows = [
        ("Station", "1990", "2000"),
        ("Aare", "812", "790"),
        ("Reuss", "933", "941"),
        ("Limmat", "1021", "998"),
        ("Rhein", "877", "860"),
    ]
    for number, row in enumerate(rows):
        top = 120 + 24 * number
        for column, cell in enumerate(row):
            page.draw_rect((72 + 140 * column, top, 212 + 140 * column, top + 24))
            page.insert_text((80 + 140 * column, top + 16), cell, fontsize=11)
    layer = read_text_layer(page, layout=True)
    assert layer.blocks
    [table] = [block for block in layer.blocks if block["label"] == "table"]
    assert "<tr><td>Reuss</td><td>933</td><td>941</td></tr>" in table["html"]
    assert "Reuss\t933\t941" in table["text"]


def test_when_the_layout_model_fails_there_are_plain_blocks_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(page: pymupdf.Page, **_: object) -> None:
        raise ValueError("no such tensor")

    monkeypatch.setattr(pymupdf.Page, "get_layout", broken)
    layer = read_text_layer(_columns_document()[0], layout=True)
    assert layer.trustworthy
    assert "plain blocks (layout model: ValueError: no such tensor)" in layer.reason
    assert layer.blocks
    assert {block["label"] for block in layer.blocks} == {"text"}
    assert _shown(layer) == _letters(read_page_text(_columns_document()[0], words=False).text)


def test_words_outside_every_layout_box_make_blocks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_layout, "_regions", lambda page, page_text: [])
    layer = read_text_layer(_columns_document()[0], layout=True)
    assert layer.blocks
    assert {(block["label"], block["label_raw"]) for block in layer.blocks} == {("text", "")}
    assert _shown(layer) == _letters(read_page_text(_columns_document()[0], words=False).text)


def test_a_box_beyond_the_page_is_cut_or_left_out() -> None:
    document = _document()
    page_text = read_page_text(document[0], words=False)
    assert frame_to_display((-50, -50, 100, 100), page_text, document[0]) == [0, 0, 100, 100]
    assert frame_to_display((600, 900, 700, 950), page_text, document[0]) is None


def test_reading_order_keeps_a_good_order_and_mends_a_bad_one() -> None:
    left, right, foot = (0.0, 100.0, 90.0, 200.0), (100.0, 100.0, 190.0, 200.0), (0.0, 300.0, 190.0, 400.0)
    title = (60.0, 0.0, 130.0, 50.0)
    assert reading_order([title, left, right, foot]) == [0, 1, 2, 3]
    assert reading_order([foot, right, left, title]) == [3, 2, 1, 0]
    assert reading_order([right, left]) == [1, 0]
    assert reading_order([right, left], right_to_left=True) == [0, 1]
    assert reading_order([]) == []


def test_a_table_that_was_written_by_rows_is_read_by_rows() -> None:
    cells = [
        (90.0 * column, 20.0 * row, 90.0 * column + 60, 20.0 * row + 12) for row in range(5) for column in range(4)
    ]
    assert reading_order(cells) == list(range(20))


# Facts about the wider corpus.


@pytest.mark.needs_corpus
@pytest.mark.parametrize(
    ("name", "trusted", "words"),
    [
        ("devanagari_hindi_udhr_art1.pdf", False, "garbled"),
        ("habibi-rotated.pdf", False, "garbled"),
        ("cmyk.pdf", False, "bytes swapped"),
        ("handwriting_bad_ocr.pdf", False, "hidden text over a scan"),
        ("jbig2_jpx_ocr_layer_book.pdf", True, "hidden text over a scan"),
        ("scan-bad.pdf", False, "hidden text over a scan"),
        ("ccitt.pdf", False, "no text layer"),
        ("scan_ccitt_8pages.pdf", False, "no text layer"),
        ("blank.pdf", False, "no text layer"),
        ("lichtenstein.pdf", False, "no text layer"),
        ("BidiSample.pdf", True, "born digital"),
        ("issue13211.pdf", True, "born digital"),
        ("vertical.pdf", True, "born digital"),
        ("javauninstall-7r.pdf", True, "born digital"),
        ("chinese_a3_demo.pdf", True, "born digital"),
        ("libreoffice-form.pdf", True, "born digital"),
        ("nics-background-checks-2015-11-rotated.pdf", True, "born digital"),
        ("chelsea_pdta.pdf", True, "born digital"),
    ],
)
def test_routes_of_known_pages(corpus: Path, name: str, trusted: bool, words: str) -> None:
    with pymupdf.open(corpus / "pdf" / name) as document:
        layer = read_text_layer(document[0], layout=False)
    assert layer.trustworthy is trusted
    assert words in layer.reason


@pytest.mark.needs_corpus
@pytest.mark.parametrize(
    "name", ["multicolumn.pdf", "federal-register-2020-17221.pdf", "chelsea_pdta.pdf", "demo2.pdf"]
)
def test_no_text_is_lost_in_the_fast_order(corpus: Path, name: str) -> None:
    with pymupdf.open(corpus / "pdf" / name) as document:
        for page in document:
            layer = read_text_layer(page, layout=False)
            if layer.trustworthy:
                assert _shown(layer) == _letters(read_page_text(page, words=False).text)


@pytest.mark.needs_corpus
def test_tables_scanned_into_a_born_digital_document_are_read_again(corpus: Path) -> None:
    with pymupdf.open(corpus / "pdf" / "federal-register-2020-17221.pdf") as document:
        routes = [read_text_layer(page, layout=False).trustworthy for page in document]
    assert [number for number, trusted in enumerate(routes, 1) if not trusted] == [8, 9, 10, 11, 12, 13]


@pytest.mark.needs_corpus
@pytest.mark.parametrize("layout", [False, True])
def test_columns_of_real_pages_come_in_order(corpus: Path, layout: bool) -> None:
    with pymupdf.open(corpus / "pdf" / "multicolumn.pdf") as document:
        two = read_text_layer(document[0], layout=layout).markdown or ""
    with pymupdf.open(corpus / "pdf" / "federal-register-2020-17221.pdf") as document:
        three = read_text_layer(document[0], layout=layout).markdown or ""
    marks = (
        "Two-Column Document",
        "Abstract",
        "Lorem ipsum dolor sit amet",
        "Donec nonummy",
        "pellentesque ante.",
        "Fusce",
    )
    found = [two.index(mark) for mark in marks]
    assert found == sorted(found)
    marks = (
        "DEPARTMENT OF TRANSPORTATION",
        "Contractual & Data Services",
        "SUPPLEMENTARY INFORMATION",
        "proposal, explain",
    )
    found = [three.index(mark) for mark in marks]
    assert found == sorted(found)


@pytest.mark.needs_corpus
@pytest.mark.parametrize(
    "name",
    [
        "nics-background-checks-2015-11-rotated.pdf",
        "BidiSample.pdf",
        "vertical.pdf",
        "issue13211.pdf",
        "multicolumn.pdf",
    ],
)
def test_layout_of_real_pages_loses_no_text_and_leaves_no_box_outside(corpus: Path, name: str) -> None:
    with pymupdf.open(corpus / "pdf" / name) as document:
        page = document[0]
        layer = read_text_layer(page, layout=True)
        assert layer.blocks
        expected = _letters(read_page_text(page, words=True).text)
        assert _letters(" ".join(block["text"] for block in layer.blocks)) == expected
        for block in layer.blocks:
            left, top, right, bottom = block["bbox"]
            assert 0 <= left < right <= page.rect.width
            assert 0 <= top < bottom <= page.rect.height


@pytest.mark.needs_corpus
def test_arabic_phrases_come_in_reading_order_and_their_numbers_from_left_to_right(corpus: Path) -> None:
    with pymupdf.open(corpus / "pdf" / "BidiSample.pdf") as document:
        layer = read_text_layer(document[0], layout=False)
    assert "١٤ إبريل ١٤٣٤" in (layer.markdown or "")
    assert "١٤ - إبريل - ١٤٣٤" in (layer.markdown or "")
    assert "إختبار ذاتي" in (layer.markdown or "")
    assert "an Arabic العربية word" in (layer.markdown or "")
