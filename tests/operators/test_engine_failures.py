"""What fails inside the model costs its own request, or the worker; never another request."""

import random

import pytest
import torch

from operators.engine.request import Completion, SamplingParams
from schemas.errors import GenerationError, WorkerLostError
from tests.operators.counting_engine import LIMITS, Faults, counted, engine, request, tokens
from tests.operators.counting_model import FIRST, LOOP, STOP, CountingModel, Picture, out_of_memory


@pytest.mark.parametrize("failure", [ValueError("bad shape"), GenerationError("bad row"), IndexError("out of range")])
def test_one_bad_picture_costs_one_row(failure):
    requests = [request(50), request(51, visual=Picture(failure)), request(52), request(53)]
    answers = engine(CountingModel()).generate(requests)
    assert isinstance(answers[1], GenerationError)
    assert str(failure) in str(answers[1])
    assert [answer.token_ids[0] for answer in (answers[0], answers[2], answers[3])] == [51, 53, 54]


@pytest.mark.parametrize("call", ["append_prompt", "append_tokens"])
@pytest.mark.parametrize("failure", [ValueError("bad shape"), GenerationError("bad row"), RuntimeError("no kernel")])
def test_one_bad_request_in_a_pass_costs_one_row(call, failure):
    def fault(name, prompts):
        if name == call and any(prompt[0] == 7 for prompt in prompts):
            raise failure

    requests = [request(3, 40 + n) for n in range(5)]
    requests[2] = request(7, 40)
    model = CountingModel(fault=fault)
    answers = engine(model, slot_count=4).generate(requests)
    assert isinstance(answers[2], GenerationError)
    assert str(failure) in str(answers[2])
    assert tokens(answers[:2] + answers[3:]) == [counted(one) for one in requests[:2] + requests[3:]]
    assert (1, 1) in model.decoded


def test_after_running_alone_requests_share_the_slots_again():
    faults = Faults({("append_tokens", 3): ValueError("once")})
    model = CountingModel(fault=faults)
    run = engine(model, slot_count=4)
    requests = [request(40 + n % 9) for n in range(12)]
    assert tokens(run.generate(requests)) == [counted(one) for one in requests]
    before = len(model.decoded)
    assert tokens(run.generate(requests)) == [counted(one) for one in requests]
    assert model.decoded[before] == (4, 4)


@pytest.mark.parametrize("call", ["encode", "open_slots", "append_prompt", "append_tokens"])
@pytest.mark.parametrize(
    "fault",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"),
    ],
)
def test_a_device_fault_loses_the_worker(call, fault):
    model = CountingModel(fault=Faults({(call, 1): fault}))
    with pytest.raises(WorkerLostError, match=str(fault)[:20]):
        engine(model).generate([request(40), request(41)])


def test_after_an_error_that_nobody_expected_nothing_is_left_over():
    model = CountingModel(fault=Faults({("append_tokens", 3): TypeError("a programmer's mistake")}))
    run = engine(model, slot_count=2)
    with pytest.raises(TypeError):
        run.generate([request(40)] * 5)
    assert tokens(run.generate([request(50)])) == [counted(request(50))]
    assert run.stats.decoded_tokens < 30


class Broken:
    """Fails at one call, from its `number` on and for good."""

    def __init__(self, call, number, error):
        self.call = call
        self.left = number
        self.error = error

    def __call__(self, call, prompts):
        if call == self.call:
            self.left -= 1
            if self.left < 0:
                raise self.error


def run_to_the_end(run):
    while not run._scheduler.is_idle:
        run.step()


@pytest.mark.parametrize("call", ["encode", "append_prompt", "append_tokens"])
@pytest.mark.parametrize("after", [0, 3, 6])
@pytest.mark.parametrize("slot_count", [1, 4])
def test_an_engine_that_breaks_fails_no_request(call, after, slot_count):
    model = CountingModel(fault=Broken(call, after, RuntimeError("no kernel image is available")))
    run = engine(model, slot_count, encode_ahead=2)
    tickets = run.submit([request(50 + n % 8, visual=Picture()) for n in range(40)])
    with pytest.raises(WorkerLostError, match=r"must be able to answer: no kernel image"):
        run_to_the_end(run)
    assert all(isinstance(outcome, Completion) for outcome in run.collect().values())
    with pytest.raises(WorkerLostError):
        engine(model).generate([request(50)])
    assert len(tickets) == 40


def test_an_engine_that_cannot_see_any_more_fails_no_request():
    def fault(call, prompts):
        if call == "encode" and any(prompt[0] == 5 for prompt in prompts):
            raise ValueError("the tower is broken")

    # Texts alone still work: only a known request with a picture tells.
    requests = [request(50), request(5, 50, visual=Picture())]
    with pytest.raises(WorkerLostError, match="the tower is broken"):
        engine(CountingModel(fault=fault), known_good=request(5, 6, visual=Picture())).generate(requests)
    outcomes = engine(CountingModel(fault=fault)).generate(requests)
    assert isinstance(outcomes[1], GenerationError)


