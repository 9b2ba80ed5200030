import numpy as np
import pytest
import torch

from operators.engine.engine import BatchEngine, plan_batches
from operators.engine.request import Completion, Request, SamplingParams, ThoughtBudget
from operators.engine.sampler import choose_tokens, penalised
from schemas.errors import GenerationError, PromptTooLongError, WorkerLostError

VOCABULARY = 50
STOP = 49


class CountingModel:
    """Counts up from the last token of the prompt to the stop token; knows each sequence by its own tokens alone."""

    stop_ids = (STOP,)
    max_positions = 200

    def __init__(self, most_rows=10**6, fault=None):
        self.most_rows = most_rows
        self.fault = fault
        self.batches = []
        self.decoded_rows = []
        self.releases = 0

    def prefill(self, prompts, visuals):
        self.batches.append([list(prompt) for prompt in prompts])
        if len(prompts) > self.most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        for visual in visuals:
            if visual is not None:
                raise visual
        state = [[prompt[-1]] for prompt in prompts]
        return self._logits(state), state

    def decode(self, state, token_ids):
        if self.fault is not None:
            raise self.fault
        self.decoded_rows.append(len(token_ids))
        for sequence, token in zip(state, token_ids, strict=True):
            sequence.append(token)
        return self._logits(state)

    def keep(self, state, rows):
        state[:] = [state[row] for row in rows]

    def release_memory(self):
        self.releases += 1

    def _logits(self, state):
        logits = torch.zeros(len(state), VOCABULARY)
        for row, sequence in enumerate(state):
            logits[row, (sequence[-1] + 1) % VOCABULARY] = 3.0
        return logits


def request(*prompt, max_new_tokens=100, **options):
    sampling = {name: options.pop(name) for name in list(options) if name in SamplingParams.model_fields}
    return Request(prompt, SamplingParams(max_new_tokens=max_new_tokens, **sampling), **options)


def engine(model, max_rows=8):
    return BatchEngine(model, max_rows=max_rows, max_prompt_tokens=1000)


def test_answers_come_in_the_order_of_the_requests():
    requests = [request(40), request(1, 2, 3, 44), request(1, 46), request(1, 2, 41)]
    answers = engine(CountingModel(), max_rows=2).generate(requests)
    assert [answer.token_ids for answer in answers] == [
        tuple(range(41, 49)), (45, 46, 47, 48), (47, 48), tuple(range(42, 49)),
    ]  # fmt: skip
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert answers[2].output_tokens == 3


def test_similar_lengths_share_a_batch():
    assert plan_batches({0: 5, 1: 50, 2: 7, 3: 48}, 2, 1000) == [[1, 3], [2, 0]]


def test_a_batch_is_bounded_in_padded_tokens():
    assert plan_batches({0: 60, 1: 50, 2: 40, 3: 700}, 8, 120) == [[3], [0, 1], [2]]


def test_an_ended_sequence_leaves_its_batch():
    model = CountingModel()
    engine(model).generate([request(40), request(46), request(44)])
    assert model.decoded_rows[:2] == [3, 3]
    assert model.decoded_rows[-1] == 1
    assert sum(model.decoded_rows) == 8 + 2 + 4


def test_an_answer_that_is_too_long_ends_with_length():
    [answer] = engine(CountingModel()).generate([request(3, max_new_tokens=4)])
    assert answer.token_ids == (4, 5, 6, 7)
    assert answer.finish_reason == "length"
    assert answer.output_tokens == 4


def test_the_models_positions_bound_the_answer():
    prompt = (3,) * 198
    [answer] = engine(CountingModel()).generate([request(*prompt)])
    assert answer.token_ids == (4, 5)
    assert answer.finish_reason == "length"


def test_a_prompt_without_room_is_an_error_of_its_row():
    answers = engine(CountingModel()).generate([request(*(3,) * 200), request(46)])
    assert isinstance(answers[0], PromptTooLongError)
    assert answers[0].stage == "generate"
    assert answers[1].token_ids == (47, 48)


def test_a_batch_without_memory_is_halved():
    model = CountingModel(most_rows=2)
    requests = [request(40 + index) for index in range(7)]
    answers = engine(model).generate(requests)
    assert [answer.token_ids for answer in answers] == [tuple(range(41 + index, 49)) for index in range(7)]
    assert [len(batch) for batch in model.batches] == [7, 3, 1, 2, 4, 2, 2]
    assert model.releases == 3


