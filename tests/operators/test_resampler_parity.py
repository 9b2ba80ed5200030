"""Towers, resamplers, text models and answers of the members with a resampler, against an independent reference."""

import os
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.patches import pack_patches
from operators.minicpmv.resampler import encode_times, lay_out, sine_cosine
from operators.minicpmv.slicing import slice_image
from operators.minicpmv.tiny import write_tiny_model
from operators.minicpmv.vision import encode_patches, position_buckets
from tests.operators import golden45
from tests.operators.random_packed_prompts import packed_prompts
from tests.operators.reference_resamplers import CLASSES, waves
from tests.operators.resampler_pair import (
    CPU,
    ROWS_AT_ONCE,
    Pair,
    built_ids,
    difference,
    largest_difference,
    our_parts,
    visual_of,
)
from tests.operators.test_merger_parity import MAX_NEW_TOKENS, our_answers

PROMPTS_EACH = int(os.environ.get("PAGEREEL_PARITY_PROMPTS", "40"))
"""Random prompts for each member."""

LARGEST_DIFFERENCE = 1e-4


@pytest.fixture(scope="module", params=CLASSES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, request.param)
    return Pair(folder, request.param)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def normalised(image):
    """A picture as the reference's tower takes it, (3, height, width) in [-1, 1]."""
    return (torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def noise(rows, cols, seed):
    """A slice of so many patches."""
    return np.random.default_rng(seed).integers(0, 256, (rows * 14, cols * 14, 3), dtype=np.uint8)


def our_tower(pair, images, buckets):
    """What our tower makes of each slice, all in one call."""
    packed = pack_patches(images, 14, 0, CPU)
    encoded = encode_patches(pair.model.network.tower, packed, buckets).split(packed.lengths)
    return [encoded[packed.places.index(number)] for number in range(len(images))]


UNSHIFTED_GRIDS = ((32, 32), (27, 38), (43, 24), (1, 1), (3, 130))
"""Grids on whose sides a float32 step finds the same places as exact arithmetic."""

SHIFTED_GRIDS = ((25, 41), (20, 50), (12, 82))
"""Grids with a side where it does not, and Idefics2's own arithmetic errs alike."""

OTHERWISE_SHIFTED_GRIDS = ((49, 21), (17, 58), (10, 100))
"""Grids with a side where it does not, and Idefics2 errs elsewhere: its way with positions is restated."""


def test_the_tower_is_that_of_idefics2(pair):
    grids = (*UNSHIFTED_GRIDS, *SHIFTED_GRIDS)
    images = [noise(rows, cols, seed) for seed, (rows, cols) in enumerate(grids)]
    for image, found in zip(images, our_tower(pair, images, "float32_step"), strict=True):
        assert difference(found, pair.reference.encode_as_idefics2(normalised(image))) < 2e-5


def test_the_tower_finds_positions_as_the_released_code_does(pair):
    grids = (SHIFTED_GRIDS[0], *OTHERWISE_SHIFTED_GRIDS)
    images = [noise(rows, cols, seed) for seed, (rows, cols) in enumerate(grids)]
    ours, exact = (our_tower(pair, images, buckets) for buckets in ("float32_step", "exact"))
    assert pair.model.config.family.position_buckets == "float32_step"
    for image, found, unlike in zip(images, ours, exact, strict=True):
        wanted = pair.reference.encode(normalised(image))
        assert difference(found, wanted) < 2e-5
        assert difference(unlike, wanted) > 0.01


def test_both_ways_to_find_positions_agree_on_other_grids():
    for count in {side for grid in UNSHIFTED_GRIDS for side in grid}:
        assert torch.equal(position_buckets(count, 70, "float32_step"), position_buckets(count, 70, "exact"))


def resampled_alike(pair, packs):
    """Largest difference of the visual tokens of packs, ours all at once, of the reference one after the other.

    A pack has rows, columns and a temporal id for each slice.
    """
    generator = torch.Generator().manual_seed(len(packs))
    grids = [(rows, cols) for pack in packs for rows, cols, _ in pack]
    width = pair.reference.tower.config.hidden_size
    slices = [torch.randn(rows * cols, width, generator=generator) for rows, cols in grids]
    numbers = iter(range(len(slices)))
    numbered = [[(next(numbers), time) for _, _, time in pack] for pack in packs]
    encoded = torch.cat(slices)
    connector = pair.model.network.connector
    found = connector(encoded, lay_out(grids, numbered, connector.proj.shape[0], encoded))
    wanted = torch.stack(
        [
            pair.reference.resample(
                [slices[number] for number, _ in pack], [grids[number] for number, _ in pack], [t for _, t in pack]
            )
            for pack in numbered
        ]
    )
    assert float(wanted.abs().max()) > 1
    return difference(found, wanted)


def test_the_resampler_is_multi_head_attention_with_places_on_the_keys(pair):
    grids = [(32, 32), (27, 38), (1, 90), (5, 7), (7, 5), (27, 38), (100, 10), (1, 1)]
    assert resampled_alike(pair, [[(*grid, -1)] for grid in grids]) < 5e-5


@pytest.mark.parametrize("pair", ["minicpmv4_5"], indirect=True)
@pytest.mark.parametrize("seed", range(4))
def test_the_resampler_of_4_5_takes_packs_of_any_lengths(pair, seed):
    generator = np.random.default_rng(seed)
    packs = []
    for _ in range(12):
        grid, length = generator.integers(1, 30, 2), generator.integers(1, 7)
        times = sorted(generator.choice(600, length, replace=False))
        # Every third pack is ragged: its frames differ in size.
        grids = generator.integers(1, 30, (length, 2)) if len(packs) % 3 == 0 else [grid] * length
        packs.append([(int(rows), int(cols), int(time)) for (rows, cols), time in zip(grids, times, strict=True)])
    packs.insert(5, [(27, 38, -1)])
    assert resampled_alike(pair, packs) < 5e-5


@pytest.mark.parametrize("width", [128, 256, 4096])
def test_tables_follow_the_formula(width):
    """Angles are float32, so that sines of large positions err by the rounding of theirs."""
    rates = 10000.0 ** -(np.arange(width // 2) / (width / 2))
    for position in (0, 1, 7, 70, 599, 6000):
        wanted = np.concatenate([np.sin(position * rates), np.cos(position * rates)])
        tolerance = 1e-7 + 3e-7 * position
        assert np.abs(sine_cosine(np.array([position]), width)[0] - wanted).max() < tolerance
        assert np.abs(encode_times([position], width)[0] - wanted).max() < tolerance
        assert np.abs(waves(position, width) - wanted).max() < tolerance


@pytest.mark.parametrize("width", [256, 2560, 3584, 4096])
def test_tables_are_those_of_the_released_arithmetic_up_to_two_hours(width):
    """All in float32: rates, then the outer product of positions and rates, then sines and cosines."""
    times = np.array([0, 1, 70, 599, 5999, 36_000, 71_999])
    rates = np.arange(width // 2, dtype=np.float32)
    rates /= width / 2
    rates = 1.0 / 10000**rates
    angles = np.einsum("t,r->tr", times.astype(np.float32), rates.astype(np.float32))
    wanted = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_array_equal(encode_times(times.tolist(), width), wanted)


def test_the_text_model_alone_answers_as_transformers_class_does(pair):
    generator = np.random.default_rng(3)
    pad = pair.model.config.tokens.image_pad
    vocabulary = [token for token in range(pair.model.config.vocabulary_size) if token != pad]
    prompts = [generator.choice(vocabulary, length).tolist() for length in (1, 2, 17, 64, 130, 333)]
    for ids, (tokens, logits) in zip(prompts, our_answers(pair.model, prompts, [None] * len(prompts)), strict=True):
        embeddings = pair.reference.text.get_input_embeddings()(torch.tensor([ids]))
        wanted = pair.reference.answer(embeddings, pair.model.stop_ids, max_new_tokens=MAX_NEW_TOKENS)
        assert tokens == wanted[0]
        assert difference(logits, wanted[1]) < LARGEST_DIFFERENCE


def prompts_for(family):
    return packed_prompts(family, PROMPTS_EACH, seed=zlib.crc32(family.encode()))


def test_random_prompts_have_the_logits_and_the_answers_of_the_reference(pair):
    prompts = prompts_for(pair.family)
    answers = []
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        largest, found = largest_difference(pair, prompts[start : start + ROWS_AT_ONCE])
        assert largest < LARGEST_DIFFERENCE
        answers += found
    assert len(set(answers)) > PROMPTS_EACH // 2


@pytest.mark.parametrize("family", CLASSES)
def test_the_prompts_are_of_every_kind(family):
    prompts = prompts_for(family)
    assert {prompt.kinds for prompt in prompts} == {(), ("image",), ("video",), ("image", "video")}
    assert any(len(prompt.images) == 3 for prompt in prompts)
    assert any(prompt.spells for prompt in prompts)
    assert any("!" in prompt.content[-1][1] for prompt in prompts if prompt.is_plain)
    lengths = {len(pack) for prompt in prompts for pack in prompt.packs}
    assert lengths == ({1, 2, 3, 4, 5, 6} if family == "minicpmv4_5" else {1})
    assert {prompt.thinking for prompt in prompts} == ({True, False} if family == "minicpmv4_5" else {False})
    clips = [slice_image(prompt.frames[0], prompt.slicing).grid for prompt in prompts if prompt.frames]
    assert any(grid.rows for grid in clips)
    assert any(not grid.rows for grid in clips)


def test_all_tensors_of_the_files_are_loaded_as_they_are(pair):
    loaded = pair.model.network.whole.state_dict()
    stored = {name: value for path in pair.folder.glob("*.safetensors") for name, value in load_file(path).items()}
    speech = {name for name in stored if name.startswith(("apm.", "audio_", "tts."))}
    assert bool(speech) == (pair.family == "minicpmo2_6")
    assert stored.keys() - speech == loaded.keys()
    assert all(torch.equal(value, stored[name].float()) for name, value in loaded.items())


def test_bfloat16_stays_close_to_float32(pair):
    half = MiniCPMV(pair.folder, device=CPU, dtype=torch.bfloat16, attention="sdpa")
    prompts = [prompt for prompt in packed_prompts(pair.family, 24, seed=5) if prompt.is_plain][:8]
    parts = [our_parts(pair, prompt) for prompt in prompts]
    ids = [built_ids(pair, prompt, own) for prompt, own in zip(prompts, parts, strict=True)]
    visuals = [visual_of(pair, prompt, own) for prompt, own in zip(prompts, parts, strict=True)]
    assert any(visual is not None for visual in visuals)
    wanted, found = (our_answers(model, ids, visuals) for model in (pair.model, half))
    for (_, exact), (_, close) in zip(wanted, found, strict=True):
        assert close.dtype == torch.bfloat16
        assert difference(close[0].float(), exact[0]) < 0.15 * float(exact[0].abs().max())


def test_what_else_the_golden_file_holds_is_reproduced():
    """Beside features and logits, which test_vision.py compares: pixels, a part of the tower's output, an answer."""
    golden, network = golden45.tensors(), golden45.network()
    slices = golden45.page_slices()
    for part, wanted in zip(slices, golden["A.pixel_sums"], strict=True):
        assert abs(float(normalised(part).double().sum()) - wanted) < 1e-3
    first = pack_patches(slices[:1], 14, 0, CPU).pixel_values[:2].reshape(2, 14, 14, 3)
    wanted = torch.from_numpy(golden["A.pixel_crop0_patch0_1"])
    assert difference(first.permute(3, 1, 0, 2).reshape(3, 14, 28), wanted) < 1e-6
    frames = [frame for pack, _ in golden45.clip_packs() for frame in pack]
    assert [[frame.shape[0] // 14, frame.shape[1] // 14] for frame in frames] == golden["B.tgt_sizes"].tolist()
    encoded = encode_patches(network.tower, pack_patches(frames[:1], 14, 0, CPU), "float32_step")
    assert difference(encoded[:4], torch.from_numpy(golden["B.vision_hidden_frame0_first4"])) < 1e-5
    embeddings = network.embed(torch.from_numpy(golden["A.input_ids"]))
    for (start, stop), features in zip(golden["A.image_bound"], golden["A.features"], strict=True):
        embeddings[0, start:stop] = torch.from_numpy(features)
    found = network.whole.llm.generate(
        inputs_embeds=embeddings, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert found.tolist() == golden["A.greedy"].tolist()
