"""Boxes of scans that were turned or deskewed: from a picture file to the blocks of the CPU engine."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from operators.base import rows_to_table
from operators.decode.documents import DecodeDocuments, DecodeDocumentsConfig
from operators.fetch import sha256_of
from operators.orientation import Orientation, upright
from operators.prepare import PrepareConfig, PrepareImages
from operators.read import ReadPages, ReadPagesConfig
from schemas.source import UNIT
from tests.operators.reading_pages import LANGUAGES, character_error_rate, page_of

TEXT = f"{LANGUAGES['english']}</p><p style='font-size:12pt'>Another. {LANGUAGES['english']}"
DPI = 200


@pytest.fixture(scope="module")
def read():
    """Return the decoded row of a picture file, and the row of its blocks."""
    decode = DecodeDocuments(DecodeDocumentsConfig(read_route="cpu"))
    steps = [PrepareImages(PrepareConfig(model_folder=None)), ReadPages(ReadPagesConfig())]

    def run(path: Path, pixels: np.ndarray) -> tuple[dict, dict]:
        Image.fromarray(pixels).save(path, dpi=(DPI, DPI))
        unit = {
            "unit_id": "u", "source_index": 0, "source_uri": str(path), "task": "parse", "doc_id": sha256_of(path),
            "kind": "image", "page_count": 1, "page_numbers": [1], "record_keys": ["k"],
        }  # fmt: skip
        decoded = decode(rows_to_table([unit], UNIT))
        table = decoded
        for step in steps:
            table = step(table)
        return decoded.to_pylist()[0], table.to_pylist()[0]

    yield run
    decode.close()


@pytest.fixture(scope="module")
def straight(read, tmp_path_factory):
    """Return a page that needs no correction: its pixels, and its rows."""
    pixels, _ = page_of(TEXT, size=(420, 500))
    return pixels, *read(tmp_path_factory.mktemp("straight") / "page.png", pixels)


def hull_about_the_centre(row: dict) -> np.ndarray:
    """Return left, top, right and bottom of all blocks, from the centre of the page."""
    boxes = np.array([block["bbox"] for block in row["blocks"]])
    hull = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
    return hull - np.tile([row["page_width_pt"] / 2, row["page_height_pt"] / 2], 2)


def share_of_ink_in_boxes(decoded: dict, row: dict) -> float:
    """Return the share of the dark pixels of the page that was read that lie in its boxes."""
    height, width = decoded["image_height_px"], decoded["image_width_px"]
    dark = np.frombuffer(decoded["image"], np.uint8).reshape(height, width, 3).min(axis=2) < 128
    covered = np.zeros_like(dark)
    scale_x, scale_y = width / row["page_width_pt"], height / row["page_height_pt"]
    for left, top, right, bottom in (block["bbox"] for block in row["blocks"]):
        covered[round(top * scale_y) : round(bottom * scale_y), round(left * scale_x) : round(right * scale_x)] = True
    return (dark & covered).sum() / dark.sum()


@pytest.mark.parametrize(
    ("turned", "rotation", "skew_degrees"),
    [
        (lambda pixels: np.ascontiguousarray(np.rot90(pixels)), 90, 0.0),
        (lambda pixels: upright(pixels, Orientation(0, -5.0, 1.0)), 0, 5.0),
    ],
    ids=["turned by 90", "skewed by 5"],
)
def test_boxes_of_a_corrected_scan_lie_on_the_corrected_page(
    read, straight, tmp_path, turned, rotation, skew_degrees
) -> None:
    pixels, _, plain = straight
    decoded, row = read(tmp_path / "page.png", turned(pixels))
    assert (row["status"], row["rotation"]) == ("success", rotation)
    assert row["skew_degrees"] == pytest.approx(skew_degrees, abs=0.5)
    assert row["page_width_pt"] == pytest.approx(row["image_width_px"] * 72 / DPI, abs=1)
    assert row["page_height_pt"] == pytest.approx(row["image_height_px"] * 72 / DPI, abs=1)
    for left, top, right, bottom in (block["bbox"] for block in row["blocks"]):
        assert 0 <= left < right <= row["page_width_pt"]
        assert 0 <= top < bottom <= row["page_height_pt"]
    assert share_of_ink_in_boxes(decoded, row) > 0.97
    assert hull_about_the_centre(row) == pytest.approx(hull_about_the_centre(plain), abs=4)
    assert character_error_rate(row["plain_text"], plain["plain_text"]) < 0.02


def test_a_straight_scan_keeps_its_size(straight) -> None:
    pixels, decoded, row = straight
    assert (row["rotation"], row["skew_degrees"]) == (0, 0.0)
    assert (row["image_height_px"], row["image_width_px"]) == pixels.shape[:2]
    assert share_of_ink_in_boxes(decoded, row) > 0.97
