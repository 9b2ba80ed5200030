"""Packs of frames (MiniCPM-V 4.5) and frames alone (2.6, 4.0), compared with the published recipes restated."""

from fractions import Fraction

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from operators.minicpmv.family import FAMILIES
from operators.minicpmv.packing import PackedConfig, choose_packing, in_packs, time_ids, uniform_places
from operators.minicpmv.temporal import CONFIG_OF_RULE, FramesConfig, StackedConfig, TemporalConfig, Timeline, plan_clip
from tests.operators.video_recipes import recipe_frames, recipe_packs

RATES = [
    Fraction(30000, 1001), Fraction(24000, 1001), Fraction(60000, 1001), Fraction(25), Fraction(30), Fraction(24),
    Fraction(60), Fraction(50), Fraction(15), Fraction(10), Fraction(5), Fraction(2), Fraction(1),
    Fraction(1123, 250), Fraction(148, 10), Fraction(120), Fraction(7, 3),
]  # fmt: skip
LENGTHS_SECONDS = [0.7, 1, 2.9, 10, 18, 29.97, 30, 59.9, 60, 61.3, 90, 180.5, 400]


def file_of(rate, seconds):
    """A file at a constant rate."""
    count = max(round(seconds * rate), 1)
    times = np.array([float(Fraction(number) / rate) for number in range(count)])
    return Timeline(times, float(count / rate), float(rate), float(1 / (rate * 512)))


def planned_packs(timeline, config):
    return [
        list(zip(image.positions, image.temporal_ids, strict=True))
        for image in plan_clip(timeline, config)
        if not image.is_composite
    ]


@pytest.mark.parametrize("rate", RATES, ids=str)
@pytest.mark.parametrize("max_packing", [3, 6])
def test_frames_packs_and_ids_of_a_constant_rate_clip_are_those_of_the_recipe(rate, max_packing):
    compared = 0
    for seconds in LENGTHS_SECONDS:
        timeline = file_of(rate, seconds)
        assert timeline.is_gapless()
        for fps in (1.0, 3.0, 5.0, 10.0):
            config = PackedConfig(fps=fps, max_packing=max_packing)
            wanted = recipe_packs(len(timeline.frame_seconds), timeline.frame_rate, fps, 180, max_packing)
            if wanted is not None:
                assert planned_packs(timeline, config) == wanted, (rate, seconds, fps)
                compared += 1
    assert compared > 40


@pytest.mark.parametrize("forced", [1, 2, 4, 6])
@pytest.mark.parametrize("seconds", [10, 60, 61.3, 400])
def test_a_forced_packing_changes_the_packs_and_not_the_frames(forced, seconds):
    timeline = file_of(Fraction(30), seconds)
    count = len(timeline.frame_seconds)
    config = PackedConfig(fps=10, max_packing=6, forced_packing=forced)
    assert planned_packs(timeline, config) == recipe_packs(count, 30.0, 10.0, 180, 6, forced)
    free = planned_packs(timeline, PackedConfig(fps=10, max_packing=6))
    assert [pair for pack in planned_packs(timeline, config) for pair in pack] == [p for pack in free for p in pack]
    assert {len(pack) for pack in planned_packs(timeline, config)[:-1]} == {forced}


def test_a_packing_above_the_largest_pack_is_lowered_to_it():
    packs = planned_packs(file_of(Fraction(30), 10), PackedConfig(fps=10, max_packing=2, forced_packing=5))
    assert {len(pack) for pack in packs} == {2}


@pytest.mark.parametrize(
    ("seconds", "fps", "frame_count", "frames_per_pack", "pack_count"),
    [
        (60, 3, 180, 1, 180),
        (61, 3, 183, 2, 92),
        (60, 10, 600, 4, 150),
        (30, 10, 300, 2, 150),
        (10, 10, 100, 1, 100),
        (108, 10, 1080, 6, 180),
        (600, 10, 1080, 6, 180),
    ],
)
def test_packs_grow_to_six_frames_before_frames_are_left_out(seconds, fps, frame_count, frames_per_pack, pack_count):
    chosen = choose_packing(seconds, 30.0, PackedConfig(fps=fps, max_packing=6))
    assert chosen == (frame_count, frames_per_pack)
    packs = planned_packs(file_of(Fraction(30), seconds), PackedConfig(fps=fps, max_packing=6))
    assert len(packs) == pack_count
    assert sum(map(len, packs)) == frame_count


def test_a_minute_at_ten_frames_a_second_leaves_frames_out_at_the_packing_of_the_recipe():
    assert choose_packing(60.0, 30.0, PackedConfig(fps=10)) == (540, 3)


