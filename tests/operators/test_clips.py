"""Units of videos to segments, through a real decoder process."""

import os
import signal
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest

from operators.decode.clips import DecodeClips, DecodeClipsConfig
from operators.decode.process import BoxLimits
from operators.fetch import sha256_of
from operators.minicpmv.temporal import StackedConfig
from schemas.errors import ContractError, DecodeError, error_struct
from schemas.generation import DECODED
from schemas.source import UNIT


@pytest.fixture
def video(tmp_path, make_video):
    return make_video(tmp_path / "a.mp4", time_base=Fraction(1, 25), ticks=range(250), options={"g": "50"})


@pytest.fixture
def operator():
    operators = []

    def make(**fields):
        operators.append(DecodeClips(DecodeClipsConfig(**fields)))
        return operators[-1]

    yield make
    for made in operators:
        made.close()


def unit(path, ranges, **fields):
    segments = [
        {"segment_index": number, "start_seconds": start, "stop_seconds": stop}
        for number, (start, stop) in enumerate(ranges)
    ]
    return {
        "unit_id": "u1",
        "source_index": 7,
        "source_uri": str(path),
        "task": "caption",
        "doc_id": sha256_of(path) if path.exists() else None,
        "kind": "video",
        "segments": segments,
        "record_keys": [f"k{number}" for number in range(len(segments))],
        **fields,
    }


def units(*rows):
    return pa.Table.from_pylist(list(rows), schema=UNIT)


THREE = [(0.0, 4.0), (4.0, 8.0), (8.0, 10.0)]


def test_a_unit_becomes_one_row_a_segment(video, operator, number_of):
    table = operator()(units(unit(video, THREE)))
    assert table.schema == DECODED
    rows = table.to_pylist()
    assert [row["record_key"] for row in rows] == ["k0", "k1", "k2"]
    assert [row["segment_index"] for row in rows] == [0, 1, 2]
    assert [row["frame_count_sampled"] for row in rows] == [4, 4, 2]
    row = rows[1]
    assert (row["unit_id"], row["source_index"], row["doc_id"], row["kind"]) == ("u1", 7, sha256_of(video), "video")
    assert (row["route"], row["route_reason"], row["segmentation"]) == ("model", "video", "fixed_stride")
    assert (row["start_frame"], row["stop_frame"], row["decoder"]) == (100, 200, "decord")
    assert (row["error"], row["recovered"]) == (None, None)
    assert row["pixel_encoding"] == "raw"
    sizes = [shape["height_px"] * shape["width_px"] * 3 for shape in row["slice_shapes"]]
    assert sum(sizes) == len(row["pixels"])
    height_px, width_px = row["slice_shapes"][0].values()
    first = np.frombuffer(row["pixels"], np.uint8, sizes[0]).reshape(height_px, width_px, 3)
    assert number_of(first) == 100
    assert row["slice_grids"] == [{"rows": 0, "cols": 0}] * 4


def test_segments_come_one_table_at_a_time(video, operator):
    sizes = [table.num_rows for table in operator().run(units(unit(video, THREE)))]
    assert sizes == [0, 1, 1, 1]


def test_a_unit_with_an_error_yields_nothing(video, operator):
    failed = error_struct(DecodeError("no video stream", code="no_video_stream"), "ProbeSources")
    table = operator()(units(unit(video, THREE, error=failed)))
    assert table.num_rows == 0
    assert table.schema == DECODED


def test_an_empty_batch_keeps_its_schema(operator):
    assert operator()(UNIT.empty_table()).schema == DECODED


def test_a_missing_column_breaks_the_contract(operator):
    with pytest.raises(ContractError, match="segments"):
        operator()(UNIT.empty_table().drop_columns(["segments"]))


def test_a_unit_of_pages_breaks_the_contract(video, operator):
    with pytest.raises(ContractError, match="video"):
        operator()(units(unit(video, THREE, kind="pdf")))


def test_sampling_follows_the_config(video, operator):
    [row] = operator(temporal=StackedConfig(fps=2.0, stack_frames=2))(units(unit(video, [(0.0, 2.0)]))).to_pylist()
    assert row["frame_timestamps_seconds"] == pytest.approx([0, 0.24, 0.5, 0.72, 1.0, 1.24, 1.48, 1.72], abs=0.021)
    assert (row["target_fps"], row["sampled_fps"], row["packing"]) == (2.0, 2.0, "stack")
    assert (row["pack_count"], row["frame_count_sampled"]) == (8, 8)


def test_a_file_that_cannot_be_opened_gives_an_error_row_for_each_segment(tmp_path, operator):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"\0\0\0\x18ftypisom" + b"\0" * 400)
    rows = operator()(units(unit(path, THREE), unit(tmp_path / "gone.mp4", [(0.0, 4.0)]))).to_pylist()
    assert [row["error"]["error_code"] for row in rows] == ["damaged"] * 3 + ["not_found"]
    assert [row["error"]["stage"] for row in rows] == ["demux"] * 3 + ["fetch"]
    assert [row["start_seconds"] for row in rows] == [0.0, 4.0, 8.0, 0.0]
    assert {row["pixels"] for row in rows} == {None}


