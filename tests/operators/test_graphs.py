"""Steps padded to shapes that come again: the same numbers, and gaps stay as they are. Recording itself needs a GPU."""

import random

import pytest
import torch

from operators.engine.engine import Engine
from operators.engine.request import Request, SamplingParams
from operators.engine.scheduler import SchedulerConfig
from operators.minicpmv.graphs import DecodeGraphs, Shape, padded_shape
from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.tiny import write_tiny_model

CPU = torch.device("cpu")
LARGEST_DIFFERENCE = 2e-5
"""Between logits of a step and of the same step padded, which are of the order of 1."""


@pytest.fixture(scope="module", params=["minicpmv4_6", "minicpmv4_7", "minicpmv4_5", "minicpmv4_0"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, request.param)
    return MiniCPMV(folder, device=CPU, dtype=torch.float32, attention="sdpa")


def prompts(generator, count):
    return [[generator.randrange(1, 200) for _ in range(generator.randint(3, 300))] for _ in range(count)]


def filled(model, texts, slot_count=8, room=700):
    """Slots that hold these prompts; returns tokens that each holds."""
    model.graphs = None
    model.close_slots()
    model.open_slots(slot_count, room)
    for slot, text in enumerate(texts):
        model.append_prompt(model.encode([text], [None]), [slot], 0, len(text))
    return [len(text) for text in texts]


def contents(model):
    """Copies of all that the slots hold."""
    cache = model.slots
    groups = (cache.keys, cache.values, cache.convolutions, cache.states)
    return [buffer.clone() for group in groups for buffer in group.values()]


@pytest.mark.parametrize(
    ("row_count", "stop", "wanted"),
    [
        (1, 1, Shape(1, 256)),
        (3, 256, Shape(4, 256)),
        (8, 257, Shape(8, 512)),
        (9, 300, Shape(16, 512)),
        (41, 1900, Shape(48, 2000)),
        (57, 2000, Shape(60, 2000)),
    ],
)
def test_steps_are_padded_within_the_slots(row_count, stop, wanted):
    assert padded_shape(row_count, stop, slot_count=60, capacity_tokens=2000) == wanted


def test_a_padded_step_gives_the_same_logits_and_leaves_the_same_slots(model):
    generator = random.Random(1)
    texts = prompts(generator, 5)
    for active in ([True] * 5, [True, False, True, False, True]):
        held = filled(model, texts)
        tokens = [generator.randrange(1, 200) for _ in texts]
        wanted = model.append_tokens(tokens, held, active)
        after = contents(model)
        held = filled(model, texts)
        model.graphs = DecodeGraphs(model.padded_step, CPU, record_after=1)
        found = model.append_tokens(tokens, held, active)
        assert found.shape == wanted.shape
        for slot, used in enumerate(active):
            if used:
                assert float((found[slot] - wanted[slot]).abs().max()) < LARGEST_DIFFERENCE
        for mine, theirs in zip(contents(model), after, strict=True):
            for slot, used in enumerate(active):
                if used:
                    assert float((mine[slot] - theirs[slot]).abs().max()) < LARGEST_DIFFERENCE


def test_a_padded_step_leaves_gaps_and_slots_behind_as_they_are_to_the_bit(model):
    texts = prompts(random.Random(2), 8)
    held = filled(model, texts)
    model.graphs = DecodeGraphs(model.padded_step, CPU, record_after=1)
    before = contents(model)
    # Five rows become eight: the last three are prompts of others, of whose lengths a step knows nothing.
    model.append_tokens([7] * 5, held[:5], [True, False, True, True, False])
    after = contents(model)
    for kept, left in zip(before, after, strict=True):
        for slot in (1, 4, 5, 6, 7):
            assert torch.equal(kept[slot], left[slot])
        assert not torch.equal(kept[0], left[0])


def test_a_step_of_gaps_alone_changes_nothing(model):
    texts = prompts(random.Random(3), 8)
    filled(model, texts)
    before = contents(model)
    with torch.inference_mode():
        logits = model.padded_step(torch.zeros(4, 8, dtype=torch.int64), 256)
    assert torch.isfinite(logits).all()
    assert all(torch.equal(kept, left) for kept, left in zip(before, contents(model), strict=True))


def requests(generator, count):
    return [
        Request(
            tuple(text),
            SamplingParams(max_new_tokens=generator.randint(1, 40), temperature=generator.choice((0, 0, 1.5))),
            seed=number,
        )
        for number, text in enumerate(prompts(generator, count))
    ]


@pytest.mark.parametrize("slot_count", [3, 11])
def test_answers_are_the_same_with_padded_steps(model, slot_count):
    asked = requests(random.Random(slot_count), 24)
    config = SchedulerConfig(slot_count=slot_count, chunk_tokens=120)
    model.graphs = None
    wanted = Engine(model, config).generate(asked)
    model.graphs = DecodeGraphs(model.padded_step, CPU, record_after=2)
    found = Engine(model, config).generate(asked)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in wanted]
    assert len(model.graphs._recorded) > 1
    assert max(shape.rows for shape in model.graphs._recorded) <= slot_count


def test_what_was_recorded_is_dropped_with_the_slots(model):
    texts = prompts(random.Random(4), 2)
    held = filled(model, texts)
    graphs = model.graphs = DecodeGraphs(model.padded_step, CPU, record_after=2)
    for change in (
        lambda: model.open_slots(8, 3000),
        lambda: model.open_slots(5, 3000),
        model.release_memory,
        model.close_slots,
    ):
        for step in range(3):
            model.append_tokens([7, 8], [length + step for length in held], [True] * 2)
            assert len(graphs._recorded) == (step > 0)
        model.open_slots(model.slots.slot_count, 100)
        assert graphs._recorded
        change()
        assert not graphs._recorded


class Unrecordable(DecodeGraphs):
    """Fails as a step does that makes the host wait while it is recorded."""

    def _record_on_gpu(self, numbers, shape):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def test_what_cannot_be_recorded_runs_as_it_is_and_is_said_once(caplog, monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: zeros(*shape, dtype=options["dtype"]))
    graphs = Unrecordable(lambda numbers, stop: numbers, torch.device("cuda"), record_after=1)
    for _ in range(3):
        assert graphs.run([[1], [2], [3], [1]], Shape(1, 256)) is None
    assert not graphs.is_usable
    assert len(caplog.records) == 1
    assert "not permitted" in caplog.text


def test_a_cpu_records_nothing(tmp_path):
    write_tiny_model(tmp_path)
    assert MiniCPMV(tmp_path, device=CPU, dtype=torch.float32, attention="sdpa", records_steps=True).graphs is None
