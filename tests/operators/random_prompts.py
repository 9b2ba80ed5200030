"""Random prompts of images, clips and text, from a seed."""

import dataclasses
import math
import random

import numpy as np

from operators.minicpmv.slicing import SliceConfig
from operators.minicpmv.temporal import StackedConfig, Timeline, composite, plan_clip

WORDS = ("Read", "this!", "Hello!", "!", "§ 7", "naïve", "表格", "🙂", "1,204.50", "\n", "x < y", "e\u0301")
SPELLED = (
    "<image>",
    "</slice>",
    "<unk>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "<image_id>0</image_id>",
)


@dataclasses.dataclass(frozen=True)
class RandomPrompt:
    """One user's turn.

    Attributes:
        content: its parts in order: `("image", index)`, `("video", 0)`, `("text", text)`.
        images: (height, width, 3) uint8 each.
        clip: pictures of the clip, alike; none without a clip.
        spells: whether its text spells special tokens.
    """

    content: tuple
    images: tuple
    clip: tuple
    slicing: SliceConfig
    use_image_id: bool
    thinking: bool
    spells: bool

    @property
    def kinds(self):
        """Kinds of pictures that it has."""
        return [kind for kind, pictures in (("image", self.images), ("video", self.clip)) if pictures]

    def pictures(self):
        """All pictures in the order of the prompt."""
        found = []
        for kind, part in self.content:
            found += [self.images[part]] if kind == "image" else self.clip if kind == "video" else []
        return found

    @property
    def is_plain(self):
        """Whether pictures of at most one kind stand before one text."""
        *pictures, (last, _) = self.content
        return last == "text" and len(self.kinds) < 2 and all(kind != "text" for kind, _ in pictures)


def random_prompts(count, seed):
    """Prompts of every kind, in the order of a shuffled pack."""
    generator = random.Random(seed)
    return [random_prompt(generator) for _ in range(count)]


def random_prompt(generator):
    side = generator.choice((112, 112, 112, 168, 224, 448))
    slicing = SliceConfig(
        slice_side_px=side,
        max_slices=generator.choice((1, 2, 4, 6)),
        downsample_mode=generator.choice(("16x", "4x")),
    )
    kind = generator.choice(("images", "images", "clip", "clip", "both", "both", "none"))
    images = (
        [random_picture(generator, slicing) for _ in range(generator.randint(1, 3))]
        if kind in ("images", "both")
        else []
    )
    clip = random_clip(generator, slicing) if kind in ("clip", "both") else []
    spells = kind != "both" and generator.random() < 0.2
    text = ("text", " ".join(generator.choices(WORDS + (SPELLED * spells), k=generator.randint(1, 12))))
    content = [("image", index) for index in range(len(images))] + [("video", 0)] * bool(clip)
    if kind == "both":
        extra = ("text", " ".join(generator.choices(WORDS, k=3)))
        content = shuffled(generator, [*content, text, extra])
    else:
        content.append(text)
    return RandomPrompt(
        tuple(content), tuple(images), tuple(clip), slicing, generator.random() < 0.5, generator.random() < 0.5, spells
    )


def shuffled(generator, content):
    """The parts in random order, images among themselves in theirs."""
    mixed = generator.sample(content, len(content))
    images = iter(part for part in content if part[0] == "image")
    return [next(images) if part[0] == "image" else part for part in mixed]


def random_picture(generator, slicing, most_slices=8):
    """Coarse noise over a gradient, (height, width, 3) uint8, from far smaller than a slice to more than its share."""
    area = slicing.slice_side_px**2 * math.exp(generator.uniform(math.log(0.05), math.log(most_slices)))
    aspect = math.exp(generator.uniform(-1.4, 1.4))
    height_px, width_px = max(round(math.sqrt(area / aspect)), 1), max(round(math.sqrt(area * aspect)), 1)
    noise = np.random.default_rng(generator.getrandbits(32))
    cells = noise.integers(0, 256, (height_px // 8 + 1, width_px // 8 + 1, 3), dtype=np.uint8)
    blocks = cells.repeat(8, 0).repeat(8, 1)[:height_px, :width_px].astype(np.int64)
    rows, cols = np.mgrid[0:height_px, 0:width_px]
    return ((blocks + (rows * 2 + cols)[..., None]) % 256).astype(np.uint8)


def random_clip(generator, slicing):
    """One to five seconds or so of a picture that moves: main frames, with composites of the others or without."""
    fps = generator.choice((4.0, 5.0, 8.0))
    count = generator.randint(1, round(3 * fps))
    first = random_picture(generator, slicing, most_slices=2)
    timeline = Timeline(np.arange(count) / fps, count / fps, fps, 1 / 90_000)
    config = StackedConfig(max_frames=generator.choice((2, 128)), stack_frames=generator.choice((1, 1, 2, 3, 4, 5)))
    frames = [np.roll(first, (3 * number, 5 * number), (0, 1)) for number in range(count)]
    return [
        composite([frames[position] for position in image.positions])
        if image.is_composite
        else frames[image.positions[0]]
        for image in plan_clip(timeline, config)
    ]