def test_bytes_that_changed_since_they_were_planned_are_not_decoded(video, operator, make_video):
    planned = unit(video, THREE)
    made = operator()
    assert [row["error"] for row in made(units(planned)).to_pylist()] == [None] * 3
    make_video(video, time_base=Fraction(1, 25), ticks=range(200), options={"g": "50"})
    rows = made(units(planned)).to_pylist()
    assert [row["record_key"] for row in rows] == ["k0", "k1", "k2"]
    assert {(row["error"]["stage"], row["error"]["error_code"], row["error"]["retryable"]) for row in rows} == {
        ("fetch", "unreadable", True)
    }
    assert "changed since it was planned" in rows[0]["error"]["message"]
    assert {row["pixels"] for row in rows} == {None}


def test_what_a_cut_file_lost_is_told_in_the_row(tmp_path, make_video, operator):
    path = make_video(
        tmp_path / "a.mp4",
        time_base=Fraction(1, 25),
        ticks=range(250),
        options={"g": "25", "bf": "0", "preset": "ultrafast"},
        container_options={"movflags": "faststart"},
        size=(240, 320),
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    whole, partial, lost = operator()(units(unit(path, THREE))).to_pylist()
    assert (whole["error"], whole["recovered"]) == (None, None)
    assert partial["error"] is None
    assert partial["pixels"]
    assert [problem["error_code"] for problem in partial["recovered"]] == ["truncated_stream"]
    assert lost["error"]["error_code"] == "truncated_stream"
    assert lost["error"]["error_category"] == "corrupt_input"


def test_pixels_beyond_the_bound_are_one_error_row(video, operator):
    rows = operator(max_segment_bytes=2_000_000)(units(unit(video, THREE))).to_pylist()
    assert [row["error"] and row["error"]["error_code"] for row in rows] == ["too_large", "too_large", None]
    assert rows[0]["error"]["stage"] == "preprocess"


def killed_after_the_first(made, table, number):
    """Return the rows of a unit whose decoder gets a signal after the first one."""
    rows = []
    for part in made.run(table):
        rows += part.to_pylist()
        if len(rows) == 1:
            os.kill(made.box.process_id, number)
    return rows


def test_a_segment_at_which_decord_died_is_read_again_by_pyav(video, operator):
    made = operator()
    rows = killed_after_the_first(made, units(unit(video, THREE)), signal.SIGSEGV)
    assert [row["error"] for row in rows] == [None, None, None]
    assert [row["decoder"] for row in rows] == ["decord", "pyav", "pyav"]
    [problem] = rows[1]["recovered"]
    assert (problem["error_code"], problem["exit_signal"]) == ("crash", signal.SIGSEGV)
    assert rows[2]["recovered"] is None
    assert made.box.start_count == 2


def test_a_segment_whose_decoder_was_ended_from_outside_is_begun_again_as_it_was(video, operator):
    undisturbed = operator()(units(unit(video, THREE))).to_pylist()
    made = operator()
    assert killed_after_the_first(made, units(unit(video, THREE)), signal.SIGKILL) == undisturbed
    assert made.box.start_count == 2


def test_a_segment_that_is_killed_too_often_is_an_error_that_a_later_run_may_try_again(video, operator):
    made = operator(outside_kills=0, decoder="pyav")
    rows = killed_after_the_first(made, units(unit(video, THREE)), signal.SIGKILL)
    [error] = [row["error"] for row in rows if row["error"]]
    assert (error["error_code"], error["exit_signal"], error["retryable"]) == ("crash", signal.SIGKILL, True)


def test_a_death_under_pyav_costs_one_segment(video, operator):
    rows = killed_after_the_first(operator(decoder="pyav"), units(unit(video, THREE)), signal.SIGSEGV)
    assert [row["error"] and row["error"]["error_code"] for row in rows] == [None, "crash", None]
    assert rows[1]["error"]["exit_signal"] == signal.SIGSEGV
    assert rows[1]["record_key"] == "k1"


def test_after_three_deaths_the_rest_of_a_unit_is_not_tried(video, operator):
    made = operator(decoder="pyav", open_timeout_seconds=1e-6, segment_timeout_seconds=1e-6)
    ranges = [(float(number), number + 1.0) for number in range(6)]
    rows = made(units(unit(video, ranges))).to_pylist()
    assert [row["error"]["error_code"] for row in rows] == ["time_limit"] * 6
    assert ["not tried" in row["error"]["message"] for row in rows] == [False] * 3 + [True] * 3
    assert made.box.start_count == 3


def test_a_video_that_needs_more_memory_than_the_box_has_is_one_error_row(tmp_path, make_video, operator):
    options = {"preset": "ultrafast", "bf": "0"}
    path = make_video(tmp_path / "a.mp4", time_base=Fraction(1, 25), ticks=[0], size=(4320, 7680), options=options)
    made = operator(box=BoxLimits(address_space_bytes=680_000_000), decoder="pyav")
    [row] = made(units(unit(path, [(0.0, 0.04)]))).to_pylist()
    assert row["error"]["error_code"] == "memory_limit", row["error"]
