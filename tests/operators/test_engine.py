import random

import numpy as np
import pytest

from operators.engine.request import Completion, Request, SamplingParams, ThoughtBudget
from schemas.errors import PromptTooLongError
from tests.operators.counting_engine import LIMITS, counted, engine, request, tokens
from tests.operators.counting_model import FIRST, LOOP, STOP, VOCABULARY, CountingModel, Picture


def test_answers_come_in_the_order_of_the_requests():
    requests = [request(50), request(3, 2, 3, 54), request(2, 56), request(3, 2, 51)]
    answers = engine(CountingModel(), slot_count=2).generate(requests)
    assert tokens(answers) == [tuple(range(51, 59)), (55, 56, 57, 58), (57, 58), tuple(range(52, 59))]
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert answers[2].output_tokens == 3


@pytest.mark.parametrize("slot_count", [1, 2, 5, 64])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 2048])
def test_answers_do_not_depend_on_slots_or_chunks(slot_count, chunk_tokens):
    generator = random.Random(slot_count)
    requests = [request(*[2] * generator.randint(0, 30), generator.randint(2, 57)) for _ in range(50)]
    model = CountingModel()
    answers = engine(model, slot_count, chunk_tokens=chunk_tokens).generate(requests)
    assert tokens(answers) == [counted(one) for one in requests]
    assert max(count * rows for _, count, rows in model.prefills) <= chunk_tokens


def test_a_slot_takes_the_next_request_when_its_own_ends():
    model = CountingModel()
    run = engine(model, slot_count=2)
    run.generate([request(10), *[request(53)] * 6])
    # Six answers of five tokens and the stop token go by beside the long one; the last steps have nobody to take in.
    assert [used for used, _ in model.decoded[:30]] == [2] * 30
    assert run.stats.most_running == 2
    assert run.stats.occupancy(2) == 1.0


def test_slots_at_the_end_are_not_computed_when_few_are_left():
    model = CountingModel()
    engine(model, slot_count=8).generate([*[request(55)] * 7, request(30)])
    assert model.moves == 1
    assert model.decoded[-1] == (1, 1)


def test_no_requests_give_no_answers():
    assert engine(CountingModel()).generate([]) == []


def test_an_answer_that_is_too_long_ends_with_length():
    [answer] = engine(CountingModel()).generate([request(3, max_new_tokens=4)])
    assert (answer.token_ids, answer.finish_reason, answer.output_tokens) == ((4, 5, 6, 7), "length", 4)


def test_an_answer_may_end_with_its_first_token():
    answers = engine(CountingModel()).generate([request(58), request(3, max_new_tokens=1)])
    assert [(answer.token_ids, answer.finish_reason) for answer in answers] == [((), "stop"), ((4,), "length")]


def test_the_models_positions_bound_the_answer():
    [answer] = engine(CountingModel()).generate([request(*(3,) * 198)])
    assert (answer.token_ids, answer.finish_reason) == ((4, 5), "length")


def test_a_prompt_without_room_is_an_error_of_its_row():
    answers = engine(CountingModel()).generate([request(*(3,) * 200), request(56)])
    assert isinstance(answers[0], PromptTooLongError)
    assert answers[0].stage == "generate"
    assert answers[1].token_ids == (57, 58)


def test_the_mean_log_probability_is_the_models():
    [answer] = engine(CountingModel()).generate([request(56)])
    assert answer.mean_logprob == pytest.approx(3 - np.log(np.exp(3) + VOCABULARY - 1), abs=1e-5)


def test_times_are_counted_from_the_call_and_from_the_slot():
    answers = engine(CountingModel(), slot_count=1).generate([request(30), request(40)])
    assert 0 <= answers[0].queue_seconds < answers[1].queue_seconds
    assert answers[1].queue_seconds >= answers[0].generate_seconds > 0


def test_a_completion_compares_by_content_not_by_time():
    one = Completion((1,), "stop", 0.0, 2, queue_seconds=1.0)
    assert one == Completion((1,), "stop", 0.0, 2, queue_seconds=2.0)