def test_the_last_pack_may_be_shorter():
    packs = planned_packs(file_of(Fraction(25), 7), PackedConfig(fps=10, max_packing=6, forced_packing=6))
    assert [len(pack) for pack in packs] == [6] * 11 + [4]
    assert in_packs([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]


def test_the_ids_that_truncation_lowers_are_those_of_the_recipe():
    tenths = [number / 10 for number in range(600)]
    ids = time_ids(tenths, 60.0)
    lowered = [number for number, found in enumerate(ids) if found != number]
    assert all(ids[number] == number - 1 for number in lowered)
    assert {43, 81, 86} <= set(lowered)
    assert 0.03 < len(lowered) / 600 < 0.06


def test_times_between_tenths_take_the_nearest_and_stay_within_the_clip():
    assert time_ids([-0.03, 0.04, 0.06, 0.94, 1.04, 7.0], 1.0) == [0, 0, 1, 9, 9, 9]
    assert time_ids([0.0, 0.05], 0.04) == [0, 0]


def test_a_clip_shorter_than_a_period_has_one_frame():
    # The recipe rounds 3 * 0.1 frames to none.
    for config in (PackedConfig(), FramesConfig()):
        [image] = plan_clip(file_of(Fraction(30), 0.1), config)
        assert len(image.positions) == 1


def test_a_rate_below_one_frame_in_two_seconds_does_not_empty_the_clip():
    timeline = file_of(Fraction(1, 4), 40)
    assert [pack[0][0] for pack in planned_packs(timeline, PackedConfig())] == list(range(10))


def test_a_wish_above_the_rate_shows_frames_twice_where_they_are_packed():
    timeline = file_of(Fraction(5), 30)
    packs = planned_packs(timeline, PackedConfig(fps=10))
    assert packs == recipe_packs(150, 5.0, 10.0, 180, 6)
    assert packs[0] == [(0, 0), (0, 0)]


@pytest.mark.parametrize("tick_seconds", [1 / 1000, 1 / 90000])
def test_times_rounded_to_the_clock_of_the_container_give_the_same_packs(tick_seconds):
    exact = file_of(Fraction(30000, 1001), 61)
    rounded = np.round(exact.frame_seconds / tick_seconds) * tick_seconds
    timeline = Timeline(rounded, exact.duration_seconds, exact.frame_rate, tick_seconds)
    for config in (PackedConfig(fps=7), FramesConfig()):
        assert planned_packs(timeline, config) == planned_packs(exact, config)


def test_a_variable_rate_shows_what_is_on_display_in_the_middle_of_equal_shares():
    times = np.array([0.0, 0.04, 0.9, 1.0, 2.5, 2.9])
    timeline = Timeline(times, 5.0, 1.2, 0.001)
    packs = planned_packs(timeline, PackedConfig(fps=1, max_frames=4))
    # Shares of one second: what is shown at 0.5, 1.5, 2.5, 3.5 and 4.5 s.
    assert packs == [[(1, 5), (3, 15)], [(4, 25), (5, 35)], [(5, 45)]]


def test_a_picture_that_stays_keeps_moving_in_time():
    timeline = Timeline(np.array([-3.0]), 10.0, 25.0, 0.001)
    packs = planned_packs(timeline, PackedConfig(fps=1, max_frames=5))
    assert [place for pack in packs for place, _ in pack] == [0] * 10
    ids = [number for pack in packs for _, number in pack]
    assert ids == sorted(set(ids))
    assert ids[-1] == 95


def test_a_picture_that_stays_after_frames_of_a_constant_rate_is_no_constant_rate():
    timeline = Timeline(np.array([0.0, 0.04, 0.08]), 10.0, 25.0, 0.001)
    assert timeline.is_constant_rate()
    assert not timeline.is_gapless()
    packs = planned_packs(timeline, PackedConfig(fps=1))
    assert [place for pack in packs for place, _ in pack] == [2] * 10
    assert len(plan_clip(timeline, FramesConfig())) == 10


def test_a_segment_between_frames_of_a_file_has_as_many_frames_as_one_at_them():
    # 29.97 frames a second from 30 s on: the first frame has been shown for a third of a frame.
    times = np.array([number * 1001 / 30000 - 30.0 for number in range(899, 1798)])
    timeline = Timeline(times, 29.99, 30000 / 1001, 1 / 30000)
    assert not timeline.is_gapless()
    packs = planned_packs(timeline, PackedConfig(fps=10))
    assert [len(packs), len(packs[0])] == [150, 2]
    found = [pair for pack in packs for pair in pack]
    middles = [(k + 0.5) * 29.99 / 300 for k in range(300)]
    shown = times <= np.array(middles)[:, None] + timeline.tolerance_seconds
    assert [place for place, _ in found] == [int(row.sum()) - 1 for row in shown]
    assert all(abs(number - 10 * middle) <= 1.5 for (_, number), middle in zip(found, middles, strict=True))


@pytest.mark.parametrize("rate", RATES, ids=str)
@pytest.mark.parametrize("max_frames", [64, 7, 1])
def test_single_frames_of_a_constant_rate_clip_are_those_of_the_recipe(rate, max_frames):
    for seconds in LENGTHS_SECONDS:
        timeline = file_of(rate, seconds)
        images = plan_clip(timeline, FramesConfig(max_frames=max_frames))
        wanted = recipe_frames(len(timeline.frame_seconds), timeline.frame_rate, max_frames)
        assert [image.positions for image in images] == [(frame,) for frame in wanted], (rate, seconds)
        shown = [timeline.frame_seconds[image.positions[0]] for image in images]
        assert all(abs(image.temporal_ids[0] - 10 * time) < 1 for image, time in zip(images, shown, strict=True))


def test_single_frames_of_a_variable_rate_are_those_on_display():
    times = np.array([0.0, 0.04, 0.9, 1.0, 2.5, 2.9])
    timeline = Timeline(times, 5.0, 1.2, 0.001)
    assert [image.positions for image in plan_clip(timeline, FramesConfig())] == [(0,), (3,), (3,), (5,), (5,)]
    assert [image.positions for image in plan_clip(timeline, FramesConfig(max_frames=2))] == [(3,), (5,)]


@pytest.mark.parametrize(("fps", "step"), [(2.0, 15), (0.5, 60), (4.0, 8), (60.0, 1)])
def test_fps_sets_the_step_between_single_frames(fps, step):
    images = plan_clip(file_of(Fraction(30), 2), FramesConfig(fps=fps))
    assert [image.positions[0] for image in images] == list(range(0, 60, step))


def test_no_frames_give_no_packs():
    for config in (PackedConfig(), FramesConfig()):
        assert plan_clip(Timeline(np.empty(0), 3.0, 25.0, 0.001), config) == []


@pytest.mark.parametrize("rate", RATES, ids=str)
@pytest.mark.parametrize(
    "config",
    [
        StackedConfig(),
        StackedConfig(fps=4.0, stack_frames=3),
        PackedConfig(),
        PackedConfig(fps=10, max_frames=20),
        FramesConfig(),
        FramesConfig(fps=7, max_frames=1000),
    ],
    ids=lambda config: f"{config.kind}-{config.fps}",
)
def test_no_clip_has_more_pictures_than_its_config_says(rate, config):
    for seconds in LENGTHS_SECONDS:
        timeline = file_of(rate, seconds)
        images = plan_clip(timeline, config)
        pictures = sum(1 if image.is_composite else len(image.positions) for image in images)
        assert pictures <= config.most_pictures(timeline.duration_seconds)


def test_the_config_is_chosen_by_its_kind():
    adapter = TypeAdapter(TemporalConfig)
    for rule, wanted in CONFIG_OF_RULE.items():
        found = adapter.validate_python({"kind": rule, "fps": 2})
        assert type(found) is wanted
        assert adapter.validate_json(found.model_dump_json()) == found
    with pytest.raises(ValidationError, match="kind"):
        adapter.validate_python({"fps": 2})
    with pytest.raises(ValidationError, match="stack_frames"):
        adapter.validate_python({"kind": "packed", "stack_frames": 2})


def test_every_member_of_the_family_has_a_rule():
    rules = {name: CONFIG_OF_RULE[family.clip_rule]() for name, family in FAMILIES.items()}
    assert (rules["minicpmv4_6"].fps, rules["minicpmv4_6"].max_frames, rules["minicpmv4_6"].stack_frames) == (1, 128, 1)
    assert (rules["minicpmv4_5"].fps, rules["minicpmv4_5"].max_frames, rules["minicpmv4_5"].max_packing) == (3, 180, 3)
    assert (rules["minicpmv2_6"].fps, rules["minicpmv2_6"].max_frames) == (1, 64)
    assert rules["minicpmv2_6"] == rules["minicpmv4_0"] == rules["minicpmo2_6"]
    assert rules["minicpmv4_6"] == rules["minicpmv4_7"] == rules["minicpm_ocr"]


def test_uniform_places_are_the_middles_of_equal_shares():
    assert uniform_places(10, 5) == [1, 3, 5, 7, 9]
    assert uniform_places(10, 3) == [1, 5, 8]
    assert uniform_places(2, 4) == [0, 0, 1, 1]
