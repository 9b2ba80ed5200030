"""Memory that runs out, and memory that is planned for."""

import random

import pytest

from schemas.errors import GenerationError
from tests.operators.counting_engine import Faults, counted, engine, request, tokens
from tests.operators.counting_model import STOP, CountingModel, Picture, out_of_memory


@pytest.mark.parametrize("call", ["encode", "open_slots", "append_prompt", "append_tokens"])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_memory_that_runs_out_anywhere_costs_no_request(call, number):
    faults = Faults({(call, number): out_of_memory()})
    requests = [request(*[2] * (n % 4), 20 + n, visual=Picture(), max_new_tokens=10 + n) for n in range(23)]
    run = engine(CountingModel(fault=faults), slot_count=6, encode_ahead=4)
    assert tokens(run.generate(requests)) == [counted(one) for one in requests]
    assert faults.calls[call] > number


def test_slots_that_do_not_fit_are_halved_until_they_do():
    model = CountingModel(memory_tokens=150)
    requests = [request(2, 30 + n, max_new_tokens=40) for n in range(6)]
    run = engine(model, slot_count=16)
    assert tokens(run.generate(requests)) == [counted(one) for one in requests]
    assert model.openings == [(2, 42)]
    assert run.slot_count == 2
    assert model.releases > 0


def test_slots_come_back_after_some_answers_went_well():
    model = CountingModel(memory_tokens=400)
    run = engine(model, slot_count=8)
    large = request(*[2] * 100, 57, max_new_tokens=90)
    small = [request(50, max_new_tokens=10) for _ in range(300)]
    answers = run.generate([*small[:20], large, *small[20:]])
    assert tokens(answers) == [(51, 52, 53, 54, 55, 56, 57, 58)] * 20 + [(58,)] + [tuple(range(51, 59))] * 280
    assert (2, 191) in model.openings
    assert run.slot_count == 8
    assert run.stats.most_running == 8


def test_a_request_that_fits_alone_is_answered_alone():
    model = CountingModel(memory_tokens=150)
    run = engine(model, slot_count=4)
    large, small = request(*[2] * 60, 40, max_new_tokens=80), request(40, max_new_tokens=10)
    assert tokens(run.generate([small, large, small, small])) == [counted(one) for one in (small, large, small, small)]


def test_a_lone_request_gets_the_memory_of_all_slots():
    model = CountingModel(memory_tokens=8 * 60)
    # The slots fit, and what a pass needs beside them does not.
    run = engine(model, slot_count=8)
    [answer] = run.generate([request(2, 40, max_new_tokens=58)])
    assert answer.token_ids == tuple(range(41, STOP))
    assert model.openings == [(8, 60), (1, 60)]
    assert tokens(run.generate([request(40, max_new_tokens=9)] * 3)) == [tuple(range(41, 50))] * 3


def test_a_request_that_never_fits_is_an_error_of_its_row():
    run = engine(CountingModel(memory_tokens=50), slot_count=4)
    answers = run.generate(
        [request(40, max_new_tokens=5), request(40, max_new_tokens=90), request(41, max_new_tokens=5)]
    )
    assert isinstance(answers[1], GenerationError)
    assert (answers[1].code, answers[1].retryable) == ("out_of_memory", True)
    assert answers[1].exception_type == "OutOfMemoryError"
    assert [answers[0].token_ids, answers[2].token_ids] == [(41, 42, 43, 44, 45), (42, 43, 44, 45, 46)]


def test_a_request_that_does_not_fit_leaves_its_room_to_the_next():
    # The slot itself fits, and leaves nothing for a pass.
    model = CountingModel(memory_tokens=50)
    answers = engine(model, slot_count=1).generate(
        [request(2, 40, max_new_tokens=48), request(2, 40, max_new_tokens=5)]
    )
    assert answers[0].code == "out_of_memory"
    assert answers[1].token_ids == (41, 42, 43, 44, 45)
    assert model.openings == [(1, 50), (1, 7)]


def test_pictures_that_never_fit_are_an_error_of_their_row():
    requests = [request(50, visual=Picture(out_of_memory() if n == 2 else None)) for n in range(5)]
    answers = engine(CountingModel(), slot_count=2).generate(requests)
    assert [getattr(answer, "code", None) for answer in answers] == [None, None, "out_of_memory", None, None]


