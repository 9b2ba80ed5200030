"""Adaptive enlarging against the released code itself; only its resampling, which wants torchvision, is replaced."""

import os
import random
import string

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers.models.minicpm_ocr.image_processing_minicpm_ocr import (
    MiniCPMOcrImageProcessor,
    adaptive_upsize_resolution,
)

from operators.minicpmv.prompt import image_tokens
from operators.minicpmv.slicing import Size, SliceConfig, adapt_cell, best_resize, cut_evenly, plan_slices, slice_image
from operators.minicpmv.upsize import TINY_SIDE_PX, glyph_heights, wanted_side_px
from schemas.image import Grid

UPSIZES = ("always", "never", "adaptive")
PICTURES = int(os.environ.get("PAGEREEL_UPSIZE_PICTURES", "40"))
"""Random pictures compared pixel by pixel, in each of the three ways."""


class Released(MiniCPMOcrImageProcessor):
    """The released processor with Pillow's filter, which torchvision's imitates to two grey levels."""

    def __init__(self):
        """Do nothing: the constructor asks for torchvision."""

    def resize(self, image, size, **_):
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        resized = picture.resize((size.width, size.height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def released_slices(image, config):
    """The slices as (height, width, 3) uint8, and the grid."""
    made = Released()._preprocess(
        [torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))],
        do_resize=True,
        resample=None,
        do_rescale=False,
        rescale_factor=1.0,
        do_normalize=False,
        image_mean=None,
        image_std=None,
        max_slice_nums=config.max_slices,
        scale_resolution=config.slice_side_px,
        patch_size=config.patch_px,
        slice_mode=True,
        small_image_upsize=config.small_image_upsize,
        return_tensors=None,
        disable_grouping=True,
        downsample_mode=config.downsample_mode,
    )
    packed, slices, start = made["pixel_values"][0].numpy().astype(np.uint8), [], 0
    for rows, cols in made["target_sizes"].tolist():
        patches = packed[:, :, start * 14 : (start + rows * cols) * 14].reshape(3, 14, rows, cols, 14)
        slices.append(patches.transpose(2, 1, 3, 4, 0).reshape(rows * 14, cols * 14, 3))
        start += rows * cols
    return slices, Grid(*made["grids"][0])


def write_text(drawing, dice, box, size_px, ink):
    """Fill a box with lines of letters."""
    font = ImageFont.load_default(size_px)
    left, top, right, bottom = box
    for height_px in range(top, bottom, max(1, round(size_px * dice.uniform(1.1, 1.6)))):
        letters = "".join(dice.choices(string.ascii_letters + "  .,", k=max(1, round((right - left) / size_px * 1.6))))
        drawing.text((left, height_px), letters, ink, font)


