"""Answers of tiny models, with random weights, that follow JSON schemas."""

import dataclasses
import os
import random

import pytest
import torch

from operators.engine.engine import Engine
from operators.engine.repetition import RepetitionLimits
from operators.engine.request import Request, SamplingParams, ThoughtBudget
from operators.engine.scheduler import SchedulerConfig
from operators.engine.structured import Grammars
from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.prompt import PromptBuilder, PromptSettings
from operators.minicpmv.tiny import write_tiny_model
from schemas.errors import ConfigError
from tests.operators.answer_schemas import SCHEMAS, TEXTS, assert_valid

ANSWERS_EACH = int(os.environ.get("PAGEREEL_SCHEMA_ANSWERS", "60")) // 2
"""Answers with a schema of each model."""

LOOPS = RepetitionLimits(min_tokens=16, min_repeats=4, max_period=8, check_tokens=4)
"""Short loops, so that some answers count as such."""

NAMES = tuple(SCHEMAS)


class OutOnceModel(MiniCPMV):
    """A model that is out of memory at some of its steps."""

    steps = 0
    fails_at = ()

    def append_tokens(self, *arguments):
        self.steps += 1
        if self.steps in self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().append_tokens(*arguments)


class Writer:
    """A tiny model, and what asks it."""

    def __init__(self, folder, member):
        write_tiny_model(folder, member)
        device = torch.device("cpu")
        self.model = OutOnceModel(folder, device=device, dtype=torch.float32, attention="sdpa")
        self.builder = PromptBuilder(self.model.config)
        self.grammars = Grammars((folder / "tokenizer.json").read_text(), self.model.stop_ids)

    def engine(self, slot_count=16, repetition=None):
        return Engine(self.model, SchedulerConfig(slot_count=slot_count), repetition, None, self.grammars)

    def request(self, words, thinking=False, **options):
        sampling = {key: options.pop(key) for key in [*options] if key in SamplingParams.model_fields}
        settings = PromptSettings(kind="image", use_image_id=False, thinking=thinking)
        ids = self.builder.build(words, [], settings)
        return Request(tuple(ids), SamplingParams(**{"max_new_tokens": 120} | sampling), **options)

    def requests(self, count, seed):
        """Requests with a schema, its name, and how tokens are chosen, drawn at random."""
        generator = random.Random(seed)
        for number in range(count):
            name = NAMES[number % len(NAMES)]
            temperature = generator.choice((0, 0, 0.7, 1.5))
            request = self.request(
                "".join(generator.choices("abcdefgh ", k=12)),
                max_new_tokens=generator.randint(60, 200),
                temperature=temperature,
                top_p=generator.choice((1, 0.9)),
                top_k=generator.choice((0, 40)),
                repetition_penalty=generator.choice((1, 1, 1.1)),
                seed=number,
                answer_schema=TEXTS[name],
            )
            yield name, request

    def text(self, answer):
        return self.builder.decode(answer.token_ids)


@pytest.fixture(scope="module", params=["minicpmv4_6", "minicpmv4_5"])
def writer(request, tmp_path_factory):
    return Writer(tmp_path_factory.mktemp(request.param), request.param)


def freed(request):
    return dataclasses.replace(request, answer_schema=None)


def test_every_answer_is_json_of_its_schema_and_its_neighbours_do_not_notice(writer):
    named = list(writer.requests(ANSWERS_EACH, seed=46))
    neighbours = [freed(request) for _, request in named[::3]]
    mixed = [request for _, request in named]
    for place, neighbour in enumerate(neighbours):
        mixed.insert(4 * place, neighbour)
    engine = writer.engine(repetition=LOOPS)
    answers = engine.generate(mixed)
    own = [answer for answer, request in zip(answers, mixed, strict=True) if request.answer_schema is not None]
    reasons = set()
    for (name, request), answer in zip(named, own, strict=True):
        assert_valid(name, writer.text(answer))
        assert len(answer.token_ids) <= request.sampling.max_new_tokens
        assert (answer.finish_reason == "stop") <= (answer.closed_tokens == 0)
        reasons.add(answer.finish_reason)
    assert {"stop", "length"} <= reasons
    beside = [answer for answer, request in zip(answers, mixed, strict=True) if request.answer_schema is None]
    alone = writer.engine(repetition=LOOPS).generate(neighbours)
    assert [(answer.token_ids, answer.finish_reason) for answer in beside] == [
        (answer.token_ids, answer.finish_reason) for answer in alone
    ]
    written = sum(len(answer.token_ids) - answer.closed_tokens for answer in own)
    assert engine.stats.constrained_tokens >= written
    assert engine.stats.constrain_seconds > 0


