"""Sampling and composites of MiniCPM-V 4.6 clips, compared with the reference implementation."""

import ast
import importlib.util
import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from operators.minicpmv.temporal import (
    StackedConfig,
    Timeline,
    composite,
    composite_layout,
    plan_clip,
    temporal_ids,
)

RATES = [
    Fraction(30000, 1001), Fraction(2997, 100), Fraction(24000, 1001), Fraction(60000, 1001), Fraction(25),
    Fraction(30), Fraction(24), Fraction(60), Fraction(15), Fraction(50),
    Fraction(10), Fraction(5), Fraction(1), Fraction(1, 2),
    Fraction(1123, 250), Fraction(148, 10), Fraction(12), Fraction(120), Fraction(7, 3),
]  # fmt: skip
FRAME_COUNTS = [1, 2, 3, 29, 30, 31, 59, 60, 89, 90, 250, 300, 391, 611, 899, 900]


def reference_method(name):
    """Return a method of the installed reference; its module cannot be imported without torchvision."""
    spec = importlib.util.find_spec("transformers")
    folder = Path(spec.submodule_search_locations[0]) / "models/minicpmv4_6"
    tree = ast.parse((folder / "video_processing_minicpmv4_6.py").read_text())
    [method] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    method.decorator_list = []
    names = {"math": math, "np": np, "VideoMetadata": object}
    if name == "concat_frames_as_image":
        names["torch"] = pytest.importorskip("torch")
    exec(compile(ast.Module([method], []), str(folder), "exec"), names)
    return names[name]


sample_frames = reference_method("sample_frames")


def constant_rate(rate, frame_count, tick_seconds=None):
    times = np.array([float(Fraction(number) / rate) for number in range(frame_count)])
    if tick_seconds:
        times = np.round(times / tick_seconds) * tick_seconds
    return Timeline(times, float(frame_count / rate), float(rate), tick_seconds or float(1 / (rate * 512)))


def reference_frames(timeline, config):
    """Return main and stacked frame numbers as the reference chooses them from the whole video."""
    count = len(timeline.frame_seconds)
    metadata = SimpleNamespace(total_num_frames=count, fps=timeline.frame_rate, duration=timeline.duration_seconds)
    chosen = sample_frames(SimpleNamespace(), metadata, config.max_frames, config.stack_frames)
    main_count = min(math.ceil(timeline.duration_seconds), config.max_frames)
    if timeline.duration_seconds > config.max_frames:
        main_count = min(int(timeline.duration_seconds / 0.1), config.max_frames)
    # Up to max_frames seconds the reference does not bound its numbers, and its decoder would fail.
    return [min(n, count - 1) for n in chosen[:main_count]], chosen[main_count:]


def planned_frames(timeline, config):
    images = plan_clip(timeline, config)
    mains = [image.positions[0] for image in images if not image.is_composite]
    stacked = [position for image in images if image.is_composite for position in image.positions]
    return mains, stacked


@pytest.mark.parametrize("rate", RATES, ids=str)
@pytest.mark.parametrize("max_num_frames", [128, 16, 5, 1])
def test_main_frames_of_a_constant_rate_clip_are_those_of_the_reference(rate, max_num_frames):
    config = StackedConfig(max_frames=max_num_frames)
    for frame_count in FRAME_COUNTS:
        timeline = constant_rate(rate, frame_count)
        assert planned_frames(timeline, config) == reference_frames(timeline, config), (rate, frame_count)


@pytest.mark.parametrize("rate", RATES, ids=str)
@pytest.mark.parametrize("stack_frames", [2, 3, 4, 5, 7])
def test_stacked_frames_of_a_constant_rate_clip_are_those_of_the_reference(rate, stack_frames):
    config = StackedConfig(stack_frames=stack_frames)
    for frame_count in FRAME_COUNTS:
        timeline = constant_rate(rate, frame_count)
        if timeline.duration_seconds <= config.max_frames:
            assert planned_frames(timeline, config) == reference_frames(timeline, config), (rate, frame_count)


def test_a_clip_longer_than_the_bound_pairs_composites_with_main_frames_by_number():
    config = StackedConfig(stack_frames=3, max_frames=10)
    timeline = constant_rate(Fraction(30), 30 * 40)
    mains, stacked = reference_frames(timeline, config)
    times = [sec + j / 3 for sec in range(40) for j in (1, 2)]
    kept = [times[i] for i in np.linspace(0, 79, 20, dtype=int)]
    images = plan_clip(timeline, config)
    assert [image.positions[0] for image in images if not image.is_composite] == mains
    expected = []
    for second, main in enumerate(mains):
        expected.append((main,))
        group = tuple(n for n, time in zip(stacked, kept, strict=True) if second <= time < second + 1)
        if group:
            expected.append(group)
    assert [image.positions for image in images] == expected


