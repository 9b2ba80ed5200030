"""The batched vision pass: golden numbers of 4.5, and that a record's tokens do not depend on what is beside it."""

import itertools
import random

import numpy as np
import pytest
import torch

from operators.minicpmv.absorbed import AbsorbedResampler
from operators.minicpmv.attention import Ragged, attend, group_lengths, make_bucket, plan_attention
from operators.minicpmv.encoder import Group, VisionEncoder
from operators.minicpmv.patches import PackedPatches
from operators.minicpmv.resampler import encode_times, lay_out
from operators.minicpmv.slicing import Size
from operators.minicpmv.vision import encode_patches, position_buckets
from operators.minicpmv.visual import Visual
from tests.operators import golden45

CPU = torch.device("cpu")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden():
    return golden45.tensors()


@pytest.fixture(scope="module")
def network():
    return golden45.network()


@pytest.fixture(scope="module")
def encoder(network):
    return VisionEncoder(network, golden45.FAMILY, 14, CPU)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def assert_close(found, wanted, tolerance=TOLERANCE):
    difference = np.abs(np.asarray(found) - np.asarray(wanted)).max()
    assert difference < tolerance, f"differs by {difference}"


def test_the_absorbed_form_equals_the_released_one(network, encoder):
    assert isinstance(encoder.resample, AbsorbedResampler)
    released = VisionEncoder(network, golden45.FAMILY, 14, CPU)
    released.resample = network.connector
    groups = [Group(0, tuple(frames), times) for frames, times in golden45.clip_packs()]
    groups += [Group(0, (part,), (-1,)) for part in made_slices(12, 4, 14)]
    for one, other in zip(encoder.encode_groups(groups, 0), released.encode_groups(groups, 0), strict=True):
        assert_close(one, other)


