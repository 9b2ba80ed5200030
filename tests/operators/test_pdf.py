"""PDF pages with MuPDF."""

import numpy as np
import pymupdf
import pytest

from operators.decode.pages import Opened, PageOptions, capped_scale, is_blank
from operators.decode.pdf import clean_text, decode_pages, probe
from schemas.errors import DecodeError

SENTENCE = "The quick brown fox jumps over the lazy dog near the quiet river bank. "


def saved(folder, fill, **options):
    document = pymupdf.open()
    fill(document)
    path = folder / "document.pdf"
    document.save(path, **options)
    return str(path)


def text_pages(count, width=595, height=842):
    def fill(document):
        for index in range(count):
            page = document.new_page(width=width, height=height)
            page.insert_textbox((50, 50, width - 50, height - 50), f"Page {index + 1}. " + SENTENCE * 8)

    return fill


def steps_of(path, numbers, password=None, **options):
    opened, *steps = decode_pages(path, password, numbers, PageOptions(**options))
    assert isinstance(opened, Opened)
    pages = {}
    for step in steps:
        page = pages.setdefault(step.page_number, {"image": None, "verdict": None, "failure": None, "blank": False})
        page.update(step.facts)
        page["image"], page["failure"], page["blank"] = step.image, step.failure, step.is_blank
        page["verdict"] = step.verdict or page["verdict"]
        page["last"] = step.is_last
    return pages


def test_probe_tells_pages_title_and_producer(tmp_path):
    def fill(document):
        text_pages(3)(document)
        document.set_metadata({"title": "A title", "producer": "Writer 1"})

    [facts] = probe(saved(tmp_path, fill), None, 100)
    assert facts == {"page_count": 3, "is_encrypted": False, "title": "A title", "pdf_producer": "Writer 1"}


def test_a_document_with_too_many_pages_is_refused(tmp_path):
    with pytest.raises(DecodeError) as caught:
        list(probe(saved(tmp_path, text_pages(3)), None, 2))
    assert caught.value.code == "too_many_pages"


@pytest.mark.parametrize(("password", "opens"), [(None, False), ("wrong", False), ("secret", True)])
def test_an_encrypted_document_wants_its_password(tmp_path, password, opens):
    path = saved(tmp_path, text_pages(1), encryption=pymupdf.PDF_ENCRYPT_AES_256, user_pw="secret", owner_pw="owner")
    if opens:
        [facts] = probe(path, password, 10)
        assert facts["is_encrypted"]
        assert steps_of(path, [1], password)[1]["failure"] is None
        return
    with pytest.raises(DecodeError) as caught:
        list(probe(path, password, 10))
    assert caught.value.code == "encrypted"


def test_an_empty_user_password_opens_without_asking(tmp_path):
    path = saved(tmp_path, text_pages(1), encryption=pymupdf.PDF_ENCRYPT_AES_256, user_pw="", owner_pw="owner")
    [facts] = probe(path, None, 10)
    assert facts["is_encrypted"]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty"),
        (b"%PDF-1.7\n" + b"\x93garbage" * 100, "damaged"),
        (b"<!DOCTYPE html><html><body><p>Not Found</p></body></html>", "not_pdf"),
        (
            b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj 2 0 obj<</Type/Pages/Kids[]/Count 0>>endobj\n"
            b"trailer<</Root 1 0 R/Size 3>>",
            "no_pages",
        ),
    ],
)
def test_what_is_no_document_has_its_own_code(tmp_path, data, code):
    path = tmp_path / "a.pdf"
    path.write_bytes(data)
    with pytest.raises(DecodeError) as caught:
        list(probe(str(path), None, 10))
    assert caught.value.code == code


def test_a_page_with_trustworthy_text_is_not_rendered(tmp_path):
    page = steps_of(saved(tmp_path, text_pages(1)), [1])[1]
    assert page["verdict"].trustworthy
    assert page["image"] is None
    assert page["last"]
    assert "image_width_px" not in page
    assert page["has_text_layer"]
    assert "quick brown fox" in page["text_layer_text"]
    assert (page["page_width_pt"], page["page_height_pt"]) == (595, 842)


def test_a_page_is_rendered_as_rgb_at_its_resolution_with_annotations(tmp_path):
    def fill(document):
        page = document.new_page(width=360, height=180)
        page.draw_rect((0, 0, 180, 180), color=(1, 0, 0), fill=(1, 0, 0))
        page.add_rect_annot((200, 20, 300, 120)).update(fill_color=(0, 0, 1))

    page = steps_of(saved(tmp_path, fill), [1], dpi=144)[1]
    image = page["image"]
    assert image.dtype == np.uint8
    assert image.shape == (360, 720, 3) == (page["image_height_px"], page["image_width_px"], 3)
    assert tuple(image[100, 100]) == (255, 0, 0)
    assert tuple(image[140, 500]) == (0, 0, 255)
    assert page["dpi"] == pytest.approx(144)
    assert page["render_ms"] > 0


