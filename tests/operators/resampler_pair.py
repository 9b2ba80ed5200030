"""One tiny checkpoint of a member with a resampler, loaded by us and by the reference, and their differences."""

import json
import shutil
from itertools import accumulate

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.prompt import PromptBuilder, PromptSettings, image_tokens
from operators.minicpmv.slicing import Size, slice_image
from operators.minicpmv.visual import Visual
from schemas.image import Grid
from tests.operators.reference_resamplers import Reference
from tests.operators.test_merger_parity import MAX_NEW_TOKENS, our_answers

ROWS_AT_ONCE = 8
CPU = torch.device("cpu")


class Pair:
    """One tiny checkpoint, loaded by us and by the reference."""

    def __init__(self, folder, family):
        self.folder = folder
        self.family = family
        self.model = MiniCPMV(folder, device=CPU, dtype=torch.float32, attention="sdpa")
        self.builder = PromptBuilder(self.model.config)
        self.reference = Reference(folder, family)

    @property
    def packs(self):
        """Whether frames of a clip are resampled together."""
        return self.model.config.family.clip_rule == "packed"


def difference(found, wanted):
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max())


def sliced_parts(prompt, cut, packs):
    """Parts of a prompt in order, `(kind, grid, frames, groups)` for each image, frame or pack; a group is the slices
    that are resampled together, and their temporal ids.

    Args:
        prompt: the prompt.
        cut: a picture to its slices and its grid.
        packs: whether frames are resampled together.
    """
    parts = []
    for kind, index in prompt.content:
        if kind == "image":
            slices, grid = cut(prompt.images[index])
            parts.append(("image", grid, 1, [([part], (-1,)) for part in slices]))
        elif kind == "video":
            frames = iter(prompt.frames)
            for times in prompt.packs:
                made = [cut(next(frames)) for _ in times]
                cells = zip(*(slices for slices, _ in made), strict=True)
                groups = [(list(cell), times if packs else (-1,)) for cell in cells]
                parts.append(("video", made[0][1], len(times), groups))
        else:
            parts.append(("text", index, 0, []))
    return parts


def our_parts(pair, prompt):
    def cut(picture):
        sliced = slice_image(picture, prompt.slicing)
        return sliced.slices, sliced.grid

    return sliced_parts(prompt, cut, pair.packs)


def visual_of(pair, prompt, parts):
    groups = [group for *_, own in parts for group in own]
    if not groups:
        return None
    pieces = [piece for slices, _ in groups for piece in slices]
    packs = tuple(tuple(times) for _, times in groups) if pair.packs and prompt.frames else None
    pixels = np.concatenate([piece.reshape(-1) for piece in pieces])
    return Visual(pixels, tuple(Size(*piece.shape[:2]) for piece in pieces), packs)


def built_ids(pair, prompt, parts):
    """The prompt as our builder makes it, pictures before the text."""
    pictures = [(grid, frames, groups) for kind, grid, frames, groups in parts if kind != "text"]
    shapes = [Size(*piece.shape[:2]) for *_, groups in pictures for slices, _ in groups for piece in slices]
    images = image_tokens(
        shapes, [Grid(*grid) for grid, *_ in pictures], prompt.slicing, [frames for _, frames, _ in pictures]
    )
    kind = "video" if prompt.frames else "image"
    settings = PromptSettings(kind=kind, use_image_id=prompt.use_image_id, thinking=prompt.thinking)
    return pair.builder.build(prompt.content[-1][1], images, settings)


def reference_ids(pair, prompt, parts):
    """The prompt as chat template and tokenizer make it of a text with placeholders."""
    numbers = accumulate((frames for _, _, frames, _ in parts), initial=0)
    texts = [
        what if kind == "text" else pair.reference.placeholder(what, number if prompt.use_image_id else None)
        for (kind, what, *_), number in zip(parts, numbers, strict=False)
    ]
    thinking = prompt.thinking if pair.model.config.thinks else None
    return pair.reference.prompt_ids("\n".join(texts), thinking=thinking)


def largest_difference(pair, prompts):
    """Compare one batch; return the largest absolute difference of a logit, and the answers."""
    visuals, all_ids, wanted = [], [], []
    for prompt in prompts:
        ours = our_parts(pair, prompt)
        theirs = sliced_parts(
            prompt,
            lambda picture, own=prompt.slicing: pair.reference.crops(picture, own.max_slices, own.slice_side_px),
            pair.packs,
        )
        ids = built_ids(pair, prompt, ours) if prompt.is_plain else reference_ids(pair, prompt, theirs)
        if not prompt.spells:
            # The reference takes spelled special tokens for special tokens; we do not.
            assert ids == reference_ids(pair, prompt, theirs)
        groups = [group for *_, own in theirs for group in own]
        features = pair.reference.features(groups) if groups else torch.zeros(0, 1, 1)
        embeddings = pair.reference.embeddings(ids, features, pair.model.config.tokens.image_pad)
        wanted.append(pair.reference.answer(embeddings, pair.model.stop_ids, max_new_tokens=MAX_NEW_TOKENS))
        visuals.append(visual_of(pair, prompt, ours))
        all_ids.append(ids)
    answers = our_answers(pair.model, all_ids, visuals)
    largest = 0.0
    for (tokens, logits), (wanted_tokens, wanted_logits) in zip(answers, wanted, strict=True):
        assert tokens == wanted_tokens
        largest = max(largest, difference(logits, wanted_logits))
    return largest, [tuple(tokens) for tokens, _ in wanted]


def changed_copy(folder, target, change_config=None, change_tensors=None):
    """Copy a checkpoint, its `config.json` and its tensors changed in place by these functions."""
    shutil.copytree(folder, target)
    if change_config is not None:
        config = json.loads((target / "config.json").read_text())
        change_config(config)
        (target / "config.json").write_text(json.dumps(config))
    for path in target.glob("*.safetensors") if change_tensors is not None else ():
        tensors = load_file(path)
        change_tensors(tensors)
        save_file(tensors, path, {"format": "pt"})
    return target
