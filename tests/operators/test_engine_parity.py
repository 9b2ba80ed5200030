"""Greedy answers of the engine against transformers' `generate`, request by request: whatever runs beside them."""

import os
import random
import zlib

import pytest
import torch

from operators.engine.engine import Engine
from operators.engine.repetition import RepetitionLimits
from operators.engine.request import Request, SamplingParams
from operators.engine.scheduler import SchedulerConfig
from operators.minicpmv.tiny import write_tiny_model
from tests.operators import resampler_pair as resamplers
from tests.operators import test_merger_parity as mergers
from tests.operators.random_packed_prompts import packed_prompts
from tests.operators.random_prompts import random_prompts
from tests.operators.test_repetition import loops

REQUESTS_EACH = int(os.environ.get("PAGEREEL_ENGINE_REQUESTS", "20"))
"""Random requests for each member."""

LONGEST_ANSWER = 48
LIMITS = RepetitionLimits(min_tokens=8, min_repeats=3, max_period=12, check_tokens=2)
"""Short loops, so that many of the answers count as such."""


class Merger46:
    """Requests to MiniCPM-V 4.6, and what transformers' own class answers."""

    def __init__(self, folder):
        self.pair = mergers.Pair(folder)
        self.prompts = random_prompts(REQUESTS_EACH, seed=zlib.crc32(b"engine 4.6"))

    def request(self, prompt):
        visual, grids = mergers.visual_of(prompt)
        self.processed = {
            kind: self.pair.reference.process(pictures, prompt.slicing)
            for kind, pictures in (("image", prompt.images), ("video", prompt.clip))
            if pictures
        }
        return mergers.prompt_ids(self.pair, prompt, visual, grids, self.processed), visual

    def answer(self, prompt, ids):
        return self.pair.reference.answer(ids, self.processed, prompt.slicing, max_new_tokens=LONGEST_ANSWER)[0]


def repeat_more(tensors):
    """Make the token that was read last a little likelier."""
    if "llm.lm_head.weight" in tensors:
        head, embeddings = tensors["llm.lm_head.weight"], tensors["llm.model.embed_tokens.weight"]
        tensors["llm.lm_head.weight"] = head + 0.4 * embeddings * head.norm() / embeddings.norm()


class Resampler45:
    """Requests to MiniCPM-V 4.5, and what an independent tower and resampler and transformers' Qwen3 answer."""

    def __init__(self, folder):
        # As it is, it hardly ever loops.
        self.pair = resamplers.Pair(
            resamplers.changed_copy(folder, folder / "looping", change_tensors=repeat_more), "minicpmv4_5"
        )
        self.prompts = packed_prompts("minicpmv4_5", REQUESTS_EACH, seed=zlib.crc32(b"engine 4.5"))

    def request(self, prompt):
        parts = resamplers.our_parts(self.pair, prompt)
        if prompt.is_plain:
            ids = resamplers.built_ids(self.pair, prompt, parts)
        else:
            ids = resamplers.reference_ids(self.pair, prompt, parts)
        return ids, resamplers.visual_of(self.pair, prompt, parts)

    def answer(self, prompt, ids):
        reference = self.pair.reference
        parts = resamplers.sliced_parts(
            prompt,
            lambda picture: reference.crops(picture, prompt.slicing.max_slices, prompt.slicing.slice_side_px),
            packs=True,
        )
        groups = [group for *_, own in parts for group in own]
        with torch.inference_mode():
            features = reference.features(groups) if groups else torch.zeros(0, 1, 1)
            embeddings = reference.embeddings(ids, features, self.pair.model.config.tokens.image_pad)
            return reference.answer(embeddings, self.pair.model.stop_ids, max_new_tokens=LONGEST_ANSWER)[0]


MEMBERS = {"minicpmv4_6": Merger46, "minicpmv4_5": Resampler45}


class Workload:
    """Requests of one member, and the tokens that `generate` gives to each alone, the ending one included."""

    def __init__(self, folder, member):
        write_tiny_model(folder, member)
        made = MEMBERS[member](folder)
        self.model = made.pair.model
        self.requests, self.wanted = [], []
        generator = random.Random(member)
        for prompt in made.prompts:
            ids, visual = made.request(prompt)
            sampling = SamplingParams(max_new_tokens=generator.choice((1, 7, 20, LONGEST_ANSWER, LONGEST_ANSWER)))
            self.requests.append(Request(tuple(ids), sampling, visual, expected_tokens=generator.choice((0, 9, 40))))
            self.wanted.append(made.answer(prompt, ids))

    def outcome(self, number, limits):
        """Tokens and the reason to end, by what `generate` wrote; loops by the words of their definition."""
        wanted, bound = self.wanted[number], self.requests[number].sampling.max_new_tokens
        stops = wanted[-1] in self.model.stop_ids
        text = (wanted[:-1] if stops else wanted)[:bound]
        for count in range(limits.check_tokens, len(text) + 1, limits.check_tokens) if limits else ():
            if loops(text[:count], limits):
                return tuple(text[:count]), "repetition"
        return tuple(text), "stop" if stops and len(wanted) <= bound else "length"


@pytest.fixture(scope="module", params=MEMBERS)
def workload(request, tmp_path_factory):
    return Workload(tmp_path_factory.mktemp(request.param), request.param)


def run_staggered(engine, requests, generator):
    """What became of requests that come in random order, some at a time, while others run."""
    order = generator.sample(range(len(requests)), len(requests))
    outcomes, numbers = {}, {}
    while len(outcomes) < len(requests):
        coming = order[: generator.randint(0, 12)]
        order = order[len(coming) :]
        numbers |= dict(zip(engine.submit([requests[number] for number in coming]), coming, strict=True))
        for _ in range(generator.randint(1, 20)):
            engine.step()
        outcomes |= {numbers[ticket]: outcome for ticket, outcome in engine.collect().items()}
    return [outcomes[number] for number in range(len(requests))]


@pytest.mark.parametrize(
    ("slot_count", "chunk_tokens", "limits"),
    [(1, 2048, None), (2, 50, LIMITS), (5, 333, LIMITS), (16, 64, None), (33, 2048, LIMITS)],
)
def test_every_request_is_answered_as_if_it_were_alone(workload, slot_count, chunk_tokens, limits):
    config = SchedulerConfig(slot_count=slot_count, chunk_tokens=chunk_tokens, encode_ahead=3)
    engine = Engine(workload.model, config, limits)
    answers = run_staggered(engine, workload.requests, random.Random(slot_count))
    for number, answer in enumerate(answers):
        assert (answer.token_ids, answer.finish_reason) == workload.outcome(number, limits), number
    assert engine.stats.most_running >= min(slot_count, 6)


def test_answers_are_of_every_kind(workload):
    outcomes = [workload.outcome(number, LIMITS) for number in range(REQUESTS_EACH)]
    reasons = [reason for _, reason in outcomes]
    assert min(reasons.count(reason) for reason in ("stop", "length", "repetition")) >= max(1, REQUESTS_EACH // 30)
    assert len({tokens for tokens, _ in outcomes}) > REQUESTS_EACH // 2
    assert len({len(one.prompt_ids) for one in workload.requests}) > REQUESTS_EACH // 2