def test_a_request_that_never_fits_is_an_error_of_its_row():
    [answer] = engine(CountingModel(most_rows=0)).generate([request(40)])
    assert isinstance(answer, GenerationError)
    assert answer.code == "out_of_memory"
    assert answer.retryable
    assert answer.exception_type == "OutOfMemoryError"


@pytest.mark.parametrize("failure", [ValueError("bad shape"), GenerationError("bad row"), IndexError("out of range")])
def test_one_bad_request_costs_one_row(failure):
    requests = [request(40), request(41, visual=failure), request(42), request(43)]
    answers = engine(CountingModel()).generate(requests)
    assert isinstance(answers[1], GenerationError)
    assert str(failure) in str(answers[1])
    assert [answer.token_ids[0] for answer in (answers[0], answers[2], answers[3])] == [41, 43, 44]


def test_a_device_fault_loses_the_worker():
    fault = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(WorkerLostError, match="illegal memory access"):
        engine(CountingModel(fault=fault)).generate([request(40), request(41)])


def test_no_requests_give_no_answers():
    assert engine(CountingModel()).generate([]) == []


def test_a_long_thought_is_ended():
    budget = ThoughtBudget(max_tokens=3, end_id=30, forced_ids=(30, 45))
    [answer] = engine(CountingModel()).generate([request(10, thought=budget)])
    assert answer.token_ids == (11, 12, 13, 30, 45, 46, 47, 48)
    assert answer.finish_reason == "stop"


def test_a_thought_that_ends_in_time_is_left_alone():
    budget = ThoughtBudget(max_tokens=8, end_id=14, forced_ids=(14,))
    [answer] = engine(CountingModel()).generate([request(10, thought=budget)])
    assert answer.token_ids == tuple(range(11, 49))


def test_the_mean_log_probability_is_the_models():
    [answer] = engine(CountingModel()).generate([request(46)])
    expected = 3 - np.log(np.exp(3) + VOCABULARY - 1)
    assert answer.mean_logprob == pytest.approx(expected, abs=1e-5)


def test_sampling_depends_on_the_seed_and_not_on_the_batch():
    model = CountingModel()
    requests = [request(5, max_new_tokens=20, temperature=2.0, seed=seed) for seed in range(6)]
    together = engine(model).generate(requests)
    alone = [engine(model, max_rows=1).generate([one])[0] for one in requests]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert len({answer.token_ids for answer in together}) > 1


def choose(logits, history=(), draws=None, **options):
    sampling = SamplingParams(max_new_tokens=1, **options)
    draw = draws or np.random.default_rng(0)
    [(token, _)] = choose_tokens(torch.tensor([logits]), [sampling], [history], [draw])
    return token


def test_greedy_takes_the_likeliest():
    assert choose([0.0, 2.0, 1.0]) == 1


def test_top_k_and_top_p_bound_the_choice():
    draws = np.random.default_rng(0)
    logits = [5.0, 4.0, 1.0, 0.0]
    assert {choose(logits, draws=draws, temperature=1.0, top_k=1) for _ in range(50)} == {0}
    assert {choose(logits, draws=draws, temperature=1.0, top_p=0.9) for _ in range(200)} == {0, 1}
    assert {choose(logits, draws=draws, temperature=5.0) for _ in range(200)} == {0, 1, 2, 3}


def test_sampling_follows_the_distribution():
    draws = np.random.default_rng(0)
    tokens = [choose([1.0, 0.0], draws=draws, temperature=1.0) for _ in range(4000)]
    assert np.mean(tokens) == pytest.approx(1 / (1 + np.e), abs=0.02)


def test_a_penalty_makes_used_tokens_less_likely():
    assert choose([2.0, 1.9, -1.0], history=[0], repetition_penalty=1.2) == 1
    found = penalised(torch.tensor([2.0, 1.0, -1.0]), [0, 2, 2], 2.0)
    assert found.tolist() == [1.0, 1.0, -2.0]


def test_logprobs_are_of_the_unpenalised_model():
    logits = torch.tensor([[2.0, 1.9]])
    [(token, logprob)] = choose_tokens(
        logits, [SamplingParams(max_new_tokens=1, repetition_penalty=1.5)], [[0]], [np.random.default_rng(0)]
    )
    assert token == 1
    assert logprob == pytest.approx(torch.log_softmax(logits, -1)[0, 1].item(), abs=1e-6)


def test_a_completion_compares_by_content_not_by_time():
    one = Completion((1,), "stop", 0.0, 2, queue_seconds=1.0)
    assert one == Completion((1,), "stop", 0.0, 2, queue_seconds=2.0)