def test_an_answer_does_not_depend_on_what_runs_beside_it(writer):
    requests = [request for _, request in writer.requests(14, seed=1)]
    together = writer.engine().generate(requests)
    alone = [writer.engine(slot_count=1).generate([request])[0] for request in requests]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def test_what_starts_again_for_lack_of_memory_writes_the_same(writer):
    requests = [request for _, request in writer.requests(12, seed=2)]
    wanted = [answer.token_ids for answer in writer.engine(slot_count=6).generate(requests)]
    writer.model.steps, writer.model.fails_at = 0, (7, 30)
    found = [answer.token_ids for answer in writer.engine(slot_count=6).generate(requests)]
    writer.model.fails_at = ()
    assert writer.model.steps > 30
    assert found == wanted


def test_a_loop_is_tried_again_from_the_start_and_closed_when_it_comes_back(writer):
    limits = RepetitionLimits(min_tokens=4, min_repeats=3, max_period=4, check_tokens=2)
    rung = SamplingParams(max_new_tokens=400, repetition_penalty=1.0)
    requests = [
        writer.request(words, max_new_tokens=400, rungs=(rung,), answer_schema=TEXTS["text"]) for words in "abcdefgh"
    ]
    answers = writer.engine(repetition=limits).generate(requests)
    looped = [answer for answer in answers if answer.finish_reason == "repetition"]
    assert looped
    for answer in looped:
        assert answer.attempt == 2
        assert answer.closed_tokens
        # Both attempts are greedy: the second repeats the first, which was not closed.
        assert answer.wasted_tokens == len(answer.token_ids) - answer.closed_tokens
        assert answer.tokens_saved
    for answer in answers:
        assert_valid("text", writer.text(answer))


def test_an_answer_that_cannot_be_closed_in_its_room_ends_at_it(writer):
    request = writer.request("a", max_new_tokens=9, answer_schema=TEXTS["nested"])
    [answer] = writer.engine().generate([request])
    assert (answer.finish_reason, len(answer.token_ids), answer.closed_tokens) == ("length", 9, 0)


@pytest.mark.parametrize("temperature", [0, 1])
def test_log_probabilities_are_those_of_the_free_model(writer, temperature):
    schema = TEXTS["enums"]
    [answer] = writer.engine().generate([writer.request("a", temperature=temperature, answer_schema=schema)])
    assert answer.finish_reason == "stop"
    model = writer.model
    ids = [*writer.request("a").prompt_ids, *answer.token_ids]
    model.open_slots(1, len(ids) + 1)
    scores = []
    for count in range(len(answer.token_ids) + 1):
        prompt = ids[: len(ids) - len(answer.token_ids) + count]
        [prepared] = model.encode([prompt], [None])
        scores.append(model.append_prompt([prepared], [0], 0, len(prompt))[0].log_softmax(-1))
    chosen = [scores[place][token] for place, token in enumerate(answer.token_ids)]
    # Which of the tokens that end an answer was chosen is not told.
    means = [float(sum(chosen) + scores[-1][stop]) / len(scores) for stop in model.stop_ids]
    assert min(abs(answer.mean_logprob - mean) for mean in means) < 1e-4


def thinking(writer, most_thought, **options):
    end = writer.model.config.tokens.think_end
    forced = (end, *writer.builder.encode("\n\n"))
    budget = ThoughtBudget(most_thought, end, forced)
    request = writer.request("think", thinking=True, thought=budget, answer_schema=TEXTS["optional"], **options)
    [answer] = writer.engine().generate([request])
    place = answer.token_ids.index(end)
    assert answer.token_ids[place : place + len(forced)] == forced
    return place, writer.builder.decode(answer.token_ids[place + len(forced) :]), answer


def test_a_schema_counts_from_the_end_of_the_thought(writer):
    place, text, _ = thinking(writer, 7)
    assert place == 7
    assert_valid("optional", text)


def test_a_thought_leaves_room_for_a_short_answer(writer):
    place, text, answer = thinking(writer, 1000, max_new_tokens=40)
    assert place <= 40
    assert len(answer.token_ids) <= 40
    assert_valid("optional", text)


def test_a_thought_that_ends_by_itself_is_followed_by_the_answer(writer):
    # Sampled thoughts are short now and then.
    for seed in range(60):
        place, text, _ = thinking(writer, 150, max_new_tokens=300, temperature=1.5, seed=seed)
        assert_valid("optional", text)
        if place < 150:
            return
    pytest.fail("no thought ended by itself")


def test_a_schema_that_cannot_be_used_stops_all_before_anything_runs(writer):
    engine = writer.engine()
    requests = [writer.request("a"), writer.request("b", answer_schema='{"type": "strin"}')]
    with pytest.raises(ConfigError, match="strin"):
        engine.generate(requests)
    assert engine.stats.encoded_requests == 0
    assert engine.generate([requests[0]])


def test_an_engine_without_grammars_says_so(writer):
    engine = Engine(writer.model, SchedulerConfig(slot_count=1))
    with pytest.raises(ConfigError, match="no grammars"):
        engine.generate([writer.request("a", answer_schema=TEXTS["text"])])
