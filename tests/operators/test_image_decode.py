"""Image files as documents."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from operators.decode.image import decode_pages, probe
from operators.decode.pages import Opened, PageOptions
from schemas.errors import DecodeError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def two_halves(mode="RGB", size=(60, 20)):
    """Left half red, right half blue."""
    image = Image.new("RGB", size, BLUE)
    image.paste(RED, (0, 0, size[0] // 2, size[1]))
    return image.convert(mode)


def pages_of(path, numbers=(1,), **options):
    opened, *steps = decode_pages(str(path), None, list(numbers), PageOptions(**options))
    assert isinstance(opened, Opened)
    pages = {}
    for step in steps:
        pages.setdefault(step.page_number, {}).update(
            step.facts, image=step.image, failure=step.failure, blank=step.is_blank, last=step.is_last
        )
    return pages


def outcome_of(path):
    """Return the error code of a file's first page, or of the file."""
    try:
        return pages_of(path)[1]["failure"]["code"]
    except DecodeError as error:
        return error.code


def close_to(pixel, wanted, by=12):
    return np.abs(pixel.astype(int) - wanted).max() <= by


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp", "gif"])
def test_each_format_gives_one_rgb_page(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    two_halves().save(path, quality=95)
    [facts] = probe(str(path), None, 10)
    assert facts == {"page_count": 1, "width_px": 60, "height_px": 20}
    page = pages_of(path)[1]
    assert page["image"].shape == (20, 60, 3)
    assert page["image"].dtype == np.uint8
    assert close_to(page["image"][10, 5], RED)
    assert close_to(page["image"][10, 55], BLUE)
    # A BMP states 96 dots an inch where nothing else was said, the others nothing.
    dpi = 96 if suffix == "bmp" else 72
    assert page["dpi"] == pytest.approx(dpi, rel=1e-3)
    assert page["page_width_pt"] == pytest.approx(60 * 72 / dpi, rel=1e-3)
    assert page["has_text_layer"] is False


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_each_mode_becomes_rgb(tmp_path, mode):
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        grey = Image.fromarray(np.repeat(np.linspace(0, 65535, 60, dtype=kind)[None], 20, axis=0))
    else:
        grey = Image.fromarray(np.repeat(np.linspace(0, 255, 60, dtype=np.uint8)[None], 20, axis=0)).convert(mode)
    path = tmp_path / "a.tif"
    grey.save(path)
    image = pages_of(path, find_blank=False)[1]["image"]
    assert image.shape == (20, 60, 3)
    assert image[:, :3].mean() < 20
    assert image[:, -3:].mean() > 235


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied_once(tmp_path, suffix, orientation):
    # The corner that the orientation puts top left is marked.
    upright = np.full((40, 80, 3), 255, np.uint8)
    upright[:16, :16] = RED
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = image.getexif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    image.save(path, exif=exif, quality=95)
    [facts] = probe(str(path), None, 10)
    assert (facts["width_px"], facts["height_px"]) == (80, 40)
    page = pages_of(path)[1]
    assert page["image"].shape == (40, 80, 3)
    assert (page["page_width_pt"], page["page_height_pt"]) == (80, 40)
    assert close_to(page["image"][4, 4], RED, by=30)
    assert close_to(page["image"][36, 76], (255, 255, 255), by=30)


def test_transparent_parts_are_white(tmp_path):
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 20, 40))
    image.save(tmp_path / "a.png")
    image.quantize(4).save(tmp_path / "b.png")
    Image.new("L", (40, 40), 0).save(tmp_path / "c.png", transparency=0)
    for name in ("a.png", "b.png"):
        pixels = pages_of(tmp_path / name)[1]["image"]
        assert tuple(pixels[20, 5]) == RED
        assert tuple(pixels[20, 35]) == (255, 255, 255)
    assert pages_of(tmp_path / "c.png", find_blank=False)[1]["image"].min() == 255


def test_each_frame_of_a_tiff_is_a_page(tmp_path):
    frames = [Image.new("RGB", (30 + i, 20), (10 * i, 0, 0)) for i in range(5)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:], dpi=(144, 144))
    [facts] = probe(str(tmp_path / "a.tif"), None, 10)
    assert facts["page_count"] == 5
    pages = pages_of(tmp_path / "a.tif", [4, 2, 9], find_blank=False)
    assert list(pages) == [4, 2, 9]
    assert pages[4]["image"].shape == (20, 33, 3)
    assert tuple(pages[4]["image"][0, 0]) == (30, 0, 0)
    assert pages[4]["page_width_pt"] == 16.5
    assert pages[4]["dpi"] == pytest.approx(144)
    assert pages[9]["failure"]["code"] == "page_missing"


def test_more_frames_than_the_policy_are_refused(tmp_path):
    frame = Image.new("L", (8, 8))
    frame.save(tmp_path / "a.tif", save_all=True, append_images=[frame] * 5)
    with pytest.raises(DecodeError) as caught:
        list(probe(str(tmp_path / "a.tif"), None, 5))
    assert caught.value.code == "too_many_pages"


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_large_image_is_scaled_to_the_pixel_cap(tmp_path, suffix):
    two_halves(size=(3000, 1000)).save(tmp_path / f"a.{suffix}", dpi=(300, 300))
    page = pages_of(tmp_path / f"a.{suffix}", max_pixels=30_000)[1]
    assert page["image"].shape == (100, 300, 3)
    assert page["page_width_pt"] == pytest.approx(720, rel=1e-3)
    assert page["dpi"] == pytest.approx(30, rel=1e-3)
    assert close_to(page["image"][50, 20], RED)


def png_that_claims(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_too_large_before_it_is_decoded(tmp_path):
    (tmp_path / "a.png").write_bytes(png_that_claims(60_000, 60_000))
    assert pages_of(tmp_path / "a.png")[1]["failure"]["code"] == "too_large"


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "bmp"])
def test_a_truncated_image_is_damaged(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert outcome_of(path) == "damaged"


def test_a_header_without_an_image_is_damaged(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50)
    with pytest.raises(DecodeError) as caught:
        list(probe(str(tmp_path / "a.png"), None, 10))
    assert caught.value.code == "damaged"


def test_an_implausible_resolution_is_not_believed(tmp_path):
    two_halves().save(tmp_path / "a.jpg", dpi=(1, 1))
    assert pages_of(tmp_path / "a.jpg")[1]["page_width_pt"] == 60


def test_a_blank_image_has_no_pixels(tmp_path):
    Image.new("RGB", (100, 100), "white").save(tmp_path / "a.png")
    page = pages_of(tmp_path / "a.png")[1]
    assert page["blank"]
    assert page["image"] is None
