"""Answers that go round in circles are tried again: what it costs, what is kept of it, and that nobody else notices."""

import shutil

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from operators.attempts import FURTHER_ATTEMPTS, MOST_ATTEMPTS, attempts_before, lost_attempts
from operators.engine.engine import Engine
from operators.engine.repetition import RepetitionLimits
from operators.engine.request import Request, SamplingParams
from operators.engine.scheduler import SchedulerConfig
from operators.generate import Generate, GenerateConfig, freer
from operators.minicpmv.demo import write_demo_model
from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.visual import Visual
from operators.parse.completions import ParseCompletions, ParseCompletionsConfig
from operators.prepare import PrepareConfig, PrepareImages, read_pictures
from schemas.errors import GenerationError, error_struct
from schemas.generation import RECORD
from tests.operators.counting_model import FIRST, LOOP, CountingModel
from tests.operators.rows46 import page_pictures, page_row, table_of

LIMITS = RepetitionLimits(min_tokens=24, min_repeats=4, max_period=12, check_tokens=4)
"""Short loops, so that some answers of random weights count as such."""

BOUND = 100
LETTERS = 256
"""Tokens of the tiny model that stand for bytes; they come first."""

UNLIKE = ("answered_by", "queue_ms", "generate_ms", "decode_params", "mean_logprob")
"""Times, settings, and sums whose last digits move with the batch."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_demo_model(path)
    return path


@pytest.fixture(scope="module")
def records(folder):
    rows = [page_row(picture, record_key=str(number)) for number, picture in enumerate(page_pictures(10))]
    return PrepareImages(PrepareConfig(model_folder=str(folder)))(table_of(*rows))


def answered(folder, records, attempts, **options):
    config = GenerateConfig(
        model_folder=str(folder), device="cpu", max_new_tokens=BOUND, repetition=LIMITS,
        further_attempts=FURTHER_ATTEMPTS[: attempts - 1], **options,
    )  # fmt: skip
    generate = Generate(config)
    found = generate(records)
    generate.close()
    return found


@pytest.fixture(scope="module")
def once(folder, records):
    return answered(folder, records, 1).to_pylist()


@pytest.fixture(scope="module")
def twice(folder, records):
    return answered(folder, records, 2)


@pytest.fixture(scope="module")
def looping(once):
    """Places of the rows whose first attempt goes round in circles."""
    found = [place for place, row in enumerate(once) if row["finish_reason"] == "repetition"]
    assert 0 < len(found) < len(once)
    return found


def test_a_loop_is_tried_again_with_freer_sampling_and_says_so(once, twice, looping):
    for place in looping:
        first, row = once[place], twice.to_pylist()[place]
        assert (first["attempt"], first["temperature"], first["tokens_wasted"]) == (1, 0.0, 0)
        assert (row["attempt"], row["tokens_wasted"]) == (2, first["output_tokens"])
        assert row["temperature"] == pytest.approx(FURTHER_ATTEMPTS[0].temperature)
        assert row["tokens_saved"] >= BOUND - first["output_tokens"] == first["tokens_saved"]
        assert row["completion"] != first["completion"]
        [failure] = row["recovered"]
        assert (failure["error_code"], failure["component"], failure["attempt"]) == ("repetition", "Generate", 1)
        assert (first["recovered"], row["error"]) == (None, None)


def test_rows_beside_a_loop_are_what_they_are_without_further_attempts(once, twice, looping):
    for place, (first, row) in enumerate(zip(once, twice.to_pylist(), strict=True)):
        if place not in looping:
            assert {name: row[name] for name in row if name not in UNLIKE} == {
                name: first[name] for name in first if name not in UNLIKE
            }


def test_an_attempt_that_ends_well_is_a_success_on_the_rung_of_the_same_pixels(twice, looping):
    rows = ParseCompletions(ParseCompletionsConfig())(twice).to_pylist()
    ended = [row for row in rows if row["attempt"] == 2 and row["finish_reason"] == "stop"]
    assert ended
    for row in ended:
        assert (row["status"], row["rung"], row["route"]) == ("success", "same_pixels", "model")
        assert [failure["error_code"] for failure in row["recovered"]] == ["repetition"]
    others = [row for place, row in enumerate(rows) if place not in looping and row["status"] == "success"]
    assert {row["rung"] for row in others} == {"first"}


def test_attempts_after_earlier_pixels_count_on(folder, records, looping):
    earlier = error_struct(GenerationError("no", code="length"), "ParseCompletions", attempt=2)
    rows = records.slice(looping[0], 1).to_pylist()
    rows[0]["recovered"] = [earlier]
    [row] = answered(folder, pa.Table.from_pylist(rows, schema=RECORD), 2).to_pylist()
    assert row["attempt"] == 4
    assert row["recovered"][0] == earlier
    assert [failure["attempt"] for failure in row["recovered"]] == [2, 3]
    assert row["temperature"] == pytest.approx(FURTHER_ATTEMPTS[0].temperature)


def test_what_fails_in_the_model_carries_its_attempt(folder, records):
    rows = records.slice(0, 1).to_pylist()
    rows[0]["pixels"] = b"\x00" * 10
    [row] = answered(folder, pa.Table.from_pylist(rows, schema=RECORD), 2).to_pylist()
    assert (row["error"]["attempt"], row["recovered"]) == (1, None)


def test_each_further_attempt_is_freer_and_none_goes_back_behind_the_first():
    temperatures = [attempt.temperature for attempt in FURTHER_ATTEMPTS]
    assert temperatures == sorted(set(temperatures))
    assert MOST_ATTEMPTS == 5
    wild = SamplingParams(max_new_tokens=9, temperature=1.5, repetition_penalty=1.1, top_k=7)
    for attempt in FURTHER_ATTEMPTS:
        sampling = freer(wild, attempt)
        assert (sampling.temperature, sampling.repetition_penalty, sampling.top_k) == (1.5, 1.1, 7)
        assert sampling.top_p == attempt.top_p


def test_numbers_of_attempts_are_read_back_from_their_failures():
    lost = lost_attempts(2, 3, "Generate")
    assert [failure["attempt"] for failure in lost] == [3, 4, 5]
    assert attempts_before(lost) == 5
    assert attempts_before([error_struct(GenerationError("no"), "Generate")]) == 0
    assert attempts_before(None) == 0


def request_of(records, place, rung_count=0):
    pictures = read_pictures(records, place)
    sampling = SamplingParams(max_new_tokens=BOUND)
    return Request(
        tuple(records["prompt_ids"][place].as_py()),
        sampling,
        Visual(pictures.pixels, pictures.shapes, pictures.slice_packs()),
        seed=place,
        rungs=tuple(freer(sampling, attempt) for attempt in FURTHER_ATTEMPTS[:rung_count]),
    )


def model_work(engine):
    """Tokens that went through the model: those of prompts, and those that were written and read again."""
    return engine.stats.prefill_tokens + engine.stats.decoded_tokens


@pytest.fixture(scope="module", params=[1.0, 1.5, 3.0])
def model(request, folder, tmp_path_factory):
    """A tiny model; the larger its letters are embedded, the more it repeats them."""
    path = tmp_path_factory.mktemp("repeating") / "model"
    shutil.copytree(folder, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.language_model.embed_tokens.weight"][:LETTERS] *= request.param
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return MiniCPMV(path, device=torch.device("cpu"), dtype=torch.float32, attention="sdpa")


def answers_of(model, requests, limits=LIMITS):
    return Engine(model, SchedulerConfig(slot_count=4), limits).generate(requests)


@pytest.mark.parametrize("rung_count", [1, MOST_ATTEMPTS - 1])
def test_a_looping_request_costs_less_than_two_that_run_to_the_bound(model, records, rung_count):
    places = range(records.num_rows)
    first = answers_of(model, [request_of(records, place) for place in places])
    reasons = [answer.finish_reason for answer in first]
    assert {"length", "repetition"} <= set(reasons)
    bounded = reasons.index("length")
    for place in (bounded, *(place for place in places if reasons[place] == "repetition")):
        engine = Engine(model, SchedulerConfig(slot_count=1), LIMITS)
        [answer] = engine.generate([request_of(records, place, rung_count)])
        prompt_tokens = len(records["prompt_ids"][place].as_py())
        # The first token of an attempt comes with its prompt.
        bound_work = prompt_tokens + BOUND - 1
        if place == bounded:
            assert (answer.attempt, model_work(engine)) == (1, bound_work)
            continue
        assert answer.attempt > 1
        written = answer.output_tokens + answer.wasted_tokens
        assert model_work(engine) == answer.attempt * (prompt_tokens - 1) + written
        assert model_work(engine) < 2 * bound_work


def test_tokens_of_the_neighbours_of_a_loop_are_those_they_have_without_it(model, records):
    requests = [request_of(records, place, rung_count=1) for place in range(records.num_rows)]
    mixed = answers_of(model, requests)
    others = [place for place, answer in enumerate(mixed) if answer.attempt == 1]
    assert 0 < len(others) < len(requests)
    alone = answers_of(model, [requests[place] for place in others])
    assert [answer.token_ids for answer in alone] == [mixed[place].token_ids for place in others]
    assert [answer.finish_reason for answer in alone] == [mixed[place].finish_reason for place in others]


def test_no_attempt_is_made_once_loops_have_cost_a_whole_answer():
    limits = RepetitionLimits(min_tokens=24, min_repeats=4, max_period=10, check_tokens=4)
    rungs = (SamplingParams(max_new_tokens=60),) * 4
    model = CountingModel()
    engine = Engine(model, SchedulerConfig(slot_count=1), limits)
    [answer] = engine.generate([Request((LOOP, 3, FIRST), SamplingParams(max_new_tokens=60), rungs=rungs)])
    # Three loops of 24 tokens, and a prompt of 3 read twice more: 78 of 60.
    assert (answer.finish_reason, answer.attempt, answer.wasted_tokens) == ("repetition", 3, 48)
    assert engine.stats.prefill_tokens + engine.stats.decoded_tokens < 2 * (3 + 60)