def test_an_answer_in_circles_ends_as_soon_as_that_is_certain():
    requests = [request(LOOP, period, FIRST, max_new_tokens=150) for period in (1, 3, 8)]
    answers = engine(CountingModel(), repetition=LIMITS).generate(requests)
    assert {answer.finish_reason for answer in answers} == {"repetition"}
    # The prompt's own token counts for nothing; looks every 4 tokens.
    assert [len(answer.token_ids) for answer in answers] == [24, 24, 32]
    assert [answer.tokens_saved for answer in answers] == [126, 126, 118]
    [free] = engine(CountingModel()).generate(requests[:1])
    assert (free.finish_reason, free.output_tokens, free.tokens_saved) == ("length", 150, 0)


def test_neighbours_of_a_loop_do_not_notice_it():
    generator = random.Random(3)
    normal = [
        request(
            *[2] * generator.randint(0, 9), generator.randint(2, 57), temperature=generator.choice((0, 1.5)), seed=n
        )
        for n in range(30)
    ]
    loops = [request(LOOP, 1 + n % 9, FIRST, max_new_tokens=120) for n in range(15)]
    mixed = [one for pair in zip(normal[::2], loops, normal[1::2], strict=True) for one in pair]
    alone = engine(CountingModel(), slot_count=4).generate(normal)
    together = engine(CountingModel(), slot_count=4, repetition=LIMITS).generate(mixed)
    ended = [answer for answer, one in zip(together, mixed, strict=True) if one in loops]
    others = [answer for answer, one in zip(together, mixed, strict=True) if one not in loops]
    assert {answer.finish_reason for answer in ended} == {"repetition"}
    assert others == alone


def test_a_loop_is_tried_again_with_the_next_rung():
    rungs = (SamplingParams(max_new_tokens=60), SamplingParams(max_new_tokens=50, temperature=5.0))
    model = CountingModel()
    picture = Picture()
    run = engine(model, slot_count=2, repetition=LIMITS)
    answers = run.generate([request(LOOP, 3, FIRST, rungs=rungs, seed=4, visual=picture), request(40)])
    assert answers[0].finish_reason in ("stop", "length")
    assert answers[0].attempt == 3
    assert answers[0].wasted_tokens == 48
    assert answers[0].tokens_saved == 100 - 24 + 60 - 24
    assert len(set(answers[0].token_ids)) > 6
    assert answers[1] == engine(CountingModel()).generate([request(40)])[0]
    # Its pictures were not kept for attempts that hardly any answer needs.
    assert sum(model.encodings) == 3


def test_a_loop_that_no_rung_breaks_is_the_answer():
    rungs = (SamplingParams(max_new_tokens=60),)
    [answer] = engine(CountingModel(), repetition=LIMITS).generate([request(LOOP, 2, FIRST, rungs=rungs)])
    assert (answer.finish_reason, answer.attempt, answer.wasted_tokens) == ("repetition", 2, 24)
    assert len(answer.token_ids) == 24


def test_an_attempt_draws_numbers_of_its_own():
    sampling = SamplingParams(max_new_tokens=40, temperature=5.0)
    [first] = engine(CountingModel()).generate([Request((LOOP, 1, FIRST), sampling, seed=7)])
    looping = Request((LOOP, 1, FIRST), SamplingParams(max_new_tokens=40), seed=7, rungs=(sampling,))
    [second] = engine(CountingModel(), repetition=LIMITS).generate([looping])
    assert (first.attempt, second.attempt) == (1, 2)
    assert second.token_ids[:20] != first.token_ids[:20]


def test_an_exempt_pattern_may_repeat_longer():
    seen = []

    def is_exempt(pattern):
        seen.append(tuple(pattern))
        return True

    limits = LIMITS.model_copy(update={"exempt_factor": 3})
    [answer] = engine(CountingModel(), repetition=limits, is_exempt=is_exempt).generate([request(LOOP, 2, FIRST)])
    assert len(answer.token_ids) == 72
    assert {tuple(sorted(pattern)) for pattern in seen} == {(FIRST, FIRST + 1)}


def test_an_aborted_request_ends_where_it_is():
    model = CountingModel()
    run = engine(model, slot_count=1)
    tickets = run.submit([request(10), request(20), request(30)])
    for _ in range(5):
        run.step()
    run.abort(tickets[0])
    run.abort(tickets[2])
    run.abort(tickets[2])
    assert run.collect().keys() == {tickets[0], tickets[2]}
    run.abort(tickets[0])
    ended = {}
    while not ended:
        run.step()
        ended |= run.collect()
    assert ended[tickets[1]].token_ids == tuple(range(21, STOP))


