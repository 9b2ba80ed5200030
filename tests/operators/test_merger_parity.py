"""Logits and greedy answers of the members with a merger against transformers' classes, on random prompts."""

import os
import zlib

import numpy as np
import pytest
import torch

from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.prompt import PromptBuilder, PromptSettings, image_tokens
from operators.minicpmv.slicing import Size, slice_image
from operators.minicpmv.tiny import write_tiny_model
from operators.minicpmv.visual import Visual
from tests.operators.random_prompts import random_prompts
from tests.operators.reference_mergers import CLASSES, Reference
from tests.operators.slot_driver import SlotDriver

PROMPTS_EACH = int(os.environ.get("PAGEREEL_PARITY_PROMPTS", "40"))
"""Random prompts for each member."""

ROWS_AT_ONCE = 8
CHUNK_TOKENS = 100
"""Prompts go in parts of no round size, so that most of them are cut inside a picture."""

MAX_NEW_TOKENS = 24
LARGEST_DIFFERENCE = 1e-4


class Pair:
    """One tiny checkpoint, loaded by us and by the reference."""

    def __init__(self, folder):
        self.model = MiniCPMV(folder, device=torch.device("cpu"), dtype=torch.float32, attention="sdpa")
        self.builder = PromptBuilder(self.model.config)
        self.reference = Reference(folder)


@pytest.fixture(scope="module", params=CLASSES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, request.param)
    return Pair(folder)


def prompts_for(family):
    return random_prompts(PROMPTS_EACH, seed=zlib.crc32(family.encode()))


def visual_of(prompt):
    """Our slices of all pictures, and the grid of each picture."""
    sliced = [slice_image(picture, prompt.slicing) for picture in prompt.pictures()]
    pieces = [piece for one in sliced for piece in one.slices]
    if not pieces:
        return None, []
    pixels = np.concatenate([piece.reshape(-1) for piece in pieces])
    return Visual(pixels, tuple(Size(*piece.shape[:2]) for piece in pieces)), [one.grid for one in sliced]


def built_ids(builder, prompt, visual, grids):
    """The prompt as our builder makes it, pictures before the text."""
    images = image_tokens(visual.shapes, grids, prompt.slicing) if visual else []
    settings = PromptSettings(
        kind="video" if prompt.clip else "image", use_image_id=prompt.use_image_id, thinking=prompt.thinking
    )
    return builder.build(prompt.content[-1][1], images, settings)


def reference_ids(reference, prompt, processed):
    """The prompt as the chat template and the processor's rules make it."""
    placeholders = {kind: reference.placeholders(output, prompt.slicing, kind) for kind, output in processed.items()}
    content = [{"type": kind} | ({"text": part} if kind == "text" else {}) for kind, part in prompt.content]
    return reference.chat_ids(content, placeholders, use_image_id=prompt.use_image_id, thinking=prompt.thinking)


def prompt_ids(pair, prompt, visual, grids, processed):
    """Ids for both sides: ours where the builder knows the form, and then those of the reference as well.

    The reference takes spelled special tokens for special tokens; we do not, so there only ours make sense.
    """
    if not prompt.is_plain:
        return reference_ids(pair.reference, prompt, processed)
    ids = built_ids(pair.builder, prompt, visual, grids)
    if not prompt.spells:
        assert ids == reference_ids(pair.reference, prompt, processed)
    return ids


def our_answers(model, prompts, visuals):
    """Generated ids of each sequence of a batch, and the logits that chose them; finished sequences leave the batch."""
    answers = [([], []) for _ in prompts]
    running = list(range(len(prompts)))
    driver = SlotDriver(model, slot_count=len(prompts) + 1, chunk_tokens=CHUNK_TOKENS, seed=len(prompts[0]))
    logits, state = driver.prefill(prompts, visuals)
    while running:
        chosen = logits.argmax(dim=-1).tolist()
        for row, token, scores in zip(running, chosen, logits, strict=True):
            answers[row][0].append(token)
            answers[row][1].append(scores)
        places = [
            place
            for place, row in enumerate(running)
            if chosen[place] not in model.stop_ids and len(answers[row][0]) < MAX_NEW_TOKENS
        ]
        if 0 < len(places) < len(running):
            driver.keep(state, places)
        running = [running[place] for place in places]
        if running:
            logits = driver.decode(state, [chosen[place] for place in places])
    return [(ids, torch.stack(scores)) for ids, scores in answers]


def largest_difference(pair, prompts):
    """Compare one batch; return the largest absolute difference of a logit, and the answers."""
    visuals, ids, wanted = [], [], []
    for prompt in prompts:
        visual, grids = visual_of(prompt)
        processed = {
            kind: pair.reference.process(pictures, prompt.slicing)
            for kind, pictures in (("image", prompt.images), ("video", prompt.clip))
            if pictures
        }
        visuals.append(visual)
        ids.append(prompt_ids(pair, prompt, visual, grids, processed))
        wanted.append(pair.reference.answer(ids[-1], processed, prompt.slicing, max_new_tokens=MAX_NEW_TOKENS))
    largest = 0.0
    for (tokens, logits), (wanted_tokens, wanted_logits) in zip(
        our_answers(pair.model, ids, visuals), wanted, strict=True
    ):
        assert tokens == wanted_tokens
        largest = max(largest, float((logits - wanted_logits).abs().max()))
    return largest, [tuple(tokens) for tokens, _ in wanted]


def test_random_prompts_have_the_logits_and_the_answers_of_the_reference(pair):
    prompts = prompts_for(pair.reference.family)
    answers = []
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        difference, found = largest_difference(pair, prompts[start : start + ROWS_AT_ONCE])
        assert difference < LARGEST_DIFFERENCE
        answers += found
    assert len(set(answers)) > PROMPTS_EACH // 2


@pytest.mark.parametrize("family", CLASSES)
def test_the_prompts_are_of_every_kind(family):
    prompts = prompts_for(family)
    kinds = {tuple(prompt.kinds) for prompt in prompts}
    assert kinds == {(), ("image",), ("video",), ("image", "video")}
    assert {prompt.slicing.downsample_mode for prompt in prompts} == {"16x", "4x"}
    assert {prompt.thinking for prompt in prompts} == {True, False}
    assert any(len(prompt.images) == 3 for prompt in prompts)
    assert any(len({picture.shape for picture in prompt.clip}) > 1 for prompt in prompts)
    assert any(prompt.spells for prompt in prompts)
    assert any("!" in prompt.content[-1][1] for prompt in prompts if prompt.is_plain)
    assert any(grid.rows for prompt in prompts for grid in visual_of(prompt)[1])
