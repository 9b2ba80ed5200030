import random

import numpy as np
import pytest
import torch
from transformers import MiniCPMV4_7Config, MiniCPMV4_7Model

from operators.minicpmv.canvas import canvas_positions, spread
from operators.minicpmv.config import SpecialTokens
from operators.minicpmv.slicing import MERGED_PATCHES_PER_SIDE, SliceConfig, plan_slices
from schemas.errors import GenerationError

PROMPT_COUNT = 800
TOKENS = SpecialTokens(
    image_start=1, image_end=2, slice_start=3, slice_end=4, image_id_start=5, image_id_end=6, image_pad=7, video_pad=8,
    turn_start=9, turn_end=10, text_end=11, think_start=12, think_end=13, newline=14,
)  # fmt: skip
WORDS = range(20, 40)
IMAGE, VIDEO = 1, 2


@pytest.fixture(scope="module")
def reference():
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    text = {
        "model_type": "qwen3_5_text",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 40,
        "layer_types": ["full_attention"],
    }
    config = MiniCPMV4_7Config(
        vision_config=vision,
        text_config=text,
        insert_layer_id=0,
        image_token_id=TOKENS.image_pad,
        video_token_id=TOKENS.video_pad,
        image_start_id=TOKENS.image_start,
        image_end_id=TOKENS.image_end,
        slice_start_id=TOKENS.slice_start,
        slice_end_id=TOKENS.slice_end,
        newline_id=TOKENS.newline,
    )
    with torch.device("meta"):
        return MiniCPMV4_7Model(config)


class Prompt:
    """Ids, crop grids in visual tokens, and the reference's modality of each token."""

    def __init__(self):
        self.ids, self.modalities, self.grids, self.grid_modalities = [], [], [], []

    def text(self, *ids):
        self.ids += ids
        self.modalities += [0] * len(ids)
        return self

    def crop(self, opening, grid, closing, modality=IMAGE):
        self.text(opening)
        count = grid[0] * grid[1]
        self.ids += [TOKENS.image_pad if modality == IMAGE else TOKENS.video_pad] * count
        self.modalities += [modality] * count
        self.grids.append(grid)
        self.grid_modalities.append(modality)
        return self.text(closing)

    def picture(self, overview, rows=0, cols=0, cell=(1, 1), modality=IMAGE):
        self.crop(TOKENS.image_start, overview, TOKENS.image_end, modality)
        for row in range(rows):
            if row:
                self.text(TOKENS.newline)
            for _ in range(cols):
                self.crop(TOKENS.slice_start, cell, TOKENS.slice_end, modality)
        return self

    def positions(self):
        return canvas_positions(self.ids, self.grids, TOKENS)


def random_picture(prompt, generator, mode, modality):
    """A picture as our slicing makes them, or now and then one of a shape that it never makes."""
    if generator.random() < 0.2:
        overview, cell = ((generator.randint(1, 9), generator.randint(1, 9)) for _ in range(2))
        prompt.picture(overview, generator.randint(0, 3), generator.randint(1, 3), cell, modality)
        return
    config = SliceConfig(downsample_mode=mode, max_slices=generator.choice((1, 2, 4, 9)))
    area = generator.choice((40_000, 300_000, 900_000, 2_000_000))
    aspect = np.exp(generator.uniform(-1.8, 1.8))
    plan = plan_slices(max(int((area / aspect) ** 0.5), 1), max(int((area * aspect) ** 0.5), 1), config)
    overview, *cells = [(size.height_px // config.step_px, size.width_px // config.step_px) for size in plan.shapes()]
    prompt.picture(overview, *plan.grid, cells[0] if cells else (1, 1), modality)


def random_text(generator, longest):
    return generator.choices([*WORDS, TOKENS.newline], k=generator.randint(0, longest))


def random_prompt(generator, mode):
    """Images and clips with text, numbers, newlines or nothing between them."""
    prompt = Prompt().text(TOKENS.turn_start, *random_text(generator, 4))
    for _ in range(generator.randint(0, 4)):
        if generator.random() < 0.4:
            prompt.text(TOKENS.image_id_start, generator.choice(WORDS), TOKENS.image_id_end)
        modality = generator.choice((IMAGE, VIDEO))
        for _ in range(1 if modality == IMAGE else generator.randint(1, 6)):
            random_picture(prompt, generator, mode, modality)
        prompt.text(
            *generator.choice(((), (TOKENS.newline,), (TOKENS.newline, TOKENS.newline), random_text(generator, 9)))
        )
    return prompt.text(*random_text(generator, 12), TOKENS.turn_end)


def reference_positions(reference, prompts, mode):
    """Positions of each prompt, and of the token after it, from one batch that is padded on the left."""
    longest = max(len(prompt.ids) for prompt in prompts)
    side = MERGED_PATCHES_PER_SIDE[mode]

    def padded(rows):
        return torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])

    def sizes(modality):
        grids = [
            (rows * side, cols * side)
            for prompt in prompts
            for (rows, cols), own in zip(prompt.grids, prompt.grid_modalities, strict=True)
            if own == modality
        ]
        return torch.tensor(grids) if grids else None

    mask = padded([[1] * len(prompt.ids) for prompt in prompts])
    positions, deltas = reference.get_rope_index(
        padded([prompt.ids for prompt in prompts]),
        padded([prompt.modalities for prompt in prompts]),
        target_sizes=sizes(IMAGE),
        target_sizes_videos=sizes(VIDEO),
        downsample_mode=mode,
        attention_mask=mask,
    )
    following = deltas[:, 0] + mask.sum(dim=1)
    return [
        (positions[:, row, longest - len(prompt.ids) :].numpy(), int(following[row]))
        for row, prompt in enumerate(prompts)
    ]


