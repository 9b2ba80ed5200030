import numpy as np
import pytest
import torch

from operators.engine import sampler
from operators.engine.request import SamplingParams
from operators.engine.sampler import choose_tokens, forbid, penalise
from operators.engine.structured import AllowedTokens

VOCABULARY = 5000


def choose(logits, history=(), draws=None, **options):
    sampling = SamplingParams(max_new_tokens=1, **options)
    [(token, _)] = choose_tokens(torch.tensor([logits]), [sampling], [history], [draws or np.random.default_rng(0)])
    return token


def one_row(logits, params, history, place):
    """The token of one sequence by the words of the definition; `place` is its random number."""
    scores = logits.float().clone()
    if params.repetition_penalty != 1:
        for token in set(history):
            scores[token] = (
                scores[token] / params.repetition_penalty
                if scores[token] > 0
                else scores[token] * params.repetition_penalty
            )
    if params.temperature == 0:
        return int(scores.argmax())
    weights = ((scores - scores.max()) / params.temperature).exp()
    ordered = weights.sort(descending=True).values
    ordered = ordered[: params.top_k or len(ordered)].double()
    sums = ordered.cumsum(0)
    smallest = float(ordered[-1])
    if params.top_p < 1:
        smallest = float(ordered[int((sums < params.top_p * sums[-1]).sum())])
    kept = torch.where(weights >= smallest, weights, 0).double().cumsum(0)
    return int((kept <= place * kept[-1]).sum())


def random_params(generator):
    return SamplingParams(
        max_new_tokens=1,
        temperature=float(generator.choice([0, 0.3, 0.7, 1, 3])),
        top_k=int(generator.choice([0, 0, 1, 20, 300, VOCABULARY, 9 * VOCABULARY])),
        top_p=float(generator.choice([1, 1, 0.1, 0.8, 0.95, 0.999])),
        repetition_penalty=float(generator.choice([1, 1, 1.05, 1.5])),
    )


def random_batch(seed, rows, dtype):
    """Logits from flat to peaked, options, histories and seeds of a batch."""
    generator = np.random.default_rng(seed)
    spreads = generator.choice([0.2, 2, 8], (rows, 1))
    logits = torch.from_numpy(generator.standard_normal((rows, VOCABULARY)) * spreads).to(dtype)
    histories = [generator.integers(0, VOCABULARY, generator.integers(0, 900)).tolist() for _ in range(rows)]
    return logits, [random_params(generator) for _ in range(rows)], histories