def test_what_was_aborted_holds_what_was_written():
    run = engine(CountingModel(), slot_count=1)
    first, second = run.submit([request(10), request(20)])
    for _ in range(4):
        run.step()
    run.abort(first)
    run.abort(second)
    ended = run.collect()
    assert (ended[first].finish_reason, ended[first].token_ids) == ("abort", (11, 12, 13, 14, 15))
    assert (ended[second].finish_reason, ended[second].token_ids) == ("abort", ())
    assert ended[second].generate_seconds == 0
    assert ended[second].queue_seconds > 0


def test_a_long_thought_is_ended():
    budget = ThoughtBudget(max_tokens=3, end_id=40, forced_ids=(40, 55))
    [answer] = engine(CountingModel()).generate([request(10, thought=budget)])
    assert answer.token_ids == (11, 12, 13, 40, 55, 56, 57, 58)
    assert answer.finish_reason == "stop"


def test_a_thought_that_ends_in_time_is_left_alone():
    budget = ThoughtBudget(max_tokens=8, end_id=14, forced_ids=(14,))
    [answer] = engine(CountingModel()).generate([request(10, thought=budget)])
    assert answer.token_ids == tuple(range(11, STOP))


def test_forced_tokens_do_not_count_for_the_log_probability():
    budget = ThoughtBudget(max_tokens=2, end_id=40, forced_ids=(40, 41, 42, 57))
    [answer] = engine(CountingModel()).generate([request(10, thought=budget)])
    assert answer.token_ids == (11, 12, 40, 41, 42, 57, 58)
    assert answer.mean_logprob == pytest.approx(3 - np.log(np.exp(3) + VOCABULARY - 1), abs=1e-5)


def test_sampling_depends_on_the_seed_and_not_on_the_batch():
    requests = [
        request(5, max_new_tokens=20, temperature=2.0, top_k=n % 3 * 10, top_p=1 - n % 2 * 0.1, seed=n)
        for n in range(12)
    ]
    together = engine(CountingModel()).generate(requests)
    alone = [engine(CountingModel(), slot_count=1).generate([one])[0] for one in requests]
    assert tokens(together) == tokens(alone)
    assert len(set(tokens(together))) > 10
    assert tokens(engine(CountingModel(), slot_count=3).generate(requests[::-1])) == tokens(alone)[::-1]


def test_the_same_pictures_are_encoded_once():
    model = CountingModel()
    requests = [request(2 + n, 50, visual=Picture(), visual_key="page" if n % 2 else None) for n in range(8)]
    answers = engine(model, slot_count=2, encode_ahead=3).generate(requests)
    assert tokens(answers) == [counted(one) for one in requests]
    assert sum(model.encodings) == 4 + 1


def test_prepared_prompts_are_dropped_when_they_are_in_their_slots():
    run = engine(CountingModel(), slot_count=2)
    run.submit(
        [request(30, visual=Picture()), request(30, visual=Picture(), rungs=(SamplingParams(max_new_tokens=9),))]
    )
    run.step()
    assert [answer.prepared for answer in run._answers.values()] == [None, None]


def test_longer_answers_are_begun_first():
    run = engine(CountingModel(), slot_count=1)
    requests = [request(50, expected_tokens=3), request(51, expected_tokens=90), request(52, expected_tokens=10)]
    first, second, third = run.generate(requests)
    assert second.queue_seconds < third.queue_seconds < first.queue_seconds


def test_slots_have_room_for_the_longest_that_runs():
    model = CountingModel()
    engine(model, slot_count=1).generate([request(2, 57, max_new_tokens=5), request(*[2] * 9, 57, max_new_tokens=60)])
    assert model.openings == [(1, 7), (1, 70)]


def test_what_was_done_is_counted():
    run = engine(CountingModel(), slot_count=2)
    requests = [request(3, 3, 50), request(3, 54, visual=Picture()), request(55)]
    run.generate(requests)
    stats = run.stats
    # Prefill brings the first token of each; stop tokens are tokens here.
    assert stats.decoded_tokens == 8 + 4 + 3
    assert stats.prefill_tokens == 6
    assert stats.encoded_requests == 3
    assert (stats.decode_steps, stats.decode_rows) == (8, 15)
    assert (stats.busy_steps, stats.busy_tokens) == (4, 8)
    assert stats.occupancy(2) == 1.0
    assert engine(CountingModel()).stats.occupancy(2) is None
    assert min(stats.encode_seconds, stats.prefill_seconds, stats.decode_seconds) > 0
