"""Orientation: turns and skews of real text are found; where there is no evidence a page stays as it is."""

import numpy as np
import pytest

from operators.orientation import Orientation, find_orientation, hull_size, upright
from tests.operators.reading_pages import LANGUAGES, page_of, render

WHITE = 255


def turned(image: np.ndarray, rotation: int, skew_degrees: float = 0.0) -> np.ndarray:
    """Return a page that needs `rotation` clockwise, and then `skew_degrees` counter-clockwise, to stand upright."""
    skewed = upright(image, Orientation(0, -skew_degrees, 1.0))
    return np.ascontiguousarray(np.rot90(skewed, rotation // 90))


@pytest.fixture(scope="module")
def english() -> np.ndarray:
    return page_of(LANGUAGES["english"], size=(595, 842), repeats=5)[0]


@pytest.fixture(scope="module")
def chinese() -> np.ndarray:
    return page_of(LANGUAGES["chinese"], size=(595, 842), repeats=5)[0]


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("skew_degrees", [0.0, 5.0, -8.0])
@pytest.mark.parametrize("language", ["english", "chinese"])
def test_turn_and_skew_of_print_are_found(language, rotation, skew_degrees, request) -> None:
    found = find_orientation(turned(request.getfixturevalue(language), rotation, skew_degrees))
    assert found.rotation == rotation
    assert found.skew_degrees == pytest.approx(skew_degrees, abs=0.5)
    assert found.confidence > 0.7


def test_a_page_that_was_put_upright_needs_nothing_more(english) -> None:
    crooked = turned(english, 90, 6.0)
    again = find_orientation(upright(crooked, find_orientation(crooked)))
    assert again.rotation == 0
    assert abs(again.skew_degrees) <= 0.5


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_a_script_that_cannot_be_read_is_not_turned_wrongly(rotation) -> None:
    page, _ = page_of(LANGUAGES["hindi"], repeats=3)
    assert find_orientation(turned(page, rotation)).rotation in (0, rotation)


def test_vertical_chinese_is_left_standing() -> None:
    characters = [c for c in LANGUAGES["chinese"] if c > "\u4e00" and c not in "，。、"]
    columns = ["<br>".join(characters[n : n + 18]) for n in range(0, 72, 18)]
    cells = "".join(f'<td style="padding-left:14px;font-size:13pt;line-height:1.0">{c}</td>' for c in columns)
    page, _ = page_of(f"<table><tr>{cells}</tr></table>")
    for turns in range(4):
        assert find_orientation(np.ascontiguousarray(np.rot90(page, turns))).rotation == 0


def test_blank_page_and_noise_and_few_letters_are_unknown() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 900, 3), np.uint8)
    for image in (np.full((1200, 900, 3), WHITE, np.uint8), noise, page_of("Normal")[0]):
        assert find_orientation(image) == Orientation(0, 0.0, 0.0)


def test_upright_keeps_all_content_and_fills_with_white() -> None:
    image = np.full((200, 300, 3), WHITE, np.uint8)
    image[:20, :20] = image[-20:, -20:] = 0
    straight = upright(image, Orientation(0, 10.0, 1.0))
    height, width = hull_size(200, 300, 10.0)
    assert straight.shape == (np.ceil(height), np.ceil(width), 3)
    assert straight[0, 0].tolist() == straight[-1, -1].tolist() == [WHITE] * 3
    assert (straight < 128).sum() == pytest.approx((image < 128).sum(), rel=0.02)


def test_quarter_turns_move_pixels_without_changing_them() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    clockwise = upright(image, Orientation(90, 0.0, 1.0))
    assert clockwise.shape == (7, 5, 3)
    assert np.array_equal(clockwise[0, -1], image[0, 0])
    assert np.array_equal(upright(clockwise, Orientation(270, 0.0, 1.0)), image)


@pytest.mark.needs_corpus
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize(
    ("name", "page_index", "skew_degrees"),
    [
        ("ccitt", 0, 0.0),
        ("rotated_skew", 0, -2.7),
        ("scan_ccitt_8pages", 0, 0.0),
        ("scan_ccitt_8pages", 3, 0.0),
        ("jbig2_jpx_ocr_layer_book", 0, 0.0),
        ("chinese_a3_demo", 0, 0.0),
        ("WARN-Report-for-7-1-2015-to-03-25-2016", 0, 0.0),
    ],
)
def test_scans_of_the_corpus(corpus, name, page_index, skew_degrees, rotation) -> None:
    image, _ = render(corpus / "pdf" / f"{name}.pdf", page_index)
    found = find_orientation(turned(image, rotation))
    assert found.rotation == rotation
    assert found.skew_degrees == pytest.approx(skew_degrees, abs=0.5)


@pytest.mark.needs_corpus
@pytest.mark.parametrize("skew_degrees", [-10.0, -5.5, -1.0, 2.0, 10.0])
@pytest.mark.parametrize("name", ["ccitt", "scan_ccitt_8pages", "chinese_a3_demo"])
def test_skews_of_the_corpus(corpus, name, skew_degrees) -> None:
    image, _ = render(corpus / "pdf" / f"{name}.pdf")
    found = find_orientation(turned(image, 0, skew_degrees))
    assert found.rotation == 0
    assert found.skew_degrees == pytest.approx(skew_degrees, abs=0.5)


@pytest.mark.needs_corpus
@pytest.mark.parametrize("name", ["lichtenstein", "blank", "vertical", "transparency_group"])
def test_photographs_and_blank_pages_are_not_turned(corpus, name) -> None:
    assert find_orientation(render(corpus / "pdf" / f"{name}.pdf")[0]) == Orientation(0, 0.0, 0.0)


@pytest.mark.needs_corpus
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("name", ["handwriting_bad_ocr", "devanagari_hindi_udhr_art1", "issue13211", "BidiSample"])
def test_unreadable_pages_are_turned_rightly_or_not_at_all(corpus, name, rotation) -> None:
    image, _ = render(corpus / "pdf" / f"{name}.pdf")
    assert find_orientation(turned(image, rotation)).rotation in (0, rotation)