def test_scores_that_are_no_numbers_are_a_broken_engine():
    model = CountingModel(fault=Faults({("append_tokens", number): ValueError("bad shape") for number in (1, 2)}))
    logits = model._logits
    model._logits = lambda sequences: logits(sequences) * (float("nan") if len(sequences[0]) == 4 else 1)
    with pytest.raises(WorkerLostError, match="not finite"):
        engine(model).generate([request(50)])


def test_a_bad_record_is_told_from_a_broken_engine_while_others_run():
    asked = []

    def fault(call, prompts):
        asked.extend((call, prompt) for prompt in prompts if prompt[0] == STOP)

    bad = Picture(ValueError("no such size"))
    model = CountingModel(fault=fault)
    requests = [request(20 + n, visual=bad if n == 5 else None) for n in range(9)]
    outcomes = engine(model, 3, encode_ahead=1).generate(requests)
    assert [isinstance(outcome, GenerationError) for outcome in outcomes] == [n == 5 for n in range(9)]
    assert tokens(outcomes[:5] + outcomes[6:]) == [counted(one) for one in requests[:5] + requests[6:]]
    # Others were running on the text model, so it was not asked.
    assert asked == [("encode", (STOP,) * 4)]


def test_a_record_that_is_bad_on_purpose_asks_nothing_of_the_engine():
    faults = Faults({})
    model = CountingModel(fault=faults)
    engine(model).generate([request(50, visual=Picture(GenerationError("no such size")))])
    assert faults.calls == {"encode": 1}


def test_memory_that_is_lacking_for_the_known_request_says_nothing():
    def fault(call, prompts):
        if call == "append_tokens":
            raise ValueError("bad shape") if prompts[0][0] == 7 else out_of_memory()

    [outcome] = engine(CountingModel(fault=fault)).generate([request(7, 40)])
    assert isinstance(outcome, GenerationError)
    assert "bad shape" in str(outcome)


def chaos(generator, count):
    """Requests of all kinds."""
    requests = []
    for number in range(count):
        kind = generator.random()
        prompt = [generator.randint(2, 6) for _ in range(generator.randint(0, 40))]
        prompt = [LOOP, generator.randint(1, 6), FIRST] if kind < 0.1 else [*prompt, generator.randint(7, 57)]
        picture = Picture(ValueError("bad picture") if kind > 0.95 else None)
        requests.append(
            request(
                *prompt,
                max_new_tokens=generator.randint(1, 80),
                temperature=generator.choice((0, 0, 2.0)),
                seed=number,
                visual=generator.choice((None, picture)),
                visual_key=None if picture.error else generator.choice((None, "a", "b")),
                expected_tokens=generator.choice((0, 10, 100)),
                rungs=generator.choice(((), (SamplingParams(max_new_tokens=30, temperature=4.0),))),
            )
        )
    return requests


def becomes(one, memory_tokens, poisoned):
    """What a request may become: an answer, or error codes; whichever comes first where it has several faults."""
    codes = set()
    # A prompt that is equal to a poisonous one is poison.
    if one.prompt_ids in poisoned or (one.visual is not None and one.visual.error is not None):
        codes.add("generation")
    if len(one.prompt_ids) + one.sampling.max_new_tokens >= memory_tokens:
        codes.add("out_of_memory")
    return codes or engine(CountingModel(), slot_count=1, repetition=LIMITS).generate([one])


@pytest.mark.parametrize("seed", range(40))
def test_whatever_fails_each_request_gets_its_own_answer(seed):
    generator = random.Random(seed)
    requests = chaos(generator, 30)
    memory_tokens = generator.choice((90, 130, 300, 1000))
    poison = {number for number in range(30) if generator.random() < 0.05}
    poisoned = {requests[number].prompt_ids for number in poison}
    wanted = [becomes(one, memory_tokens, poisoned) for one in requests]

    def fault(call, prompts):
        if call != "encode" and any(prompt[: len(bad)] == bad for prompt in prompts for bad in poisoned):
            raise ValueError("poison")
        if len(prompts) > 1 and generator.random() < 0.01:
            raise generator.choice((out_of_memory(), RuntimeError("by chance"), MemoryError()))

    model = CountingModel(memory_tokens, fault)
    run = engine(
        model,
        generator.choice((1, 2, 5, 12)),
        LIMITS,
        chunk_tokens=generator.choice((3, 30, 500)),
        encode_ahead=generator.randint(1, 8),
    )
    answers = run.generate(requests[:20]) + run.generate(requests[20:])
    for answer, right in zip(answers, wanted, strict=True):
        assert getattr(answer, "code", answer) in right
    assert not run._answers
    assert not run.collect()
