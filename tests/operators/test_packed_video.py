"""Clips of MiniCPM-V 4.5 and 2.6 from real videos: decoded, prepared, and counted."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest

from operators.decode.clips import DecodeClips, DecodeClipsConfig
from operators.decode.segments import decode_segments
from operators.fetch import sha256_of
from operators.minicpmv.config import read_model_config
from operators.minicpmv.packing import PackedConfig
from operators.minicpmv.slicing import SliceConfig
from operators.minicpmv.temporal import FramesConfig
from operators.minicpmv.tiny import write_tiny_model
from operators.prepare import PrepareClips, PrepareConfig, PrepareImages, read_pictures
from schemas.errors import PrepareError
from schemas.generation import RECORD
from schemas.source import UNIT
from tests.operators.conftest import numbered_frame
from tests.operators.rows45 import clip_in_packs
from tests.operators.rows46 import page_pictures, page_row, table_of
from tests.operators.video_recipes import recipe_packs

AT_25 = {"time_base": Fraction(1, 25), "ticks": range(250)}
QUERIES = SliceConfig(max_slices=1, query_count=64)


def pictures(item):
    found, offset = [], 0
    for shape in item["slice_shapes"]:
        size = shape["height_px"] * shape["width_px"] * 3
        found.append(item["pixels"][offset : offset + size].reshape(shape["height_px"], shape["width_px"], 3))
        offset += size
    assert offset == len(item["pixels"])
    return found


def decoded(path, start_seconds, stop_seconds, temporal, slicing=QUERIES):
    segment = {"segment_index": 0, "start_seconds": start_seconds, "stop_seconds": stop_seconds}
    [item] = decode_segments(str(path), [segment], {"temporal": temporal, "slicing": slicing})
    return item


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny45")
    write_tiny_model(path, "minicpmv4_5")
    return str(path)


def test_a_packed_segment_carries_its_packs(tmp_path, make_video, number_of):
    path = make_video(tmp_path / "a.mp4", **AT_25, options={"g": "50"})
    item = decoded(path, 2.0, 8.0, PackedConfig(fps=5, max_frames=10))
    packs = recipe_packs(150, 25.0, 5.0, 10, 6)
    assert [len(pack) for pack in packs] == [3] * 10
    assert [number_of(picture) for picture in pictures(item)] == [50 + frame for pack in packs for frame, _ in pack]
    assert item["temporal_ids"] == [[number for _, number in pack] for pack in packs]
    assert item["frame_timestamps_seconds"] == pytest.approx([2 + frame / 25 for pack in packs for frame, _ in pack])
    assert (item["packing"], item["pack_count"], item["frame_count_sampled"]) == ("3d_resampler", 10, 30)
    assert (item["sampling_policy"], item["target_fps"], item["sampled_fps"]) == ("minicpmv4_5", 5.0, 5.0)
    assert item["slice_grids"] == [{"rows": 0, "cols": 0}] * 10
    assert item["decoder"] == "decord"
    assert 0 < item["motion_score"] < 1


def test_a_wish_beyond_the_budget_is_told_by_the_rate_that_came_of_it(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4", **AT_25, options={"g": "50"})
    item = decoded(path, 0.0, 10.0, PackedConfig(fps=10, max_frames=10, max_packing=6))
    assert (item["target_fps"], item["sampled_fps"]) == (10.0, 6.0)
    assert [len(ids) for ids in item["temporal_ids"]] == [6] * 10


def test_sliced_frames_of_a_pack_stand_overviews_first_then_cell_by_cell(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4", time_base=Fraction(1, 25), ticks=range(25), size=(720, 1280))
    slicing = QUERIES.model_copy(update={"max_slices": 2})
    item = decoded(path, 0.0, 1.0, PackedConfig(fps=5, forced_packing=3), slicing)
    assert [len(ids) for ids in item["temporal_ids"]] == [3, 2]
    [grid, _] = item["slice_grids"]
    assert grid["rows"] * grid["cols"] == 2
    alone = decoded(path, 0.0, 1.0, PackedConfig(fps=5, forced_packing=1), slicing)
    frames = np.array(pictures(alone), object).reshape(5, 3)
    wanted = [*frames[:3].T.reshape(-1), *frames[3:].T.reshape(-1)]
    assert all(np.array_equal(one, other) for one, other in zip(pictures(item), wanted, strict=True))


def test_a_lost_frame_leaves_its_pack_shorter(tmp_path, make_video, number_of):
    path = make_video(tmp_path / "a.mp4", **AT_25, options={"x264-params": "keyint=50:scenecut=0"}, size=(240, 320))
    with av.open(str(path)) as opened:
        packets = [packet for packet in opened.demux(video=0) if packet.size]
        torn = [packet for packet in packets if 85 <= round(packet.pts * packet.time_base * 25) < 89]
        places = [(packet.pos, packet.size) for packet in torn]
    data = bytearray(path.read_bytes())
    for pos, size in places:
        data[pos : pos + size] = b"\xff" * size
    path.write_bytes(data)
    item = decoded(path, 2.0, 4.0, PackedConfig(fps=5, max_packing=4, forced_packing=4))
    # Frames 50 + 2, 7, 12, ... of which those from 85 to the next key frame at 100 are gone.
    assert [number_of(picture) for picture in pictures(item)] == [52, 57, 62, 67, 72, 77, 82]
    assert [len(ids) for ids in item["temporal_ids"]] == [4, 3]
    assert (item["pack_count"], item["frame_count_sampled"]) == (2, 7)
    assert item["damage_code"] == "damaged"
    assert len(item["slice_grids"]) == 2


def test_single_frames_are_those_of_the_recipe(tmp_path, make_video, number_of):
    path = make_video(tmp_path / "a.mp4", **AT_25, options={"g": "50"})
    item = decoded(path, 4.0, 8.0, FramesConfig())
    assert [number_of(picture) for picture in pictures(item)] == [100, 125, 150, 175]
    assert item["temporal_ids"] == [[0], [10], [20], [30]]
    assert (item["packing"], item["pack_count"], item["sampling_policy"]) == ("none", 4, "minicpmv2_6")


def units_of(path, stop_seconds):
    row = {
        "unit_id": "u",
        "source_index": 0,
        "source_uri": str(path),
        "task": "caption",
        "doc_id": sha256_of(path),
        "kind": "video",
        "segments": [{"segment_index": 0, "start_seconds": 0.0, "stop_seconds": stop_seconds}],
        "record_keys": ["k"],
    }
    return pa.Table.from_pylist([row], schema=UNIT)


def test_a_minute_at_ten_frames_a_second_costs_the_tokens_of_the_recipe(tmp_path, make_video, folder):
    path = make_video(tmp_path / "a.mp4", time_base=Fraction(1, 25), ticks=range(1500), options={"preset": "ultrafast"})
    # Slices of 56 px instead of 448: the counts are those of full size.
    slicing = QUERIES.model_copy(update={"slice_side_px": 56})
    decode = DecodeClips(DecodeClipsConfig(temporal=PackedConfig(fps=10), slicing=slicing))
    try:
        table = PrepareClips(PrepareConfig(model_folder=folder, slicing=slicing))(decode(units_of(path, 60.0)))
    finally:
        decode.close()
    [row] = table.to_pylist()
    assert row["error"] is None
    assert (row["target_fps"], row["sampled_fps"], row["packing"]) == (10.0, 9.0, "3d_resampler")
    assert (row["pack_count"], row["frame_count_sampled"]) == (180, 540)
    # decord would queue frames faster than they are taken.
    assert row["decoder"] == "pyav"
    assert [len(ids) for ids in row["temporal_ids"]] == [3] * 180
    assert row["image_tokens"] == 180 * 64
    tokens = read_model_config(Path(folder)).tokens
    ids = row["prompt_ids"]
    assert ids.count(tokens.image_pad) == 180 * 64
    assert ids.count(tokens.image_start) == ids.count(tokens.image_end) == 180
    first, last = ids.index(tokens.image_start), len(ids) - ids[::-1].index(tokens.image_end)
    assert last - first == 180 * 66 + 179
    pictures = read_pictures(table, 0, packed=True)
    assert pictures.slice_packs() == tuple(map(tuple, row["temporal_ids"]))
    assert len(pictures.shapes) == 540


@pytest.fixture(scope="module")
def frames():
    return [numbered_frame(number, 720, 1280) for number in range(5)]


@pytest.mark.parametrize("max_slices", [1, 2])
def test_the_slices_of_a_pack_are_resampled_cell_by_cell(folder, frames, max_slices):
    slicing = SliceConfig(max_slices=max_slices, query_count=64)
    prepare = PrepareClips(PrepareConfig(model_folder=folder, slicing=slicing))
    table = prepare(table_of(clip_in_packs(frames, [[0, 2, 4], [6, 8]], slicing)))
    [row] = table.to_pylist()
    assert row["error"] is None
    pictures = read_pictures(table, 0, packed=True)
    cells = 1 if max_slices == 1 else 3
    assert pictures.slice_packs() == ((0, 2, 4),) * cells + ((6, 8),) * cells
    assert row["image_tokens"] == 2 * cells * 64
    assert sum(map(len, pictures.slice_packs())) == len(pictures.shapes)


def test_the_content_key_covers_the_times_of_the_frames(folder, frames):
    prepare = PrepareClips(PrepareConfig(model_folder=folder, slicing=QUERIES))
    keys = [
        prepare(table_of(clip_in_packs(frames, ids, QUERIES)))["content_key"][0].as_py()
        for ids in ([[0, 2, 4], [6, 8]], [[0, 2, 4], [6, 9]], [[0, 2, 4], [6, 8]], [[0, 2], [4, 6, 8]])
    ]
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3


def test_temporal_ids_that_do_not_fit_the_slices_are_one_error_row(folder, frames):
    prepare = PrepareClips(PrepareConfig(model_folder=folder, slicing=QUERIES))
    good = clip_in_packs(frames, [[0, 2, 4], [6, 8]], QUERIES)
    rows = [good, good | {"temporal_ids": [[0, 2, 4, 6, 8]]}, good | {"temporal_ids": [[0, 2, 4], [6]]}]
    errors = [row["error"] for row in prepare(table_of(*rows)).to_pylist()]
    assert errors[0] is None
    assert [error["stage"] for error in errors[1:]] == ["preprocess"] * 2
    with pytest.raises(PrepareError, match="temporal ids of 1 packs, and grids of 2"):
        read_pictures(table_of(rows[1]), 0, packed=True)


def test_a_page_of_a_model_that_packs_has_no_packs(folder):
    table = PrepareImages(PrepareConfig(model_folder=folder, slicing=SliceConfig(query_count=64)))(
        table_of(page_row(page_pictures(1)[0]))
    )
    assert table.schema == RECORD
    pictures = read_pictures(table, 0, packed=True)
    assert pictures.slice_packs() is None
    assert table["image_tokens"][0].as_py() == 64 * len(pictures.shapes)


def test_the_cost_of_a_pack_does_not_depend_on_its_frames(folder, frames):
    prepare = PrepareClips(PrepareConfig(model_folder=folder, slicing=QUERIES))
    lengths = {
        len(prepare(table_of(clip_in_packs(frames[:count], [list(range(count))], QUERIES)))["prompt_ids"][0])
        for count in (1, 3, 5)
    }
    assert len(lengths) == 1


def test_settings_of_a_clip_travel_as_json():
    config = DecodeClipsConfig(temporal=PackedConfig(fps=10, forced_packing=4), slicing=QUERIES)
    assert DecodeClipsConfig.model_validate(json.loads(config.model_dump_json())) == config
