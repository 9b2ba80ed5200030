"""Options that only some models have: refused in one line elsewhere, and each model's own defaults."""

import pytest

from operators.minicpmv.config import read_model_config
from operators.minicpmv.family import FAMILIES
from operators.minicpmv.packing import PackedConfig
from operators.minicpmv.temporal import FramesConfig, StackedConfig
from operators.minicpmv.tiny import write_tiny_model
from pipeline.config import compose
from pipeline.dials import (
    LARGEST_SEGMENT_PIXELS_BYTES,
    check_dials,
    clip_slicing,
    page_slicing,
    segment_bytes,
    temporal_config,
)
from pipeline.preview import plan
from pipeline.reading import choose_reading
from pipeline.spec import make_spec
from schemas.errors import ConfigError

MERGERS = ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr")
FRAMES = ("minicpmv2_6", "minicpmv4_0", "minicpmo2_6")


def spec_of(**options):
    return make_spec({"task": "caption", "inputs": ["a.mp4"], "output": "out", "model": "m", "local": True} | options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name in ("minicpmv4_6", "minicpmv4_5", "minicpmv2_6"):
        made[name] = tmp_path_factory.mktemp(name)
        write_tiny_model(made[name], name)
    return made


@pytest.mark.parametrize(
    ("options", "option", "owners"),
    [
        ({"stack_frames": 1}, "--stack-frames", MERGERS),
        ({"packing": 4}, "--packing", ("minicpmv4_5",)),
        ({"packing": "auto"}, "--packing", ("minicpmv4_5",)),
        ({"max_packing": 6}, "--max-packing", ("minicpmv4_5",)),
        ({"thinking": True}, "--thinking", (*MERGERS, "minicpmv4_5")),
        ({"downsample": "4x"}, "--downsample", MERGERS),
        ({"small_image_upsize": "never"}, "--small-image-upsize", MERGERS),
    ],
    ids=str,
)
def test_an_option_that_a_model_does_not_have_is_refused(options, option, owners):
    spec = spec_of(**options)
    for name, family in FAMILIES.items():
        if name in owners:
            check_dials(spec, family)
            continue
        with pytest.raises(ConfigError) as caught:
            check_dials(spec, family)
        assert str(caught.value).startswith(f"{family.title} has no {option}: ")
        assert "\n" not in str(caught.value)


def test_options_that_are_not_given_are_the_models_own():
    spec = spec_of()
    for name, family in FAMILIES.items():
        check_dials(spec, family)
        wanted = StackedConfig() if name in MERGERS else FramesConfig() if name in FRAMES else PackedConfig()
        assert temporal_config(spec, family) == wanted


def test_options_that_are_given_win():
    spec = spec_of(fps=10, max_frames=20, packing=4)
    assert temporal_config(spec, FAMILIES["minicpmv4_5"]) == PackedConfig(
        fps=10, max_frames=20, max_packing=4, forced_packing=4
    )
    assert temporal_config(spec_of(packing="auto"), FAMILIES["minicpmv4_5"]) == PackedConfig(max_packing=3)
    assert temporal_config(spec_of(packing=2), FAMILIES["minicpmv4_5"]) == PackedConfig(forced_packing=2)
    assert temporal_config(spec_of(max_packing=6), FAMILIES["minicpmv4_5"]) == PackedConfig(max_packing=6)
    spec = spec_of(fps=2, max_frames=20, stack_frames=3)
    assert temporal_config(spec, FAMILIES["minicpmv4_6"]) == StackedConfig(fps=2, max_frames=20, stack_frames=3)
    assert temporal_config(spec_of(fps=2), FAMILIES["minicpmv2_6"]) == FramesConfig(fps=2)
    assert temporal_config(spec, None) == StackedConfig()


def test_a_rate_beyond_the_temporal_ids_is_refused():
    with pytest.raises(ConfigError, match=r"^MiniCPM-V 4.5: --fps: .* 10$"):
        check_dials(spec_of(fps=12), FAMILIES["minicpmv4_5"])
    check_dials(spec_of(fps=12, segment_seconds=10), FAMILIES["minicpmv4_6"])


def test_a_number_and_its_text_are_the_same_packing():
    assert spec_of(packing=4) == spec_of(packing="4")
    with pytest.raises(ConfigError, match="packing: Input should be"):
        spec_of(packing=7)


def test_the_largest_segment_of_the_recipe_fits_and_a_larger_one_is_refused():
    packed, frames = FAMILIES["minicpmv4_5"], FAMILIES["minicpmv2_6"]
    largest = spec_of(fps=10, segment_seconds=600, max_packing=6)
    assert temporal_config(largest, packed).most_pictures(600) == 1080
    assert 0.8 * LARGEST_SEGMENT_PIXELS_BYTES < segment_bytes(largest, packed) < LARGEST_SEGMENT_PIXELS_BYTES
    check_dials(largest, packed)
    check_dials(spec_of(segment_seconds=600), frames)
    for family, options in ((packed, {"video_max_slices": 2}), (frames, {"max_frames": 1024})):
        with pytest.raises(ConfigError, match=r"would carry \d+ MB of pixels, at most 768 fit: lower"):
            check_dials(spec_of(fps=10, segment_seconds=600, **options), family)


def test_frames_are_sliced_as_the_recipe_of_the_model_says(folders):
    slices = {name: clip_slicing(spec_of(), read_model_config(folder)).max_slices for name, folder in folders.items()}
    assert slices == {"minicpmv4_6": 1, "minicpmv4_5": 1, "minicpmv2_6": 2}
    config = read_model_config(folders["minicpmv2_6"])
    assert clip_slicing(spec_of(video_max_slices=1), config).max_slices == 1


def test_small_images_are_enlarged_as_asked_on_pages_and_always_in_clips(folders):
    config = read_model_config(folders["minicpmv4_6"])
    spec = spec_of(small_image_upsize="never", downsample="4x", max_slices=4)
    pages, clips = page_slicing(spec, config), clip_slicing(spec, config)
    assert (pages.small_image_upsize, pages.downsample_mode, pages.max_slices) == ("never", "4x", 4)
    assert (clips.small_image_upsize, clips.downsample_mode, clips.max_slices) == ("always", "4x", 1)


def test_a_refusal_comes_before_anything_is_read(tmp_path, folders):
    (tmp_path / "a.mp4").touch()
    spec = spec_of(model=str(folders["minicpmv2_6"]), inputs=[str(tmp_path)], thinking=True)
    for refuse in (choose_reading, plan):
        with pytest.raises(ConfigError, match=r"MiniCPM-V 2.6 has no --thinking"):
            refuse(spec)


def composed(folder, **options):
    spec = spec_of(model=str(folder), **options)
    return compose(spec, choose_reading(spec), run_uri="-", run_id="r", worker_count=1, gpu_count=0)


def test_steps_follow_the_model(folders):
    packed = composed(folders["minicpmv4_5"], fps=10, segment_seconds=60)
    assert packed.videos.temporal == PackedConfig(fps=10)
    assert packed.videos.slicing == packed.prepare_clips.slicing
    assert packed.videos.slicing.query_count == 64
    assert packed.record_rows == 1
    assert packed.videos.max_segment_bytes > 600 * 448 * 448 * 3
    assert packed.write.downsample_mode is None
    assert (packed.write.max_slice_nums, packed.write.clip_max_slice_nums) == (9, 1)
    assert packed.videos.segment_timeout_seconds > composed(folders["minicpmv4_5"]).videos.segment_timeout_seconds
    stacked = composed(folders["minicpmv4_6"], stack_frames=3)
    assert stacked.videos.temporal == StackedConfig(stack_frames=3)
    assert (stacked.write.downsample_mode, stacked.record_rows) == ("16x", 6)


def test_the_packing_is_part_of_what_a_segment_is_and_not_of_what_a_page_is(folders):
    first, second = (composed(folders["minicpmv4_5"], packing=packing) for packing in ("auto", 2))
    assert first.probe.segment_settings != second.probe.segment_settings
    assert first.probe.page_settings == second.probe.page_settings