def assert_equal_to_reference(reference, prompts, mode):
    for prompt, (wanted, following) in zip(prompts, reference_positions(reference, prompts, mode), strict=True):
        positions, next_position = prompt.positions()
        np.testing.assert_array_equal(positions, wanted)
        assert next_position == following


@pytest.mark.parametrize("mode", MERGED_PATCHES_PER_SIDE)
def test_random_prompts_have_the_positions_of_the_reference(reference, mode):
    generator = random.Random(47)
    prompts = [random_prompt(generator, mode) for _ in range(PROMPT_COUNT // 2)]
    assert max(len(prompt.grids) for prompt in prompts) > 40
    assert sum(not prompt.grids for prompt in prompts) > 5
    for start in range(0, len(prompts), 4):
        assert_equal_to_reference(reference, prompts[start : start + 4], mode)


def test_slices_of_unequal_size_and_rows_of_unequal_length_have_the_positions_of_the_reference(reference):
    unequal = Prompt().text(20).picture((3, 3), 1, 1, (4, 5)).crop(TOKENS.slice_start, (2, 3), TOKENS.slice_end)
    unequal.text(TOKENS.newline)
    for grid in ((4, 5), (1, 2)):
        unequal.crop(TOKENS.slice_start, grid, TOKENS.slice_end)
    ragged = Prompt().text(20).picture((3, 3), 1, 2, (2, 2)).text(TOKENS.newline)
    ragged.crop(TOKENS.slice_start, (2, 2), TOKENS.slice_end).text(21)
    assert_equal_to_reference(reference, [unequal, ragged], "16x")


def test_a_picture_that_opens_the_prompt_has_no_negative_position(reference):
    assert_equal_to_reference(reference, [Prompt().picture((2, 3)).text(20), Prompt().picture((2, 2), 2, 1)], "16x")
    positions, _ = Prompt().picture((2, 3)).text(20).positions()
    assert positions.min() == 0


def test_text_counts_on_by_one():
    positions, following = Prompt().text(*WORDS).positions()
    np.testing.assert_array_equal(positions, np.tile(np.arange(20), (3, 1)))
    assert following == 20


def test_an_overview_without_slices_is_its_own_canvas():
    positions, following = Prompt().text(20, 21).picture((2, 3)).text(22).positions()
    assert positions[0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 6]
    assert positions[1].tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 6]
    assert positions[2].tolist() == [0, 1, 1, 2, 3, 4, 2, 3, 4, 5, 6]
    assert following == 7


def test_slices_lie_side_by_side_under_the_overview_that_is_stretched_over_them():
    positions, following = Prompt().text(20).picture((1, 2), 2, 2, (1, 2)).text(21).positions()
    places = (positions[1:] - 1).T.tolist()
    assert places[1:5] == [[-1, -1], [0, 0], [0, 3], [2, 4]]
    assert places[5:9] == [[0, 0], [0, 0], [0, 1], [0, 1]]
    assert places[9:13] == [[0, 2], [0, 2], [0, 3], [0, 3]]
    assert places[13] == [0, 4]
    assert places[14:18] == [[1, 0], [1, 0], [1, 1], [1, 1]]
    assert positions[0, 1:-1].tolist() == [1] * 21
    assert positions[:, -1].tolist() == [6, 6, 6]
    assert following == 7


def test_points_are_spread_over_every_canvas_as_torch_spreads_them():
    for length in range(1, 351):
        for count in range(1, 65):
            wanted = torch.linspace(0, length - 1, count).round().long().numpy()
            np.testing.assert_array_equal(spread(count, length), wanted, err_msg=f"{count} on {length}")


@pytest.mark.parametrize(
    ("ids", "grids", "reason"),
    [
        ([20, 1, 7, 7, 2], [(1, 3)], "do not fit"),
        ([20, 1, 7, 7, 2], [], "do not fit"),
        ([20, 1, 2], [(1, 1)], "do not fit"),
        ([20, 7, 7, 2], [(1, 2)], "between two markers"),
        ([20, 1, 7, 7], [(1, 2)], "between two markers"),
        ([7, 7, 2], [(1, 2)], "between two markers"),
        ([20, 1, 7, 7, 4], [(1, 2)], "between two markers"),
        ([20, 3, 7, 7, 4, 1, 7, 7, 2], [(1, 2), (1, 2)], "before the first overview"),
    ],
)
def test_placeholders_that_are_no_crops_are_refused(ids, grids, reason):
    with pytest.raises(GenerationError, match=reason):
        canvas_positions(ids, grids, TOKENS)