def draws_for(rows):
    return [np.random.default_rng(row) for row in range(rows)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_each_row_of_a_batch_is_chosen_by_the_definition(seed, dtype):
    logits, params, histories = random_batch(seed, 64, dtype)
    found = [token for token, _ in choose_tokens(logits, params, histories, draws_for(64))]
    places = [draw.random() for draw in draws_for(64)]
    wanted = [one_row(*row) for row in zip(logits, params, histories, places, strict=True)]
    assert found == wanted
    assert sum(token != int(row.argmax()) for token, row in zip(found, logits, strict=True)) > 20


@pytest.mark.parametrize("elements", [1, 3 * VOCABULARY, 10**9])
def test_a_token_does_not_depend_on_the_batch(monkeypatch, elements):
    logits, params, histories = random_batch(20, 40, torch.float32)
    alone = [
        choose_tokens(logits[row : row + 1], [params[row]], [histories[row]], [draws_for(40)[row]])[0]
        for row in range(40)
    ]
    monkeypatch.setitem(sampler.ELEMENTS_AT_ONCE, "cpu", elements)
    together = choose_tokens(logits, params, histories, draws_for(40))
    assert [token for token, _ in together] == [token for token, _ in alone]
    np.testing.assert_allclose([score for _, score in together], [score for _, score in alone], atol=1e-5)


def test_a_sampled_token_draws_one_number_and_a_greedy_one_none():
    logits = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    draws = draws_for(2)
    for _ in range(3):
        params = [SamplingParams(max_new_tokens=1, temperature=0.7, top_p=0.9), SamplingParams(max_new_tokens=1)]
        choose_tokens(logits, params, [[], []], draws)
    fresh = draws_for(2)
    fresh[0].random(3)
    assert [draw.random() for draw in draws] == [draw.random() for draw in fresh]


def test_greedy_takes_the_likeliest():
    assert choose([0.0, 2.0, 1.0]) == 1


def test_nobody_chooses_nothing():
    assert choose_tokens(torch.zeros(0, 10), [], [], []) == []


def test_top_k_and_top_p_bound_the_choice():
    draws = np.random.default_rng(0)
    logits = [5.0, 4.0, 1.0, 0.0]
    assert {choose(logits, draws=draws, temperature=1.0, top_k=1) for _ in range(50)} == {0}
    assert {choose(logits, draws=draws, temperature=1.0, top_p=0.9) for _ in range(200)} == {0, 1}
    assert {choose(logits, draws=draws, temperature=5.0) for _ in range(200)} == {0, 1, 2, 3}


def test_top_p_looks_at_what_top_k_leaves():
    draws = np.random.default_rng(0)
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    # Of the first three 0.78 are left behind two: without the cut to three, two would hold 0.7.
    assert {choose(logits, draws=draws, temperature=1.0, top_p=0.75) for _ in range(200)} == {0, 1, 2}
    assert {choose(logits, draws=draws, temperature=1.0, top_k=3, top_p=0.75) for _ in range(200)} == {0, 1}


def test_equal_scores_are_kept_together():
    draws = np.random.default_rng(0)
    assert {choose([1.0, 1.0, 1.0, -9.0], draws=draws, temperature=1.0, top_k=1) for _ in range(200)} == {0, 1, 2}
    assert {choose([1.0, 1.0, 1.0, -9.0], draws=draws, temperature=1.0, top_p=0.1) for _ in range(200)} == {0, 1, 2}


@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
def test_a_flat_distribution_of_many_tokens_is_cut_where_it_should(top_p):
    generator = np.random.default_rng(3)
    logits = torch.from_numpy(generator.standard_normal((1, VOCABULARY)) * 0.01).float()
    params = [SamplingParams(max_new_tokens=1, temperature=1.0, top_p=top_p)]
    tokens = {choose_tokens(logits, params, [[]], [generator])[0][0] for _ in range(2000)}
    kept = set(logits[0].argsort(descending=True)[: int(top_p * VOCABULARY) + 25].tolist())
    assert tokens <= kept
    assert len(tokens) > 0.3 * len(kept)


def test_sampling_follows_the_distribution():
    draws = np.random.default_rng(0)
    tokens = [choose([1.0, 0.0], draws=draws, temperature=1.0) for _ in range(4000)]
    assert np.mean(tokens) == pytest.approx(1 / (1 + np.e), abs=0.02)


def test_sampling_follows_the_distribution_over_a_large_vocabulary():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3000, generator=generator) * 2
    draws = [np.random.default_rng(row) for row in range(40_000)]
    params = [SamplingParams(max_new_tokens=1, temperature=1.5)] * len(draws)
    found = [token for token, _ in choose_tokens(logits.expand(len(draws), -1), params, [[]] * len(draws), draws)]
    # Ten groups of neighbouring tokens, across the blocks in which they are summed.
    counts = np.histogram(found, bins=10, range=(0, 3000))[0] / len(found)
    wanted = torch.softmax(logits[0].double() / 1.5, 0).reshape(10, 300).sum(1)
    np.testing.assert_allclose(counts, wanted, atol=0.01)