@pytest.mark.parametrize("rate", [Fraction(30), Fraction(30000, 1001), Fraction(24), Fraction(60000, 1001)], ids=str)
@pytest.mark.parametrize("tick_seconds", [1 / 1000, 1 / 90000, 1 / 12800])
def test_times_rounded_to_the_clock_of_the_container_give_the_same_frames(rate, tick_seconds):
    config = StackedConfig(stack_frames=3)
    timeline = constant_rate(rate, 400, tick_seconds)
    assert timeline.is_constant_rate()
    assert planned_frames(timeline, config) == reference_frames(timeline, config)


def test_the_truncation_of_the_reference_is_kept_where_it_picks_one_frame_early():
    timeline = constant_rate(Fraction(30), 300)
    assert int(4.1 * 30) == 122
    assert timeline.frames_at([4.1]) == [122]


def test_a_variable_rate_clip_shows_the_frame_on_display():
    times = np.array([0.0, 0.04, 0.9, 1.0, 2.5, 2.9])
    timeline = Timeline(times, 5.0, 1.2, 0.001)
    assert planned_frames(timeline, StackedConfig()) == ([0, 3, 3, 5, 5], [])


def test_a_clip_that_starts_between_frames_begins_with_the_frame_on_display():
    # 29.97 frames a second from 3.0 s on: frame 89 is shown until 3.003 s.
    times = np.array([n * 1001 / 30000 - 3.0 for n in range(89, 180)])
    timeline = Timeline(times, 3.0, 30000 / 1001, 1 / 30000)
    assert planned_frames(timeline, StackedConfig())[0] == [0, 30, 60]
    assert times[30] <= 1.0 < times[31]


def test_a_clip_before_its_first_frame_begins_with_that_frame():
    timeline = Timeline(np.array([1.5, 1.6]), 3.0, 10.0, 0.001)
    assert planned_frames(timeline, StackedConfig())[0] == [0, 0, 1]


@pytest.mark.parametrize(("fps", "count"), [(0.5, 5), (1.0, 10), (2.0, 20), (5.0, 50)])
def test_fps_sets_the_main_frames_a_second(fps, count):
    timeline = constant_rate(Fraction(30), 300)
    mains, _ = planned_frames(timeline, StackedConfig(fps=fps))
    assert len(mains) == count
    assert mains[:3] == [0, int(30 / fps), int(60 / fps)]


def test_fps_never_exceeds_the_bound_on_main_frames():
    timeline = constant_rate(Fraction(30), 900)
    mains, _ = planned_frames(timeline, StackedConfig(fps=10, max_frames=128))
    assert len(mains) == 128
    assert mains == sorted(mains)


def test_stacking_at_two_periods_a_second_fills_the_half_seconds():
    timeline = constant_rate(Fraction(24), 48)
    images = plan_clip(timeline, StackedConfig(fps=2.0, stack_frames=3))
    assert [image.positions for image in images[:4]] == [(0,), (4, 8), (12,), (16, 20)]
    assert [image.is_composite for image in images[:4]] == [False, True, False, True]


def test_no_frames_give_no_images():
    assert plan_clip(Timeline(np.empty(0), 3.0, 25.0, 0.001), StackedConfig()) == []
    assert plan_clip(Timeline(np.zeros(1), 0.0, 25.0, 0.001), StackedConfig()) == []


def test_temporal_ids_are_tenths_of_a_second():
    assert temporal_ids([-0.01, 0.0, 0.1, 0.3, 0.35, 1.0, 2.9]) == [0, 0, 1, 3, 3, 10, 29]


@pytest.mark.parametrize("frame_count", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("size", [(90, 160), (160, 90), (100, 100), (100, 101), (12, 6), (7, 300)])
def test_a_composite_is_that_of_the_reference(frame_count, size):
    torch = pytest.importorskip("torch")
    concat = reference_method("concat_frames_as_image")
    random = np.random.default_rng(frame_count)
    frames = random.integers(0, 256, (frame_count, *size, 3), dtype=np.uint8)
    expected = concat(None, torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous())[0].permute(1, 2, 0).numpy()
    assert np.array_equal(composite(list(frames)), expected)


def test_two_frames_stack_across_their_longer_side():
    assert composite_layout(2, 90, 160) == (2, 1)
    assert composite_layout(2, 160, 90) == (1, 2)
    assert composite_layout(4, 160, 90) == (2, 2)
