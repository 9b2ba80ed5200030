"""Random prompts of images, clips and text for the members with a resampler, from a seed."""

import dataclasses
import random

import numpy as np

from operators.minicpmv.family import FAMILIES
from operators.minicpmv.slicing import SliceConfig
from tests.operators.random_prompts import SPELLED, WORDS, random_picture, shuffled

LONGEST_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class PackedPrompt:
    """One user's turn.

    Attributes:
        content: its parts in order: `("image", index)`, `("video", 0)`, `("text", text)`.
        images: (height, width, 3) uint8 each.
        frames: of the clip, alike, all of one size; none without a clip.
        packs: temporal ids of the frames of each pack; a frame a pack where the member packs none.
        spells: whether its text spells special tokens.
    """

    content: tuple
    images: tuple
    frames: tuple
    packs: tuple
    slicing: SliceConfig
    use_image_id: bool
    thinking: bool
    spells: bool

    @property
    def kinds(self):
        """Kinds of pictures that it has."""
        return tuple(kind for kind, pictures in (("image", self.images), ("video", self.frames)) if pictures)

    @property
    def is_plain(self):
        """Whether pictures of at most one kind stand before one text."""
        *pictures, (last, _) = self.content
        return last == "text" and len(self.kinds) < 2 and all(kind != "text" for kind, _ in pictures)


def packed_prompts(family, count, seed):
    """Prompts of every kind, in the order of a shuffled pack."""
    generator = random.Random(seed)
    return [packed_prompt(generator, FAMILIES[family]) for _ in range(count)]


def packed_prompt(generator, family):
    side = generator.choice((112,) * 7 + (168, 168, 224, 224, 448))
    slicing = SliceConfig(slice_side_px=side, max_slices=generator.choice((1, 2, 4, 6)), query_count=64)
    kind = generator.choice(("images", "images", "clip", "clip", "both", "both", "none"))
    images = (
        [random_picture(generator, slicing) for _ in range(generator.randint(1, 3))]
        if kind in ("images", "both")
        else []
    )
    frames, packs = random_packs(generator, family, slicing) if kind in ("clip", "both") else ([], [])
    spells = kind != "both" and generator.random() < 0.2
    text = ("text", " ".join(generator.choices(WORDS + (SPELLED * spells), k=generator.randint(1, 12))))
    content = [("image", index) for index in range(len(images))] + [("video", 0)] * bool(frames)
    if kind == "both":
        content = shuffled(generator, [*content, text, ("text", " ".join(generator.choices(WORDS, k=3)))])
    else:
        content.append(text)
    return PackedPrompt(
        tuple(content),
        tuple(images),
        tuple(frames),
        tuple(packs),
        slicing,
        generator.random() < 0.5,
        family.thinks and generator.random() < 0.5,
        spells,
    )


def random_packs(generator, family, slicing):
    """Frames of a picture that moves, and temporal ids of each pack: ascending, the last pack may be shorter."""
    count = generator.randint(1, 14 if family.clip_rule == "packed" else 6)
    first = random_picture(generator, slicing, most_slices=2)
    frames = [np.roll(first, (3 * number, 5 * number), (0, 1)) for number in range(count)]
    times = sorted(generator.sample(range(LONGEST_SECONDS * 10), count))
    size = generator.randint(1, 6) if family.clip_rule == "packed" else 1
    return frames, [tuple(times[start : start + size]) for start in range(0, count, size)]
