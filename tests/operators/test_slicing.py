import io
import os
import random

import numpy as np
import pymupdf
import pytest
from PIL import Image
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from operators.minicpmv.prompt import visual_tokens
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
CONNECTORS = (*({"downsample_mode": mode} for mode in MODES), {"query_count": 64})
"""What aligns the sides of slices: mergers of either mode, or patches where a resampler follows."""

LIMITS = (1, 2, 9, 36)
SIZES_EACH = int(os.environ.get("PAGEREEL_SLICING_SIZES", "12"))
"""Random sizes compared pixel by pixel, for each mode and limit."""


def noise(height_px, width_px, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)


def reference_unit(config):
    """Patch size and mode under which the reference aligns sides as the model does: where nothing merges, to a patch,
    which are two by two half patches."""
    return (7, "4x") if config.query_count else (14, config.downsample_mode)


def reference_slices(image, config):
    """The released processor's slices as (height, width, 3) uint8, and its grid."""
    side, mode = reference_unit(config)
    produced = REFERENCE(
        [Image.fromarray(image)],
        max_slice_nums=config.max_slices,
        patch_size=side,
        downsample_mode=mode,
        do_rescale=False,
        do_normalize=False,
    )
    packed = np.asarray(produced["pixel_values"])[0]
    slices, start = [], 0
    for rows, cols in np.asarray(produced["target_sizes"]).tolist():
        columns = packed[:, :, start * side : (start + rows * cols) * side]
        patches = columns.reshape(3, side, rows, cols, side)
        slices.append(patches.transpose(2, 1, 3, 4, 0).reshape(rows * side, cols * side, 3))
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


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("limit", LIMITS)
def test_pixels_equal_the_released_processor_on_random_sizes(connector, limit):
    config = SliceConfig(max_slices=limit, **connector)
    source = noise(1600, 1600)
    for height_px, width_px in random_sizes(SIZES_EACH, 1_200_000, seed=limit):
        height_px, width_px = min(height_px, 1600), min(width_px, 1600)
        assert_same_pixels(source[:height_px, :width_px], config)


def test_sizes_equal_the_released_processor_on_many_random_sizes():
    for connector in CONNECTORS:
        for limit in LIMITS:
            config = SliceConfig(max_slices=limit, **connector)
            patch, mode = reference_unit(config)
            for height_px, width_px in random_sizes(1000, 30_000_000, seed=7 * limit):
                plan = plan_slices(height_px, width_px, config)
                grid = REFERENCE.get_sliced_grid((height_px, width_px), limit, 448)
                assert plan.grid == (Grid(*grid) if grid else Grid(0, 0))
                assert plan.overview == REFERENCE.find_best_resize(
                    (height_px, width_px), 448, patch, mode, grid is None
                )
                if grid:
                    refined = REFERENCE.get_refine_size((height_px, width_px), grid, 448, patch, mode, True)
                    assert plan.sliced == refined


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize(
    ("height_px", "width_px"),
    [(1, 1), (1, 2), (2, 1), (7, 3), (20, 2000), (2000, 20), (1, 700), (700, 1), (448, 448), (449, 448), (448, 1344)],
)
def test_pixels_equal_the_released_processor_on_extreme_sizes(connector, height_px, width_px):
    for limit in LIMITS:
        assert_same_pixels(noise(height_px, width_px), SliceConfig(max_slices=limit, **connector))


def test_pixels_equal_the_released_processor_on_rendered_pages():
    document = pymupdf.open()
    for width_pt, height_pt, scale in ((595, 842, 2), (842, 595, 1.5), (200, 900, 2), (300, 300, 1)):
        page = document.new_page(width=width_pt, height=height_pt)
        page.insert_textbox(
            pymupdf.Rect(20, 20, width_pt - 20, height_pt - 20), "Invoices are due at once. " * 60, fontsize=9
        )
        data = page.get_pixmap(matrix=pymupdf.Matrix(scale, scale)).tobytes("png")
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        for connector in CONNECTORS:
            assert_same_pixels(image, SliceConfig(**connector))


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


COUNTS = [
    # width, height, limit; slices, patches and tokens with a resampler; slices, patches and tokens 16x; tokens 4x
    (1240, 1754, 9, (9, 9_234, 576), (9, 10_080, 630), 2_223),
    (1654, 2339, 9, (10, 10_260, 640), (10, 11_200, 700), 2_470),
    (2480, 3508, 9, (9, 9_234, 576), (9, 9_184, 574), 2_223),
    (1240, 1754, 36, (13, 13_302, 832), (13, 13_408, 838), 3_319),
    (1654, 2339, 36, (21, 21_426, 1_344), (21, 21_600, 1_350), 5_347),
    (2480, 3508, 36, (36, 36_866, 2_304), (36, 36_960, 2_310), 9_207),
    (1344, 1344, 9, (10, 10_240, 640), (10, 10_240, 640), 2_560),
    (1344, 1344, 36, (10, 10_240, 640), (10, 10_240, 640), 2_560),
    (1920, 1080, 1, (1, 1_032, 64), (1, 1_056, 66), 252),
    (1280, 720, 1, (1, 1_032, 64), (1, 1_056, 66), 252),
    (640, 360, 1, (1, 1_032, 64), (1, 1_056, 66), 252),
]
"""Made once with the released code: A4 pages of 150, 200 and 300 dpi, a square, and video frames."""


@pytest.mark.parametrize(("width_px", "height_px", "limit", "resampled", "merged", "fine_tokens"), COUNTS)
def test_common_sizes_give_the_published_counts(width_px, height_px, limit, resampled, merged, fine_tokens):
    made = []
    for connector in CONNECTORS:
        config = SliceConfig(max_slices=limit, **connector)
        shapes = plan_slices(height_px, width_px, config).shapes()
        patches = sum(shape.height_px * shape.width_px // 196 for shape in shapes)
        made.append((len(shapes), patches, sum(visual_tokens(shape, config) for shape in shapes)))
    assert made[2] == resampled
    assert made[0] == merged
    assert made[1][2] == fine_tokens


def test_the_plan_announces_the_shapes_that_slicing_makes():
    for mode in MODES:
        config = SliceConfig(downsample_mode=mode)
        image = noise(700, 1000)
        shapes = [piece.shape[:2] for piece in slice_image(image, config).slices]
        assert shapes == [tuple(size) for size in plan_slices(700, 1000, config).shapes()]


def test_sides_are_multiples_that_the_merges_need():
    assert best_resize(100, 37, SliceConfig(), upscale=False) == (112, 56)
    assert best_resize(100, 37, SliceConfig(downsample_mode="4x"), upscale=False) == (112, 28)
    assert best_resize(100, 37, SliceConfig(query_count=64), upscale=False) == (98, 42)
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