def test_pictures_that_fit_when_nothing_else_runs_are_encoded_then():
    run = None

    def fault(call, prompts):
        if call == "encode" and (60,) in prompts and (len(run._scheduler.running) or run.model.slot_count > 1):
            raise out_of_memory()

    model = CountingModel(fault=fault)
    run = engine(model, slot_count=3)
    short = tuple(range(51, STOP))
    assert tokens(run.generate([request(50)])) == [short]
    requests = [request(50), request(50), request(60, max_new_tokens=3), request(50)]
    assert tokens(run.generate(requests)) == [short, short, (1, 2, 3), short]


def planned(memory_tokens, slot_count=64, planned_tokens=None, **options):
    """An engine on a model that knows its memory, or errs about it, and the model."""
    model = CountingModel(memory_tokens, planned_tokens=planned_tokens or memory_tokens)
    return engine(model, slot_count, **options), model


def short(number=0, **options):
    """A request of 20 tokens."""
    return request(*[2] * 8, 40 + number % 9, max_new_tokens=11, **options)


def long(number=0, **options):
    """A request of 200 tokens, which writes no more than a short one."""
    return request(*[2] * 188, 40 + number % 9, max_new_tokens=11, **options)


def test_there_are_as_many_slots_as_fit():
    run, model = planned(30 * 21)
    requests = [short(n) for n in range(100)]
    assert tokens(run.generate(requests)) == [counted(one) for one in requests]
    assert model.openings == [(30, 20)]
    assert run.slot_count == 30
    assert model.releases == 0


def test_a_long_request_waits_for_the_short_ones_and_runs_with_fewer_slots():
    run, model = planned(1000)
    requests = [short(n) for n in range(100)]
    requests[3] = long()
    assert tokens(run.generate(requests)) == [counted(one) for one in requests]
    # It goes into 4 slots beside the last of the short ones.
    assert model.openings == [(47, 20), (4, 200)]
    assert model.releases == 0


def test_after_a_long_request_there_are_many_slots_again():
    run, model = planned(1000)
    requests = [long(), *[short(n) for n in range(100)]]
    assert tokens(run.generate(requests)) == [counted(one) for one in requests]
    assert model.openings == [(4, 200), (47, 20)]
    assert run.stats.most_running == 47


def test_long_requests_go_one_after_the_other():
    run, model = planned(1000)
    requests = [(long if n % 10 == 0 else short)(n) for n in range(200)]
    assert tokens(run.generate(requests)) == [counted(one) for one in requests]
    assert [count for count, _ in model.openings] == [4, 47]
    # Slots for long ones are few while they last, and none of them is idle.
    assert run.stats.occupancy() > 0.9
    assert model.releases == 0


def test_what_runs_stays_in_its_slot_when_the_slots_change():
    run, model = planned(1000, slot_count=16)
    first = [request(*[2] * 8, n, max_new_tokens=50 - n) for n in range(3, 18)]
    tickets = run.submit(first)
    for _ in range(34):
        run.step()
    tickets += run.submit([long(), long(1)])
    ended = {}
    while len(ended) < len(tickets):
        run.step()
        ended |= run.collect()
    assert [ended[ticket].token_ids for ticket in tickets] == [counted(one) for one in [*first, long(), long(1)]]
    assert [count for count, _ in model.openings] == [16, 4]
    assert model.moves > 0
    # Nothing began again: each prompt went through once.
    assert run.stats.prefill_tokens == sum(len(one.prompt_ids) for one in [*first, long(), long(1)])


def test_a_long_request_is_not_overtaken_for_ever():
    run, _ = planned(1000, most_overtaking=60)
    [ticket] = run.submit([short()])
    run.step()
    [waiting] = run.submit([long()])
    seen = set()
    for number in range(600):
        run.submit([short(number)])
        run.step()
        seen |= run.collect().keys()
        if waiting in seen:
            break
    assert waiting in seen
    assert ticket in seen
    assert 60 < number < 200