def test_the_two_dimensional_features_are_golden(encoder, golden):
    slices = golden45.page_slices()
    assert [(part.shape[0] // 14, part.shape[1] // 14) for part in slices] == [tuple(g) for g in golden["A.tgt_sizes"]]
    found = encoder.encode_groups([Group(0, (part,), (-1,)) for part in slices], 0)
    assert_close(torch.stack(found), golden["A.features"])


def test_the_three_dimensional_features_are_golden(encoder, golden):
    groups = [Group(0, tuple(frames), times) for frames, times in golden45.clip_packs()]
    assert_close(torch.stack(encoder.encode_groups(groups, 0)), golden["B.features"])


def test_a_grid_that_the_float32_step_shifts_is_golden(network, golden):
    packed = PackedPatches(golden45.odd_patches(), ((25, 41),), (0,), 0)
    encoded = encode_patches(network.tower, packed, "float32_step")
    found = network.connector(encoded, lay_out(packed.grids, [[(0, -1)]], 256, encoded))
    assert_close(found, golden["C.features_25x41"])
    exact = encode_patches(network.tower, packed, "exact")
    assert (exact - encoded).abs().max() > 0.01


def test_the_logits_are_golden(network, encoder, golden):
    ids = torch.from_numpy(golden["A.input_ids"])
    embeddings = network.embed(ids)
    groups = [Group(0, (part,), (-1,)) for part in golden45.page_slices()]
    for (start, stop), features in zip(golden["A.image_bound"], encoder.encode_groups(groups, 0), strict=True):
        embeddings[0, start:stop] = features
    hidden = network.text(inputs_embeds=embeddings).last_hidden_state
    assert_close(network.logits(hidden[0, -1]), golden["A.logits_last"])


def made_slices(count, seed, unit):
    """Crops of many grids, (height, width, 3) uint8."""
    generator = np.random.default_rng(seed)
    sides = generator.integers(1, 600 // unit, (count, 2)) * unit
    return [generator.integers(0, 256, (height, width, 3), np.uint8) for height, width in sides]


def visual_of(slices, packs=None):
    return Visual(
        np.concatenate([part.reshape(-1) for part in slices]), tuple(Size(*part.shape[:2]) for part in slices), packs
    )


def test_sixty_four_mixed_crops_are_resampled_as_if_alone(encoder):
    visuals = [visual_of([part]) for part in made_slices(64, 1, 14)]
    together = encoder.encode(visuals, [0] * 64)
    for visual, found in zip(visuals, together, strict=True):
        assert_close(found, encoder.encode([visual], [0])[0])


def test_the_order_of_records_does_not_matter(encoder):
    visuals = [visual_of(made_slices(count, count, 14)) for count in (1, 5, 2, 9, 3)]
    together = encoder.encode(visuals, [0] * 5)
    order = [3, 0, 4, 2, 1]
    shuffled = encoder.encode([visuals[place] for place in order], [0] * 5)
    for place, found in zip(order, shuffled, strict=True):
        assert_close(found, together[place])


def made_clip(pack_lengths, seed, sizes):
    """A clip with frames of one size, in packs of these lengths, with ascending times."""
    generator = np.random.default_rng(seed)
    height, width = sizes[seed % len(sizes)]
    frames = generator.integers(0, 256, (sum(pack_lengths), height, width, 3), np.uint8)
    times = iter(sorted(generator.choice(3000, sum(pack_lengths), replace=False).tolist()))
    return visual_of(list(frames), tuple(tuple(itertools.islice(times, length)) for length in pack_lengths))


def test_eight_videos_of_different_pack_counts_keep_their_own_tokens(encoder):
    sizes = ((168, 224), (224, 168), (70, 420), (168, 224))
    plans = [(6, 6, 2), (3,), (1, 1, 1), (6,), (4, 4, 4, 4, 1), (2, 5), (3, 3), (6, 6, 6, 6)]
    visuals = [made_clip(plan, seed, sizes) for seed, plan in enumerate(plans)]
    together = encoder.encode(visuals, [0] * 8)
    for visual, plan, found in zip(visuals, plans, together, strict=True):
        assert found.shape == (64 * len(plan), 256)
        assert_close(found, encoder.encode([visual], [0])[0])
    backwards = encoder.encode(visuals[::-1], [0] * 8)[::-1]
    for one, other in zip(backwards, together, strict=True):
        assert_close(one, other)


def test_videos_beside_pages_change_neither(encoder):
    page, clip = visual_of(made_slices(4, 9, 14)), made_clip((3, 2), 0, ((168, 224),))
    both = encoder.encode([page, clip], [0, 0])
    assert_close(both[0], encoder.encode([page], [0])[0])
    assert_close(both[1], encoder.encode([clip], [0])[0])


def test_chunks_of_any_size_give_the_same_tokens(network, encoder):
    visuals = [made_clip((6, 6, 2), 0, ((168, 224),)), visual_of(made_slices(7, 3, 14))]
    wanted = encoder.encode(visuals, [0, 0])
    small = VisionEncoder(network, golden45.FAMILY, 14, CPU, patches_per_call=700).encode(visuals, [0, 0])
    for one, other in zip(small, wanted, strict=True):
        assert_close(one, other)


def test_frames_of_one_pack_may_differ_in_size(encoder):
    frames = made_slices(5, 11, 14)
    mixed = visual_of(frames, ((0, 1, 2), (3, 4)))
    beside = visual_of(frames[::-1], ((4, 3, 2, 1, 0),))
    together = encoder.encode([beside, mixed], [0, 0])
    assert_close(together[1], encoder.encode([mixed], [0])[0])
    assert_close(together[0], encoder.encode([beside], [0])[0])


def test_time_changes_the_tokens_and_order_inside_a_pack_does_not(encoder):
    frames = made_slices(1, 5, 14) * 2 + made_slices(1, 6, 14)
    early, late = (encoder.encode([visual_of(frames, (times,))], [0])[0] for times in ((0, 1, 2), (0, 1, 900)))
    assert (early - late).abs().max() > 1e-3
    swapped = encoder.encode([visual_of([frames[0], frames[2], frames[1]], ((0, 2, 1),))], [0])[0]
    assert_close(swapped, early)


def test_times_far_beyond_two_hours_are_encoded():
    encoded = encode_times([-1, 0, 71_999, 10**6], 8)
    assert encoded[0].tolist() == [0] * 8
    assert encoded[1].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert np.isfinite(encoded).all()
    assert abs(float(encoded[2, 0]) - np.sin(71_999.0)) < 1e-5


def loop_attention(queries, keys, values, lengths):
    """Softmax attention inside each sequence, one after the other, in float64."""
    parts = []
    for q, k, v in zip(*(tensor.double().split(lengths) for tensor in (queries, keys, values)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(parts).float()


@pytest.mark.parametrize("seed", range(8))
def test_ragged_attention_equals_a_loop(seed):
    generator = random.Random(seed)
    lengths = [generator.choice((1, 2, 7, 30, 260, 300, 512)) for _ in range(generator.randint(1, 12))]
    if seed % 2:
        lengths.sort()
    tensors = [torch.randn(sum(lengths), 3, 8, generator=torch.Generator().manual_seed(seed + n)) for n in range(3)]
    wanted = loop_attention(*tensors, lengths)
    assert_close(attend(*tensors, plan_attention(lengths, 8, CPU, torch.float32)), wanted, 2e-6)
    # As other devices take them: padded to one length.
    padded = make_bucket(0, lengths, CPU, torch.float32)
    assert_close(attend(*tensors, Ragged((padded,), None, max(lengths))), wanted, 2e-6)


def test_similar_lengths_share_a_call_and_padding_stays_small():
    lengths = sorted([1024, 1026, 1008, 980, 1120, 64, 80, 30] * 16)
    groups = group_lengths(lengths)
    assert len(groups) <= 6
    padded = sum(max(group) ** 2 * len(group) for group in groups)
    assert padded < 1.07 * sum(length**2 for length in lengths)
    assert [length for group in groups for length in group] == lengths


def test_a_call_takes_all_sequences_of_one_length():
    assert group_lengths([700] * 300) == [[700] * 300]
    assert group_lengths([40, 44, 36]) == [[40, 44, 36]]
    assert group_lengths([100, 1000]) == [[100], [1000]]


def test_position_buckets_follow_both_rules():
    shifted = [25, 49, 50, 55, 58, 77, 82, 86, 94, 98, 100, 110, 115, 135, 147, 154, 155, 164, 165, 166, 172, 175,
               188, 189, 194, 196]  # fmt: skip
    differ = []
    for count in range(1, 200):
        exact = position_buckets(count, 70, "exact")
        assert exact.tolist() == [place * 70 // count for place in range(count)]
        rounded = position_buckets(count, 70, "float32_step")
        assert len(rounded) == count
        if not torch.equal(exact, rounded):
            differ.append(count)
    assert differ == shifted
    lower = position_buckets(25, 70, "float32_step")
    assert [int(lower[row]) for row in (5, 10, 15, 20)] == [13, 27, 41, 55]
