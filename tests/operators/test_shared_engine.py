import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from operators.engine.engine import Engine
from operators.engine.request import Request, SamplingParams
from operators.engine.scheduler import SchedulerConfig
from operators.engine.shared import SharedEngine
from schemas.errors import ConfigError, WorkerLostError

VOCABULARY = 50
STOP = 49


class CountingModel:
    """Counts up from the last token of the prompt to the stop token, in slots."""

    stop_ids = (STOP,)
    max_positions = 200

    def __init__(self):
        self.last = {}
        self.drivers = set()
        self.widths = []
        self.fault = None
        self.gate = threading.Event()
        self.gate.set()

    def slots_that_fit(self, token_count):
        return None

    def open_slots(self, slot_count, capacity_tokens):
        pass

    def encode(self, prompts, visuals):
        return [list(prompt) for prompt in prompts]

    def append_prompt(self, prepared, slots, start, count):
        for one, slot in zip(prepared, slots, strict=True):
            self.last[slot] = one[start + count - 1]
        return self._logits(slots)

    def append_tokens(self, token_ids, held_tokens, active):
        self.gate.wait(10)
        self.drivers.add(threading.get_ident())
        self.widths.append(sum(active))
        if self.fault is not None:
            raise self.fault
        for slot, used in enumerate(active):
            if used:
                self.last[slot] = token_ids[slot]
        return self._logits(range(len(token_ids)))

    def move_slot(self, source, target, held_tokens):
        self.last[target] = self.last[source]

    def release_memory(self):
        pass

    def _logits(self, slots):
        logits = torch.zeros(len(slots), VOCABULARY)
        for row, slot in enumerate(slots):
            logits[row, (self.last.get(slot, 0) + 1) % VOCABULARY] = 3.0
        return logits


def request(*prompt):
    return Request(prompt, SamplingParams(max_new_tokens=100))


def shared(model, slot_count=4):
    return SharedEngine(Engine(model, SchedulerConfig(slot_count=slot_count)))


def test_each_caller_gets_its_own_answers_in_order():
    engine = shared(CountingModel())
    batches = [[request(start, 20 + (start * 7 + n) % 28) for n in range(9)] for start in range(1, 7)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(engine.generate, batches))
    for batch, answers in zip(batches, found, strict=True):
        assert [answer.token_ids for answer in answers] == [tuple(range(one.prompt_ids[-1] + 1, STOP)) for one in batch]


def test_a_second_batch_fills_the_slots_that_the_first_leaves_free():
    model = CountingModel()
    model.gate.clear()
    engine = shared(model, slot_count=4)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(engine.generate, [request(1), request(44), request(44), request(44)])
        second = pool.submit(engine.generate, [request(2)] * 3)
        while len(engine._arrived) + len(engine._tickets) < 2:
            pass
        model.gate.set()
        assert len(first.result(30)) == 4
        assert len(second.result(30)) == 3
    # Alone, the first batch would have ended with a long row of steps for its one long answer.
    assert model.widths.count(4) > 30


def test_an_empty_batch_returns_at_once():
    assert shared(CountingModel()).generate([]) == []


def test_a_lost_device_reaches_every_caller():
    model = CountingModel()
    model.gate.clear()
    model.fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    engine = shared(model)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(engine.generate, [request(3)]) for _ in range(3)]
        model.gate.set()
        for call in calls:
            with pytest.raises(WorkerLostError):
                call.result(30)


def test_after_a_surprise_later_callers_find_an_empty_engine():
    model = CountingModel()
    model.fault = TypeError("a defect")
    engine = shared(model)
    with pytest.raises(TypeError, match="a defect"):
        engine.generate([request(3), request(4)])
    model.fault = None
    assert [answer.token_ids for answer in engine.generate([request(46)])] == [(47, 48)]


def test_a_call_that_is_refused_gets_the_reason_and_the_others_their_answers():
    shared = SharedEngine(Engine(CountingModel(), SchedulerConfig(slot_count=2)))
    good, refused = request(40), Request((40,), SamplingParams(max_new_tokens=5), answer_schema="{}")
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(shared.generate, [refused if number % 3 else good]) for number in range(15)]
        for number, answer in enumerate(answers):
            if number % 3:
                with pytest.raises(ConfigError, match="was given no grammars"):
                    answer.result(timeout=30)
            else:
                assert [one.finish_reason for one in answer.result(timeout=30)] == ["stop"]
