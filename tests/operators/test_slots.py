"""What slots hold against transformers' text models without a cache, and what happens to slots that are left alone."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.prompt import PromptBuilder, PromptSettings, image_tokens
from operators.minicpmv.slicing import Size, slice_image
from operators.minicpmv.slots import SlotCache, decode_call, prefill_call, slot_bytes
from operators.minicpmv.tiny import write_tiny_model
from operators.minicpmv.visual import Visual
from tests.operators.slot_driver import SlotDriver

CPU = torch.device("cpu")
LARGEST_DIFFERENCE = 5e-5
ANSWER = (70, 71, 72, 90, 91)
"""Tokens that are given as answers."""


class Pair:
    """One tiny checkpoint loaded twice: on slots, and as transformers runs its text model."""

    def __init__(self, folder):
        self.model, self.untouched = (
            MiniCPMV(folder, device=CPU, dtype=torch.float32, attention="sdpa") for _ in range(2)
        )
        self.builder = PromptBuilder(self.model.config)

    def prompt(self, seed, with_picture=True):
        """Ids and pictures of a prompt; pictures and texts of random sizes."""
        generator = np.random.default_rng(seed)
        text = "word " * int(generator.integers(1, 30))
        settings = PromptSettings(kind="image", use_image_id=True)
        if not with_picture:
            return self.builder.build(text, [], settings), None
        image = generator.integers(0, 256, (*generator.integers(60, 500, 2), 3), dtype=np.uint8)
        sliced = slice_image(image, self.model.config.slicing.model_copy(update={"slice_side_px": 112}))
        shapes = tuple(Size(*piece.shape[:2]) for piece in sliced.slices)
        tokens = image_tokens(shapes, [sliced.grid], self.model.config.slicing)
        pixels = np.concatenate([piece.reshape(-1) for piece in sliced.slices])
        return self.builder.build(text, tokens, settings), Visual(pixels, shapes)

    def prompts(self, count):
        made = [self.prompt(seed, with_picture=seed % 3 > 0) for seed in range(count)]
        return [ids for ids, _ in made], [visual for _, visual in made]

    def wanted(self, ids, visual, answer=ANSWER):
        """Logits after the prompt and after each token of an answer, in one pass without a cache."""
        with torch.inference_mode():
            [prepared] = self.untouched.encode([ids], [visual])
            before = self.untouched._embedded(prepared, slice(0, len(ids)))
            after = self.untouched.network.embed(torch.tensor(answer))
            following = torch.arange(len(answer)) + prepared.next_position
            following = following.expand(*prepared.positions.shape[:-1], -1)
            positions = torch.cat([prepared.positions, following], dim=-1)
            hidden = self.untouched.network.text(
                inputs_embeds=torch.cat([before, after])[None], position_ids=positions.unsqueeze(-2)
            ).last_hidden_state
            return self.untouched.network.logits(hidden[0, len(ids) - 1 :])


@pytest.fixture(scope="module", params=["minicpmv4_6", "minicpmv4_7", "minicpmv4_5", "minicpmv4_0", "minicpmv2_6"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, request.param)
    return Pair(folder)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    write_tiny_model(folder, "minicpmv4_6")
    return Pair(folder)


def assert_close(found, wanted):
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) < LARGEST_DIFFERENCE


def continued(driver, logits, state, answer=ANSWER):
    """Logits after the prompts and after each token of the answer, (B, tokens, vocabulary)."""
    return torch.stack([logits, *(driver.decode(state, [token] * len(logits)) for token in answer)], dim=1)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 63, 64, 65, 100])
def test_slots_hold_what_a_pass_over_everything_sees(pair, chunk_tokens):
    # One token at a time is slow: a few prompts do.
    ids, visuals = pair.prompts(2 if chunk_tokens == 1 else 6)
    driver = SlotDriver(pair.model, slot_count=9, chunk_tokens=chunk_tokens, seed=chunk_tokens)
    found = continued(driver, *driver.prefill(ids, visuals))
    for row in range(len(ids)):
        assert_close(found[row], pair.wanted(ids[row], visuals[row]))


def test_neighbours_that_come_and_go_change_nothing(pair):
    ids, visuals = pair.prompts(12)
    driver = SlotDriver(pair.model, slot_count=8, chunk_tokens=50, seed=1)
    logits, first = driver.prefill(ids[:4], visuals[:4])
    found = [logits]
    for step, token in enumerate(ANSWER):
        # Others are prefilled into free slots, written on and dropped between the steps of the first.
        _, others = driver.prefill(ids[4 + step :][:3], visuals[4 + step :][:3])
        found.append(driver.decode(first, [token] * 4))
        driver.decode(others, [80] * 3)
        driver.keep(others, [0] if step % 2 else [])
        driver.keep(others, [])
    for row in range(4):
        assert_close(torch.stack([scores[row] for scores in found]), pair.wanted(ids[row], visuals[row]))


def test_a_slot_remembers_nothing_of_the_one_before(pair):
    ids, visuals = pair.prompts(6)
    longest = max(range(6), key=lambda row: len(ids[row]))
    for row in range(6):
        driver = SlotDriver(pair.model, slot_count=1, chunk_tokens=70)
        _, before = driver.prefill([ids[longest]], [visuals[longest]])
        driver.decode(before, [75])
        driver.keep(before, [])
        found = continued(driver, *driver.prefill([ids[row]], [visuals[row]]))
        assert_close(found[0], pair.wanted(ids[row], visuals[row]))


def test_slots_can_be_moved_while_they_are_written(pair):
    ids, visuals = pair.prompts(3)
    driver = SlotDriver(pair.model, slot_count=8)
    logits, state = driver.prefill(ids, visuals)
    found = [logits]
    generator = random.Random(0)
    for token in ANSWER:
        row = generator.randrange(3)
        target = generator.choice([slot for slot in range(8) if slot not in state.slots])
        pair.model.move_slot(state.slots[row], target, driver.held[state.slots[row]])
        driver.held[target] = driver.held[state.slots[row]]
        state.slots[row] = target
        found.append(driver.decode(state, [token] * 3))
    for row in range(3):
        assert_close(torch.stack([scores[row] for scores in found]), pair.wanted(ids[row], visuals[row]))


def test_slots_can_grow_while_they_are_written(pair):
    ids, visuals = pair.prompts(3)
    driver = SlotDriver(pair.model, slot_count=4)
    logits, state = driver.prefill(ids, visuals)
    found = [logits]
    for number, token in enumerate(ANSWER):
        pair.model.open_slots(4, 2000 + 300 * number)
        found.append(driver.decode(state, [token] * 3))
    assert pair.model.slots.capacity_tokens >= 3200
    for row in range(3):
        assert_close(torch.stack([scores[row] for scores in found]), pair.wanted(ids[row], visuals[row]))


def test_slots_can_become_more_and_fewer_while_they_are_written(pair):
    ids, visuals = pair.prompts(3)
    driver = SlotDriver(pair.model, slot_count=3)
    logits, state = driver.prefill(ids, visuals)
    longest = max(map(len, ids)) + len(ANSWER)
    found = [logits]
    for slot_count, room, token in zip((7, 7, 3, 12, 4), (longest, 1500, 300, 2000, longest), ANSWER, strict=True):
        pair.model.open_slots(slot_count, max(room, longest))
        found.append(driver.decode(state, [token] * 3))
        assert pair.model.slots.slot_count == slot_count
        assert all(len(buffer) == slot_count for buffer in (*pair.model.slots.keys.values(),))
        assert all(len(buffer) == slot_count for buffer in (*pair.model.slots.states.values(),))
    assert pair.model.slots.capacity_tokens < 1500
    for row in range(3):
        assert_close(torch.stack([scores[row] for scores in found]), pair.wanted(ids[row], visuals[row]))


def test_slots_that_are_closed_are_gone(hybrid):
    ids, visuals = hybrid.prompts(2)
    for slot_count in (2, 5, 3):
        driver = SlotDriver(hybrid.model, slot_count=slot_count)
        logits, _ = driver.prefill(ids, visuals)
        assert hybrid.model.slots.slot_count == slot_count
        assert_close(logits[0], hybrid.wanted(ids[0], visuals[0])[0])
    hybrid.model.close_slots()
    assert hybrid.model.slots is None


def held_of(cache, slot, token_count):
    """Copies of all that a slot holds."""
    kept = [buffer[slot, :, :token_count].clone() for group in (cache.keys, cache.values) for buffer in group.values()]
    return kept + [buffer[slot].clone() for group in (cache.convolutions, cache.states) for buffer in group.values()]


def test_a_gap_stays_as_it_is_to_the_bit(hybrid):
    ids, visuals = hybrid.prompts(4)
    driver = SlotDriver(hybrid.model, slot_count=4)
    _, state = driver.prefill(ids, visuals)
    kept = driver.held[state.slots[1]]
    before = held_of(hybrid.model.slots, state.slots[1], kept)
    active = [slot != state.slots[1] for slot in range(4)]
    for step in range(3):
        held = [driver.held[slot] + step * active[slot] for slot in range(4)]
        hybrid.model.append_tokens([70] * 4, held, active)
    after = held_of(hybrid.model.slots, state.slots[1], kept)
    assert len(before) == 2 * 1 + 2 * 3
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    others = held_of(hybrid.model.slots, state.slots[0], kept)
    assert not any(torch.equal(one, other) for one, other in zip(before, others, strict=True))


def test_room_that_cannot_be_had_leaves_the_slots_as_they_are(hybrid, monkeypatch):
    cache = SlotCache(
        hybrid.untouched.network.text.config,
        2,
        256,
        [CPU] * hybrid.untouched.network.text.config.num_hidden_layers,
        torch.float32,
    )
    cache.keys[99] = SimpleNamespace(shape=(2, 1, 256, 8), new_zeros=no_memory)
    cache.keys[3][0, 0, 7] = 5.0
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            cache.resize(2, 1000)
        assert cache.capacity_tokens == 256
    del cache.keys[99]
    cache.resize(2, 1000)
    assert cache.capacity_tokens == 1024
    assert {buffer.shape[2] for group in (cache.keys, cache.values) for buffer in group.values()} == {1024}
    assert float(cache.keys[3][0, 0, 7].min()) == 5.0


def no_memory(*_):
    raise torch.OutOfMemoryError("out of memory")


def test_pictures_that_are_the_same_object_go_through_the_tower_once(hybrid, monkeypatch):
    seen = []
    encode = hybrid.model.encoder.encode
    monkeypatch.setattr(
        hybrid.model.encoder, "encode", lambda visuals, levels: seen.append(len(visuals)) or encode(visuals, levels)
    )
    ids, visual = hybrid.prompt(1)
    equal = Visual(visual.pixels, visual.shapes)
    prepared = hybrid.model.encode([ids, ids, ids], [visual, equal, visual])
    assert seen == [2]
    assert prepared[0].features is prepared[2].features
    assert torch.equal(prepared[0].features, prepared[1].features)


def hybrid_config(full, linear):
    return SimpleNamespace(
        layer_types=["linear_attention"] * linear + ["full_attention"] * full,
        num_hidden_layers=full + linear,
        num_key_value_heads=2,
        num_attention_heads=8,
        head_dim=256,
        hidden_size=1024,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
    )


def plain_config(layers, kv_heads, heads, width):
    return SimpleNamespace(
        num_hidden_layers=layers, num_key_value_heads=kv_heads, num_attention_heads=heads, hidden_size=width
    )


@pytest.mark.parametrize(
    ("config", "bytes_a_token", "bytes_a_slot"),
    [
        # 18 states of 16 x 128 x 128 in float32, and three inputs of 6144 channels each.
        (hybrid_config(6, 18), 12_288, 18 * (16 * 128 * 128 * 4 + 6144 * 3 * 2)),
        (plain_config(36, 8, 32, 4096), 147_456, 0),
        (plain_config(28, 4, 28, 3584), 57_344, 0),
        (plain_config(32, 2, 32, 2560 // 80 * 128), 32_768, 0),
    ],
)
def test_a_slot_takes_as_many_bytes_as_the_released_models_need(config, bytes_a_token, bytes_a_slot):
    for tokens in (0, 1, 1000):
        assert slot_bytes(config, tokens, torch.bfloat16) == bytes_a_slot + tokens * bytes_a_token


def test_the_bytes_of_slots_are_counted_as_they_are(pair):
    config = pair.untouched.network.text.config
    for dtype in (torch.float32, torch.bfloat16):
        cache = SlotCache(config, 3, 200, [CPU] * config.num_hidden_layers, dtype)
        assert cache.byte_count() == 3 * slot_bytes(config, 200, dtype)


def test_a_token_sees_what_its_own_slot_holds_and_itself():
    call = decode_call([3, 0, 5], [True, False, True], CPU, torch.float32)
    assert (call.rows, call.stop, call.is_decode) == (slice(0, 3), 6, True)
    assert (call.mask[:, 0, 0] == 0).tolist() == [
        [True] * 4 + [False] * 2,
        [True] + [False] * 5,
        [True] * 6,
    ]
    assert call.active.tolist() == [True, False, True]
    alike = decode_call([5, 5], [True, True], CPU, torch.float32)
    assert (alike.mask, alike.active) == (None, None)


def test_a_part_of_a_prompt_sees_what_was_before_it():
    call = prefill_call([4, 5], 2, 3, CPU, torch.float32)
    assert (call.rows, call.start, call.stop, call.is_decode) == (slice(4, 6), 2, 5, False)
    assert (call.mask == 0).tolist() == [[True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5]
    scattered = prefill_call([4, 6], 0, 3, CPU, torch.float32)
    assert scattered.rows.tolist() == [4, 6]
    assert scattered.mask is None
