"""How many slots fit, by what is free on the devices."""

from types import SimpleNamespace

import pytest
import torch

from operators.minicpmv.budget import SlotBudget, free_bytes, keep_to_share
from operators.minicpmv.memory import SPARE
from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.slots import GROWTH_TOKENS, SlotCache, slot_bytes
from operators.minicpmv.tiny import write_tiny_model

CPU = torch.device("cpu")
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
GIB = 2**30

QWEN3_8B = SimpleNamespace(
    num_hidden_layers=36, num_key_value_heads=8, num_attention_heads=32, head_dim=128, hidden_size=4096
)
"""The text model of 4.5."""


def planned(free, devices=(FIRST,) * 36, share=1.0, pass_bytes=2 * GIB, row_bytes=0):
    """A budget where so many bytes are free on each device."""

    def measure(device, asked):
        assert asked == share
        return free[device]

    return SlotBudget(
        QWEN3_8B, devices, torch.bfloat16, share=share, pass_bytes=pass_bytes, row_bytes=row_bytes, measure=measure
    )


@pytest.mark.parametrize("token_count", [256, 1024, 5376, 20_224])
def test_slots_fill_what_is_free_but_for_a_pass_and_a_spare_part(token_count):
    made = planned({FIRST: 60 * GIB})
    count = made.slots_that_fit(token_count, 0, 0)
    each, room = slot_bytes(QWEN3_8B, token_count, torch.bfloat16), 60 * GIB * (1 - SPARE) - 2 * GIB
    assert count * each <= room < (count + 1) * each


def test_long_clips_of_the_largest_member_do_not_fit_64_times_on_80_gb():
    made = planned({FIRST: 61 * GIB})
    assert made.slots_that_fit(1_400 + 2_048, 0, 0) > 64
    assert made.slots_that_fit(12_000, 0, 0) < 64
    assert made.slots_that_fit(12_000, 0, 0) >= 30


def test_slots_are_counted_with_the_room_that_they_get():
    made = planned({FIRST: 60 * GIB})
    assert made.slots_that_fit(GROWTH_TOKENS + 1, 0, 0) == made.slots_that_fit(2 * GROWTH_TOKENS, 0, 0)


def test_more_tokens_never_let_more_fit():
    made = planned({FIRST: 40 * GIB}, row_bytes=3_000_000)
    counts = [made.slots_that_fit(token_count, 0, 0) for token_count in range(1, 40_000, 97)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] > 0


def test_slots_that_are_open_make_room_for_others():
    taken = 20 * slot_bytes(QWEN3_8B, 4096, torch.bfloat16)
    with_slots = planned({FIRST: 60 * GIB - taken}).slots_that_fit(2048, 20, 4096)
    assert with_slots == planned({FIRST: 60 * GIB}).slots_that_fit(2048, 0, 0)


def test_the_fullest_device_bounds_the_slots():
    devices = (FIRST,) * 12 + (SECOND,) * 24
    even = planned({FIRST: 30 * GIB, SECOND: 30 * GIB}, devices).slots_that_fit(4096, 0, 0)
    more_on_first = planned({FIRST: 60 * GIB, SECOND: 30 * GIB}, devices).slots_that_fit(4096, 0, 0)
    more_on_second = planned({FIRST: 30 * GIB, SECOND: 60 * GIB}, devices).slots_that_fit(4096, 0, 0)
    assert even == more_on_first < more_on_second


def test_memory_is_measured_once_until_it_has_run_out():
    free = {FIRST: 60 * GIB}
    made = planned(free)
    before = made.slots_that_fit(4096, 0, 0)
    free[FIRST] = 30 * GIB
    assert made.slots_that_fit(4096, 0, 0) == before
    made.forget()
    assert made.slots_that_fit(4096, 0, 0) < before


def test_nothing_fits_where_not_even_a_pass_does():
    assert planned({FIRST: GIB}).slots_that_fit(1, 0, 0) == 0


@pytest.mark.parametrize(
    ("share", "free", "reserved", "wanted"),
    [
        (1.0, 50, 25, 50 + 25 - 20),
        # Half of 80, of which this process uses 20.
        (0.5, 50, 25, 20),
        # Another process has taken more than its part.
        (0.5, 3, 25, 3 + 25 - 20),
        (0.25, 50, 25, 0),
    ],
)
def test_a_worker_has_its_share_of_a_gpu(monkeypatch, share, free, reserved, wanted):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 20 * GIB)
    assert free_bytes(FIRST, share) == wanted * GIB


def test_a_worker_cannot_take_the_part_of_its_neighbour(monkeypatch):
    bounds = {}
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, index: bounds.update({index: share})
    )
    keep_to_share((FIRST, SECOND, torch.device("cuda")), 1.0)
    assert bounds == {}
    keep_to_share((CPU,), 0.5)
    assert bounds == {}
    keep_to_share((torch.device("cuda"), SECOND), 0.5)
    assert bounds == {0: 0.5, 1: 0.5}


def test_a_cpu_is_not_bounded():
    assert free_bytes(CPU, 1.0) is None


@pytest.mark.parametrize("name", ["minicpmv4_6", "minicpmv4_5"])
def test_a_model_plans_with_the_bytes_that_its_slots_take(tmp_path, name):
    write_tiny_model(tmp_path, name)
    model = MiniCPMV(tmp_path, device=CPU, dtype=torch.float32, attention="sdpa", pass_tokens=512)
    assert model.slots_that_fit(1000) is None
    free = 4 * model.budget.pass_bytes + 50_000_000
    made = SlotBudget(
        model.network.text.config,
        model.budget.devices,
        torch.float32,
        share=1.0,
        pass_bytes=model.budget.pass_bytes,
        row_bytes=model.budget.row_bytes,
        measure=lambda *_: free,
    )
    model.budget = made
    count = model.slots_that_fit(1024)
    cache = SlotCache(model.network.text.config, count, 1024, made.devices, torch.float32)
    left = free * (1 - SPARE) - made.pass_bytes - count * made.row_bytes - cache.byte_count()
    assert 0 <= left < cache.byte_count() / count + made.row_bytes
    # Open slots change nothing: what they take is free for others.
    free -= cache.byte_count()
    model.slots = cache
    made.forget()
    assert model.slots_that_fit(1024) == count
    model.release_memory()
    assert made._rooms is None