def page_like(height_px, width_px, seed):
    """Dark text of several sizes on a light page, or the other way round; some areas stay empty or show noise."""
    dice = random.Random(seed)
    ground, ink = dice.choice((((250, 250, 245), (20, 20, 30)), ((15, 25, 40), (230, 235, 220))))
    picture = Image.new("RGB", (width_px, height_px), ground)
    drawing = ImageDraw.Draw(picture)
    bands = dice.randint(1, 3)
    for band in range(bands):
        box = (2, height_px * band // bands, width_px, height_px * (band + 1) // bands)
        if dice.random() < 0.7:
            write_text(drawing, dice, box, dice.choice((6, 8, 10, 14, 18, 24, 32, 48)), ink)
    array = np.array(picture)
    if dice.random() < 0.15:
        rows, cols = height_px // 2, width_px // 2
        noise = np.random.default_rng(seed).integers(0, 256, (rows, cols, 3), dtype=np.uint8)
        array[:rows, :cols] = noise
    return array


def sizes(count, seed):
    """Tiny pictures, pictures of about one slice, and pages, of all shapes."""
    dice = random.Random(seed)
    for number in range(count):
        area_px = dice.uniform(*((8, 90), (60, 500), (400, 1400))[number % 3]) ** 2
        ratio = dice.uniform(0.15, 1) ** dice.choice((0.2, 1, -1, -0.2))
        yield max(1, round((area_px / ratio) ** 0.5)), max(1, round((area_px * ratio) ** 0.5))


@pytest.mark.parametrize("upsize", UPSIZES)
@pytest.mark.parametrize("mode", ["4x", "16x"])
def test_pixels_equal_the_released_processor_on_pages_of_text(mode, upsize):
    smaller = 0
    for number, (height_px, width_px) in enumerate(sizes(PICTURES // 2, seed=5)):
        limit = (1, 2, 9, 36)[number % 4]
        config = SliceConfig(max_slices=limit, downsample_mode=mode, small_image_upsize=upsize)
        image = page_like(height_px, width_px, seed=number)
        ours, (theirs, grid) = slice_image(image, config), released_slices(image, config)
        assert ours.grid == grid
        assert len(ours.slices) == len(theirs)
        for one, other in zip(ours.slices, theirs, strict=True):
            np.testing.assert_array_equal(one, other)
        always = config.model_copy(update={"small_image_upsize": "always"})
        smaller += [piece.shape[:2] for piece in ours.slices] != plan_slices(height_px, width_px, always).shapes()
    assert (smaller > PICTURES // 10) == (upsize != "always")


def test_the_choice_of_a_side_equals_the_released_one():
    chosen = []
    for number, (height_px, width_px) in enumerate(sizes(120, seed=11)):
        height_px, width_px = min(height_px, 400), min(width_px, 400)
        image = page_like(height_px, width_px, seed=1000 + number)
        chosen.append(wanted_side_px(image, 448))
        assert chosen[-1] == adaptive_upsize_resolution(image.transpose(2, 0, 1), 448)
    assert {448, TINY_SIDE_PX, None} == set(chosen)
    assert min(chosen.count(side) for side in set(chosen)) >= 5


def written(height_px, width_px, size_px, *, light=False):
    ground, ink = ((0, 0, 0), (255, 255, 255)) if light else ((255, 255, 255), (0, 0, 0))
    picture = Image.new("RGB", (width_px, height_px), ground)
    write_text(ImageDraw.Draw(picture), random.Random(0), (0, 0, width_px, height_px), size_px, ink)
    return np.array(picture)


@pytest.mark.parametrize("light", [False, True])
def test_small_dense_text_is_enlarged_and_large_text_is_not(light):
    assert wanted_side_px(written(300, 300, 8, light=light), 448) == 448
    assert wanted_side_px(written(300, 300, 60, light=light), 448) is None
    assert wanted_side_px(written(60, 60, 60, light=light), 448) == TINY_SIDE_PX


def test_empty_pictures_have_no_glyphs():
    for level in (0, 128, 255):
        assert glyph_heights(np.full((50, 40, 3), level, np.uint8)).size == 0
    assert wanted_side_px(np.full((100, 100, 3), 255, np.uint8), 448) is None


def test_frames_and_rules_are_no_glyphs():
    picture = Image.new("RGB", (100, 100), "white")
    drawing = ImageDraw.Draw(picture)
    drawing.rectangle((1, 1, 98, 98), outline="black")
    drawing.line((5, 50, 96, 50), "black")
    drawing.point((30, 30), "black")
    assert glyph_heights(np.array(picture)).size == 0
    drawing.rectangle((20, 20, 24, 29), fill="black")
    np.testing.assert_array_equal(glyph_heights(np.array(picture)), [10])


def test_a_small_picture_keeps_its_size_where_it_is_not_enlarged():
    image = written(300, 220, 40)
    shapes = {
        upsize: [piece.shape[:2] for piece in slice_image(image, SliceConfig(small_image_upsize=upsize)).slices]
        for upsize in UPSIZES
    }
    assert shapes == {"always": [(504, 392)], "never": [(280, 224)], "adaptive": [(280, 224)]}
    assert plan_slices(300, 220, SliceConfig(small_image_upsize="never")).shapes() == [(280, 224)]


def test_cells_of_one_page_may_differ_in_size_and_so_in_tokens():
    page = np.full((860, 860, 3), 255, np.uint8)
    page[:430, :430] = written(430, 430, 8)
    config = SliceConfig(downsample_mode="4x", small_image_upsize="adaptive")
    sliced = slice_image(page, config)
    assert sliced.grid == Grid(2, 2)
    shapes = [Size(*piece.shape[:2]) for piece in sliced.slices]
    planned = plan_slices(860, 860, config).shapes()
    assert shapes[1] == planned[1]
    assert all(shape.height_px * shape.width_px < planned[1].height_px * planned[1].width_px for shape in shapes[2:])
    [image] = image_tokens(shapes, [sliced.grid], config)
    assert len(set(image.counts[1:])) > 1
    assert sum(image.counts) * 4 == sum(shape.height_px * shape.width_px // 196 for shape in shapes)


def test_parts_of_an_image_are_cut_at_rounded_borders():
    image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    parts = cut_evenly(image, Grid(rows=2, cols=2))
    # Half a row and half a column are rounded to the even one.
    assert [part.shape[:2] for part in parts] == [(2, 4), (2, 3), (3, 4), (3, 3)]
    np.testing.assert_array_equal(parts[3], image[2:, 4:])
    assert cut_evenly(image[:1], Grid(rows=3, cols=1))[0].size == 0


@pytest.mark.parametrize("part_px", [(0, 300), (449, 448), (448, 448)])
def test_a_cell_stays_where_its_part_is_empty_or_no_smaller(part_px):
    config = SliceConfig(downsample_mode="4x", small_image_upsize="adaptive")
    cell = np.zeros((448, 448, 3), np.uint8)
    assert adapt_cell(np.full((*part_px, 3), 255, np.uint8), cell, config) is cell


def test_another_side_gives_a_slice_of_its_area():
    config = SliceConfig(downsample_mode="4x")
    assert best_resize(50, 50, config, upscale=True, side_px=84) == (84, 84)
    assert best_resize(50, 50, config, upscale=True) == (448, 448)
