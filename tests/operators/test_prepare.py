import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from operators.minicpmv.config import read_model_config
from operators.minicpmv.demo import write_demo_model
from operators.minicpmv.slicing import Size, SliceConfig, slice_image
from operators.prepare import PrepareClips, PrepareConfig, PrepareImages, read_pictures
from operators.prompts import prompt_for
from schemas.errors import ConfigError, ContractError, PrepareError
from schemas.generation import DECODED, RECORD
from schemas.image import PIXELS, Grid
from tests.operators.rows46 import clip_frames, clip_row, page_pictures, page_row, table_of

FAILED = {"stage": "render", "error_code": "render", "error_category": "backend_failure", "message": "no"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_demo_model(path)
    return str(path)


@pytest.fixture(scope="module")
def images(folder):
    return PrepareImages(PrepareConfig(model_folder=folder))


@pytest.fixture(scope="module")
def clips(folder):
    return PrepareClips(PrepareConfig(model_folder=folder, slicing=SliceConfig(max_slices=1)))


@pytest.fixture(scope="module")
def picture():
    return page_pictures(1)[0]


def test_a_page_becomes_slices_and_a_prompt(images, picture):
    table = images(table_of(page_row(picture)))
    assert table.schema == RECORD
    [row] = table.to_pylist()
    sliced = slice_image(picture, SliceConfig())
    assert row["slice_grids"] == [sliced.grid._asdict()]
    assert [tuple(shape.values()) for shape in row["slice_shapes"]] == [piece.shape[:2] for piece in sliced.slices]
    pictures = read_pictures(table, 0)
    np.testing.assert_array_equal(pictures.pixels, np.concatenate([piece.reshape(-1) for piece in sliced.slices]))
    assert row["pixel_encoding"] == "zstd"
    assert len(row["pixels"]) < pictures.pixels.size
    patches = sum(size.height_px * size.width_px // 196 for size in pictures.shapes)
    assert row["image_tokens"] == patches // 16
    prompt = prompt_for("ocr", "pdf", None)
    assert (row["prompt_id"], row["prompt_sha256"]) == (prompt.prompt_id, prompt.sha256)
    assert len(row["prompt_ids"]) > row["image_tokens"]
    assert len(row["content_key"]) == 64
    assert row["error"] is None
    assert row["completion"] is None


def test_a_page_for_the_cpu_engine_stays_whole(picture):
    operator = PrepareImages(PrepareConfig(model_folder=None))
    table = operator(table_of(page_row(picture, route="cpu")))
    [row] = table.to_pylist()
    pictures = read_pictures(table, 0)
    assert pictures.shapes == (Size(*picture.shape[:2]),)
    assert pictures.grids == (Grid(0, 0),)
    np.testing.assert_array_equal(pictures.pixels.reshape(picture.shape), picture)
    assert row["prompt_ids"] is None
    assert row["prompt_id"] is None
    assert row["content_key"] is not None


@pytest.mark.parametrize("route", ["text_layer", "none", None])
def test_a_page_that_nothing_reads_has_no_pixels(images, route):
    [row] = images(table_of(page_row(np.zeros((4, 4, 3), np.uint8), route=route, image=None))).to_pylist()
    assert row["pixels"] is None
    assert row["prompt_ids"] is None
    assert row["error"] is None
    assert row["route"] == route


def test_a_failed_row_passes_through_without_pixels(images, picture):
    [row] = images(table_of(page_row(picture, error=FAILED, recovered=[FAILED]))).to_pylist()
    assert row["error"]["error_code"] == "render"
    assert row["recovered"][0]["message"] == "no"
    assert row["pixels"] is None


def test_an_empty_batch_becomes_empty_records(images, clips):
    assert images(DECODED.empty_table()).schema == RECORD
    assert clips(DECODED.empty_table()).schema == RECORD


def test_a_missing_column_breaks_the_contract(images, picture):
    with pytest.raises(ContractError, match="route"):
        images(table_of(page_row(picture)).drop_columns(["route"]))


def test_one_bad_row_costs_one_row(images, picture):
    rows = [page_row(picture), page_row(picture, image=b"123"), page_row(picture, image=None), page_row(picture)]
    prepared = images(table_of(*rows)).to_pylist()
    assert [row["error"] is None for row in prepared] == [True, False, False, True]
    assert prepared[1]["error"]["stage"] == "preprocess"
    assert prepared[1]["error"]["component"] == "PrepareImages"
    assert prepared[1]["pixels"] is None
    assert prepared[0]["content_key"] == prepared[3]["content_key"]


def test_a_prompt_that_is_too_long_is_an_error_row(folder, picture):
    operator = PrepareImages(PrepareConfig(model_folder=folder, max_prompt_tokens=100))
    [row] = operator(table_of(page_row(picture))).to_pylist()
    assert row["error"]["error_code"] == "prompt_too_long"
    assert row["error"]["error_category"] == "policy"


def test_a_page_that_cannot_be_asked_of_the_model_is_kept_whole(folder, picture):
    operator = PrepareImages(PrepareConfig(model_folder=folder, max_prompt_tokens=100))
    table = operator(table_of(page_row(picture)))
    pictures = read_pictures(table, 0)
    assert (pictures.shapes, pictures.grids) == ((Size(*picture.shape[:2]),), (Grid(0, 0),))
    np.testing.assert_array_equal(pictures.pixels.reshape(picture.shape), picture)
    [row] = table.to_pylist()
    assert (row["prompt_ids"], row["content_key"]) == (None, None)


def test_a_model_route_without_a_model_breaks_the_contract(picture):
    with pytest.raises(ContractError, match="model_folder"):
        PrepareImages(PrepareConfig(model_folder=None))(table_of(page_row(picture)))


def test_a_folder_that_is_no_model_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError):
        PrepareImages(PrepareConfig(model_folder=str(tmp_path)))


def test_the_content_key_is_of_what_the_model_sees(folder, picture):
    def key(row, **options):
        [record] = PrepareImages(PrepareConfig(model_folder=folder, **options))(table_of(row)).to_pylist()
        return record["content_key"]

    first = key(page_row(picture))
    other = picture.copy()
    other[0, 0, 0] ^= 255
    assert key(page_row(picture, doc_id="another", page_number=7, record_key="x")) == first
    different = {
        first,
        key(page_row(other)),
        key(page_row(picture, task="parse")),
        key(page_row(picture), thinking=True),
        key(page_row(picture), custom_prompt="Count the words."),
        key(page_row(picture), slicing=SliceConfig(downsample_mode="4x")),
        key(page_row(picture), decode_params=json.dumps({"temperature": 1})),
    }
    assert len(different) == 7


def test_a_clip_keeps_its_pixels_and_gets_a_prompt(clips):
    frames = clip_frames(3)
    decoded = table_of(clip_row(frames, SliceConfig(max_slices=1)))
    table = clips(decoded)
    assert table.schema == RECORD
    for name in PIXELS.names:
        assert table[name].to_pylist() == decoded[name].to_pylist()
    [row] = table.to_pylist()
    assert row["prompt_id"] == prompt_for("caption", "video", None).prompt_id
    patches = sum(shape["height_px"] * shape["width_px"] // 196 for shape in row["slice_shapes"])
    assert row["image_tokens"] == patches // 16


def test_pages_are_numbered_and_clips_are_not(folder, images, clips, picture):
    number = read_model_config(Path(folder)).tokens.image_id_start
    clip = clip_row(clip_frames(3), SliceConfig(max_slices=1))
    assert images(table_of(page_row(picture)))["prompt_ids"][0].as_py().count(number) == 1
    assert clips(table_of(clip))["prompt_ids"][0].as_py().count(number) == 0
    numbered = PrepareClips(PrepareConfig(model_folder=folder, use_image_id=True))
    assert numbered(table_of(clip))["prompt_ids"][0].as_py().count(number) == 1


def test_a_clip_whose_pixels_do_not_fit_is_an_error_row(clips):
    slicing = SliceConfig(max_slices=1)
    good = clip_row(clip_frames(3), slicing)
    rows = [
        good,
        good | {"pixels": good["pixels"][:-1]},
        good | {"slice_grids": [{"rows": 2, "cols": 2}]},
        good | {"pixels": None},
        good | {"pixel_encoding": "jpeg"},
        good | {"pixel_encoding": "zstd"},
    ]
    errors = [row["error"] for row in clips(table_of(*rows)).to_pylist()]
    assert errors[0] is None
    assert [error["error_code"] for error in errors[1:]] == ["internal"] * 5


def test_pixels_can_be_read_back_from_a_sliced_table(images):
    first, second = page_pictures(2, seed=5)
    table = images(table_of(page_row(first), page_row(second)))
    wanted = read_pictures(table, 1)
    found = read_pictures(table.slice(1), 0)
    np.testing.assert_array_equal(found.pixels, wanted.pixels)
    with pytest.raises(PrepareError, match="pixels"):
        read_pictures(pa.Table.from_pylist([{}], schema=RECORD), 0)