def test_a_turned_page_has_the_size_a_reader_sees(tmp_path):
    def fill(document):
        page = document.new_page(width=200, height=100)
        page.draw_rect((0, 0, 20, 20), fill=(1, 0, 0))
        page.set_rotation(90)

    page = steps_of(saved(tmp_path, fill), [1], dpi=72)[1]
    assert (page["page_width_pt"], page["page_height_pt"]) == (100, 200)
    assert page["image"].shape == (200, 100, 3)
    assert tuple(page["image"][5, 95]) == (255, 0, 0)


def test_pages_come_in_the_order_asked_for_and_only_those(tmp_path):
    pages = steps_of(saved(tmp_path, text_pages(6)), [5, 2])
    assert list(pages) == [5, 2]
    assert "Page 5." in pages[5]["text_layer_text"]


def test_a_page_beyond_the_end_fails_and_the_others_come(tmp_path):
    pages = steps_of(saved(tmp_path, text_pages(2)), [1, 3, 2])
    assert pages[3]["failure"]["code"] == "page_missing"
    assert pages[1]["failure"] is None
    assert pages[2]["failure"] is None


CYCLE_ON_PAGE_2 = b"""%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R 4 0 R]/Count 2>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 100]>>endobj
4 0 obj<</Type/Pages/Parent 2 0 R/Kids[2 0 R]/Count 1>>endobj
trailer<</Root 1 0 R/Size 5>>
"""


def test_a_damaged_page_fails_and_the_others_come(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(CYCLE_ON_PAGE_2)
    pages = steps_of(str(path), [2, 1])
    assert pages[2]["failure"]["code"] == "damaged"
    assert pages[1]["failure"] is None


def test_metadata_is_text_that_a_table_can_hold():
    assert clean_text("A\x07 title\n\udcff ") == "A title"
    assert clean_text("x" * 10_000) == "x" * 500
    assert clean_text("\0") is None
    assert clean_text(None) is None


def test_rendering_can_be_forced_or_left_out(tmp_path):
    path = saved(tmp_path, text_pages(1))
    assert steps_of(path, [1], render="always")[1]["image"] is not None
    assert steps_of(saved(tmp_path, lambda d: d.new_page()), [1], render="never")[1]["image"] is None


def test_a_blank_page_has_no_pixels_unless_they_are_asked_for(tmp_path):
    path = saved(tmp_path, lambda document: document.new_page())
    page = steps_of(path, [1])[1]
    assert page["blank"]
    assert page["image"] is None
    assert page["image_width_px"] > 0
    assert steps_of(path, [1], find_blank=False)[1]["image"] is not None


@pytest.mark.parametrize("size", [(14400, 14400), (3000, 9000), (10, 14400), (612, 792)])
def test_the_pixel_cap_holds_for_any_page_size(tmp_path, size):
    def fill(document):
        document.new_page(width=size[0], height=size[1]).draw_line((0, 0), size, width=5)

    page = steps_of(saved(tmp_path, fill), [1], max_pixels=1_000_000)[1]
    height, width, _ = page["image"].shape
    assert height * width <= 1_010_000
    assert width / height == pytest.approx(size[0] / size[1], rel=0.1)
    assert page["dpi"] == pytest.approx(width / size[0] * 72, rel=0.1)


def test_a_strip_that_would_vanish_under_the_caps_is_too_large():
    with pytest.raises(DecodeError) as caught:
        capped_scale(100, 2_000_000, 200 / 72, PageOptions())
    assert caught.value.code == "too_large"
    assert capped_scale(144, 18, 200 / 72, PageOptions()) == 200 / 72
    assert capped_scale(2e6, 2e6, 200 / 72, PageOptions()) == pytest.approx(6e6**0.5 / 2e6)


@pytest.mark.parametrize("size", [(0, 10), (float("inf"), 10), (float("nan"), 10)])
def test_a_size_that_is_none_is_damage(size):
    with pytest.raises(DecodeError) as caught:
        capped_scale(*size, 1.0, PageOptions())
    assert caught.value.code == "damaged"


def test_paper_grain_is_blank_and_a_lone_digit_is_not(tmp_path):
    paper = np.random.default_rng(0).normal(240, 6, (2200, 1700, 3)).clip(0, 255).astype(np.uint8)
    assert is_blank(paper)

    def fill(document):
        document.new_page().insert_text((300, 800), "7", fontsize=8)

    digit = steps_of(saved(tmp_path, fill), [1], render="always", find_blank=False)[1]["image"]
    assert not is_blank(digit)
    assert is_blank(np.full((3, 2, 3), 200, np.uint8))
