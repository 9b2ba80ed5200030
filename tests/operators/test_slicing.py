import io
import os
import random

import numpy as np
import pymupdf
import pytest
from PIL import Image
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from operators.minicpmv.slicing import (
    SliceConfig,
    best_resize,
    choose_grid,
    cut_grid,
    nearest_multiple,
    plan_slices,
    refine,
    slice_image,
)
from schemas.errors import PrepareError
from schemas.image import Grid

REFERENCE = MiniCPMV4_6ImageProcessorPil(do_rescale=False, do_normalize=False)
MODES = ("16x", "4x")
LIMITS = (1, 2, 9, 36)
SIZES_EACH = int(os.environ.get("PAGEREEL_SLICING_SIZES", "12"))
"""Random sizes compared pixel by pixel, for each mode and limit."""


def noise(height_px, width_px, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)


def reference_slices(image, config):
    """The released processor's slices as (height, width, 3) uint8, and its grid."""
    produced = REFERENCE(
        [Image.fromarray(image)],
        max_slice_nums=config.max_slices,
        downsample_mode=config.downsample_mode,
        do_rescale=False,
        do_normalize=False,
    )
    packed = np.asarray(produced["pixel_values"])[0]
    slices, start = [], 0
    for rows, cols in np.asarray(produced["target_sizes"]).tolist():
        columns = packed[:, :, start * 14 : (start + rows * cols) * 14]
        patches = columns.reshape(3, 14, rows, cols, 14)
        slices.append(patches.transpose(2, 1, 3, 4, 0).reshape(rows * 14, cols * 14, 3))
        start += rows * cols
    return slices, Grid(*produced["grids"][0])


def assert_same_pixels(image, config):
    ours = slice_image(image, config)
    theirs, grid = reference_slices(image, config)
    assert ours.grid == grid
    assert len(ours.slices) == len(theirs)
    for one, other in zip(ours.slices, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def random_sizes(count, largest_area_px, seed):
    generator = random.Random(seed)
    for _ in range(count):
        area_px = generator.uniform(1, largest_area_px**0.5) ** 2
        ratio = generator.uniform(0.02, 1) ** generator.choice((0.2, 1, 1, -1, -0.2))
        yield max(1, round((area_px / ratio) ** 0.5)), max(1, round((area_px * ratio) ** 0.5))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", LIMITS)
def test_pixels_equal_the_released_processor_on_random_sizes(mode, limit):
    config = SliceConfig(max_slices=limit, downsample_mode=mode)
    source = noise(1600, 1600)
    for height_px, width_px in random_sizes(SIZES_EACH, 1_200_000, seed=limit):
        height_px, width_px = min(height_px, 1600), min(width_px, 1600)
        assert_same_pixels(source[:height_px, :width_px], config)


def test_sizes_equal_the_released_processor_on_many_random_sizes():
    for mode in MODES:
        for limit in LIMITS:
            config = SliceConfig(max_slices=limit, downsample_mode=mode)
            for height_px, width_px in random_sizes(1000, 30_000_000, seed=7 * limit):
                plan = plan_slices(height_px, width_px, config)
                grid = REFERENCE.get_sliced_grid((height_px, width_px), limit, 448)
                assert plan.grid == (Grid(*grid) if grid else Grid(0, 0))
                assert plan.overview == REFERENCE.find_best_resize((height_px, width_px), 448, 14, mode, grid is None)
                if grid:
                    refined = REFERENCE.get_refine_size((height_px, width_px), grid, 448, 14, mode, True)
                    assert plan.sliced == refined


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("height_px", "width_px"),
    [(1, 1), (1, 2), (2, 1), (7, 3), (20, 2000), (2000, 20), (1, 700), (700, 1), (448, 448), (449, 448), (448, 1344)],
)
def test_pixels_equal_the_released_processor_on_extreme_sizes(mode, height_px, width_px):
    for limit in LIMITS:
        assert_same_pixels(noise(height_px, width_px), SliceConfig(max_slices=limit, downsample_mode=mode))


def test_pixels_equal_the_released_processor_on_rendered_pages():
    document = pymupdf.open()
    for width_pt, height_pt, scale in ((595, 842, 2), (842, 595, 1.5), (200, 900, 2), (300, 300, 1)):
        page = document.new_page(width=width_pt, height=height_pt)
        page.insert_textbox(
            pymupdf.Rect(20, 20, width_pt - 20, height_pt - 20), "Invoices are due at once. " * 60, fontsize=9
        )
        data = page.get_pixmap(matrix=pymupdf.Matrix(scale, scale)).tobytes("png")
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        for mode in MODES:
            assert_same_pixels(image, SliceConfig(downsample_mode=mode))


def test_an_image_that_fits_one_slice_is_not_cut():
    assert choose_grid(448, 448, SliceConfig()) == Grid(0, 0)
    sliced = slice_image(noise(300, 220), SliceConfig())
    assert sliced.grid == Grid(0, 0)
    assert [piece.shape for piece in sliced.slices] == [(504, 392, 3)]


def test_one_slice_allowed_means_the_overview_alone():
    plan = plan_slices(2000, 3000, SliceConfig(max_slices=1))
    assert plan.grid == Grid(0, 0)
    assert plan.sliced is None
    assert len(plan.shapes()) == 1


def test_a_page_gives_the_published_counts():
    plan = plan_slices(2339, 1654, SliceConfig())
    assert len(plan.shapes()) == 10
    assert sum(size.height_px * size.width_px // 196 for size in plan.shapes()) == 11_200
    fine = plan_slices(2339, 1654, SliceConfig(downsample_mode="4x"))
    assert sum(size.height_px * size.width_px // 196 // 4 for size in fine.shapes()) == 2_470


def test_the_plan_announces_the_shapes_that_slicing_makes():
    for mode in MODES:
        config = SliceConfig(downsample_mode=mode)
        image = noise(700, 1000)
        shapes = [piece.shape[:2] for piece in slice_image(image, config).slices]
        assert shapes == [tuple(size) for size in plan_slices(700, 1000, config).shapes()]


def test_sides_are_multiples_that_the_merges_need():
    assert best_resize(100, 37, SliceConfig(), upscale=False) == (112, 56)
    assert best_resize(100, 37, SliceConfig(downsample_mode="4x"), upscale=False) == (112, 28)
    assert refine(1000, 700, Grid(2, 2), SliceConfig()) == (1120, 784)


def test_ties_round_to_the_even_multiple():
    assert nearest_multiple(84, 56) == 112
    assert nearest_multiple(140, 56) == 112
    assert nearest_multiple(0.4, 56) == 56


def test_cells_are_cut_row_by_row():
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    cells = cut_grid(image, Grid(rows=2, cols=3))
    assert [cell.shape for cell in cells] == [(2, 2, 3)] * 6
    np.testing.assert_array_equal(cells[4], image[2:4, 2:4])


@pytest.mark.parametrize("shape", [(10, 10), (10, 10, 4), (0, 10, 3)])
def test_what_is_not_an_rgb_image_is_refused(shape):
    with pytest.raises(PrepareError):
        slice_image(np.zeros(shape, np.uint8), SliceConfig())


def test_a_float_image_is_refused():
    with pytest.raises(PrepareError, match="uint8"):
        slice_image(np.zeros((10, 10, 3), np.float32), SliceConfig())