def test_a_request_that_by_the_plan_does_not_fit_is_tried():
    run, _ = planned(150, planned_tokens=75)
    outcomes = run.generate([short(), request(*[2] * 90, 40, max_new_tokens=11), long()])
    assert tokens(outcomes[:2]) == [counted(short())] * 2
    assert outcomes[2].code == "out_of_memory"


def test_memory_that_runs_out_in_spite_of_the_plan_is_answered_by_fewer_slots():
    run, model = planned(1000, planned_tokens=1300)
    requests = [(long if n % 10 == 5 else short)(n) for n in range(100)]
    assert tokens(run.generate(requests)) == [counted(one) for one in requests]
    assert model.releases > 0
    assert run.stats.most_running >= 30


@pytest.mark.parametrize("seed", range(25))
def test_whatever_comes_no_slots_are_opened_that_do_not_fit(seed):
    generator = random.Random(seed)
    run, model = planned(
        generator.choice((250, 400, 1000, 5000)),
        generator.choice((1, 3, 20, 64)),
        chunk_tokens=generator.choice((5, 100, 500)),
        encode_ahead=generator.randint(1, 8),
        most_overtaking=generator.choice((0, 5, 512)),
    )
    requests = []
    for _ in range(80):
        start = generator.randint(10, 57)
        prompt = [2] * generator.choice((0, 4, 30, 60, generator.randint(0, 130)))
        requests.append(
            request(
                *prompt,
                start,
                max_new_tokens=generator.randint(1, 48),
                expected_tokens=generator.choice((0, 0, 9)),
                visual=Picture(),
                visual_key=generator.choice((None, "a", "b")),
            )
        )
    order = generator.sample(range(80), 80)
    numbers, ended = {}, {}
    while len(ended) < 80:
        count = generator.randint(0, 20)
        coming, order = order[:count], order[count:]
        numbers |= dict(zip(run.submit([requests[number] for number in coming]), coming, strict=True))
        for _ in range(generator.randint(1, 30)):
            run.step()
        ended |= {numbers[ticket]: outcome for ticket, outcome in run.collect().items()}
    assert [ended[number].token_ids for number in range(80)] == [counted(one) for one in requests]
    # Memory never ran out, and no prompt went through twice.
    assert model.releases == 0
    assert run.stats.prefill_tokens == sum(len(one.prompt_ids) for one in requests)


@pytest.mark.parametrize("seed", range(60))
def test_a_fault_in_company_under_a_plan_costs_no_other_request(seed):
    """What failed runs again one by one, long ones and short ones, while others of both kinds wait."""
    choice = random.Random(seed)
    call = choice.choice(["append_tokens", "append_prompt", "encode"])
    faults = Faults({(call, choice.randrange(1, 30)): RuntimeError("a kernel failed")})
    model = CountingModel(1600, planned_tokens=1600, fault=faults, max_positions=4000)
    requests = [request(*[2] * choice.randrange(50, 400), 40, max_new_tokens=15) for _ in range(12)]
    run = engine(model, most_overtaking=choice.choice([3, 512]))
    tickets = run.submit(requests)
    ended = {}
    for _ in range(3000):
        run.step()
        ended |= run.collect()
    failed = [ticket for ticket in tickets if isinstance(ended[ticket], GenerationError)]
    # One that ran by itself when it happened had nobody to share the blame with.
    assert len(failed) <= 1
    for ticket, one in zip(tickets, requests, strict=True):
        assert ticket in failed or ended[ticket].token_ids == counted(one)


class Shrinking(CountingModel):
    """Memory of which others take a part, as is seen when it runs out."""

    def release_memory(self):
        super().release_memory()
        self.planned_tokens = int(self.planned_tokens * 0.6)


@pytest.mark.parametrize("seed", range(60))
def test_a_plan_that_shrinks_costs_no_request_that_runs(seed):
    choice = random.Random(seed)
    faults = Faults({("encode", choice.randrange(2, 12)): out_of_memory()})
    model = Shrinking(10**6, planned_tokens=3000, fault=faults, max_positions=4000)
    requests = [
        request(*[2] * choice.randrange(20, 400), 40, max_new_tokens=choice.randrange(3, 18)) for _ in range(60)
    ]
    assert tokens(engine(model, slot_count=16).generate(requests)) == [counted(one) for one in requests]