@pytest.mark.parametrize("width", [1, 2, 1023, 1024, 1025, 2048, 2500])
def test_the_first_and_the_last_token_can_be_drawn(width):
    class Fixed:
        def __init__(self, place):
            self.place = place

        def random(self):
            return self.place

    params = [SamplingParams(max_new_tokens=1, temperature=1.0)]
    for place, wanted in ((0.0, 0), (1 - 2**-53, width - 1)):
        assert choose_tokens(torch.zeros(1, width), params, [[]], [Fixed(place)])[0][0] == wanted
    # Tokens that cannot be drawn are not drawn at either end.
    logits = torch.full((1, width + 2), -torch.inf)
    logits[0, width // 2] = 0.0
    for place in (0.0, 1 - 2**-53):
        assert choose_tokens(logits, params, [[]], [Fixed(place)])[0][0] == width // 2


def test_a_penalty_makes_used_tokens_less_likely():
    assert choose([2.0, 1.9, -1.0], history=[0], repetition_penalty=1.2) == 1
    assert choose([2.0, 1.9, -1.0], history=[], repetition_penalty=1.2) == 0
    scores = torch.tensor([[2.0, 1.0, -1.0], [2.0, 1.0, -1.0], [2.0, 1.0, -1.0]])
    penalise(scores, [2.0, 1.0, 4.0], [[0, 2, 2], [0, 1, 2], [1]])
    assert scores.tolist() == [[1.0, 1.0, -2.0], [2.0, 1.0, -1.0], [2.0, 0.25, -1.0]]


def test_logits_stay_as_they_are():
    logits, params, histories = random_batch(4, 20, torch.float32)
    before = logits.clone()
    choose_tokens(logits, params, histories, draws_for(20))
    assert torch.equal(logits, before)


def test_logprobs_are_of_the_unpenalised_model():
    logits = torch.tensor([[2.0, 1.9]])
    params = [SamplingParams(max_new_tokens=1, repetition_penalty=1.5)]
    [(token, logprob)] = choose_tokens(logits, params, [[0]], draws_for(1))
    assert token == 1
    assert logprob == pytest.approx(torch.log_softmax(logits, -1)[0, 1].item(), abs=1e-6)


def some_allowed(rows, count, seed=0):
    """What some rows may choose, as bits and as sets."""
    generator = np.random.default_rng(seed)
    flags = generator.random((len(rows), VOCABULARY)) < count / VOCABULARY
    flags[:, 7] = True
    bits = np.packbits(flags, axis=1, bitorder="little")
    return AllowedTokens(rows, bits), {row: set(np.flatnonzero(own)) for row, own in zip(rows, flags, strict=True)}


@pytest.mark.parametrize("elements", [VOCABULARY, 5 * VOCABULARY, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_a_grammar_choose_what_it_allows_and_others_as_ever(monkeypatch, elements, dtype):
    monkeypatch.setitem(sampler.ELEMENTS_AT_ONCE, "cpu", elements)
    logits, params, histories = random_batch(5, 40, dtype)
    rows = [0, 3, 4, 11, 25, 26, 39]
    allowed, sets = some_allowed(rows, 30)
    free = choose_tokens(logits, params, histories, draws_for(40))
    bound = choose_tokens(logits, params, histories, draws_for(40), allowed)
    exact = torch.log_softmax(logits.float(), -1)
    for row in range(40):
        if row not in sets:
            assert bound[row] == free[row]
            continue
        token, logprob = bound[row]
        assert token in sets[row]
        masked = torch.full((VOCABULARY,), -torch.inf)
        own = sorted(sets[row])
        masked[own] = logits[row, own].float()
        assert token == one_row(masked, params[row], histories[row], draws_for(40)[row].random())
        # Under the model as it is, not among what is allowed.
        assert logprob == pytest.approx(exact[row, token].item(), abs=1e-5)
    assert sum(bound[row][0] != free[row][0] for row in rows) > 3


def test_tokens_that_no_tokenizer_gives_out_are_forbidden():
    scores = torch.zeros(3, 21)
    forbid(scores, [torch.tensor([255, 255], dtype=torch.uint8), None, torch.tensor([4, 0], dtype=torch.uint8)])
    assert torch.isinf(scores).nonzero().tolist() == [
        *([0, token] for token in range(16, 21)),
        *([2, token] for token in range(21) if token != 2),
    ]
    narrow = torch.zeros(1, 5)
    forbid(narrow, [torch.tensor([2, 255], dtype=torch.uint8)])
    assert torch.isinf(narrow)[0].tolist() == [True, False, True, True, True]
