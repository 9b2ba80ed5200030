"""Many prompts, one encoding: a page or clip asked for several things, and equal pages, go through the tower once."""

import numpy as np
import pyarrow as pa
import pytest

from operators.generate import Generate, GenerateConfig
from operators.minicpmv.config import read_model_config
from operators.minicpmv.slicing import Size
from operators.minicpmv.tiny import write_tiny_model
from operators.minicpmv.visual import Visual, equal_content
from operators.prepare import PrepareClips, PrepareConfig, PrepareImages
from tests.operators.rows45 import clip_in_packs
from tests.operators.rows46 import clip_frames, clip_row, page_pictures, page_row, table_of


def visual(seed, shapes=((28, 28), (42, 28)), packs=None):
    sizes = tuple(Size(*shape) for shape in shapes)
    pixels = np.random.default_rng(seed).integers(0, 256, sum(3 * rows * cols for rows, cols in shapes), np.uint8)
    return Visual(pixels, sizes, packs)


def test_only_those_that_show_the_same_have_a_key():
    keys = equal_content([visual(1), visual(2), visual(1), visual(3), visual(2), visual(1)])
    assert keys[0] == keys[2] == keys[5] != keys[1] == keys[4]
    assert keys[3] is None
    assert None not in (keys[0], keys[1])


def test_one_byte_makes_a_difference():
    page = visual(1, ((448, 448),))
    for place in (1, 2, 4093, 100_000, page.pixels.size - 1):
        pixels = page.pixels.copy()
        pixels[place] ^= 1
        assert equal_content([page, Visual(pixels, page.shapes)]) == [None, None]


def test_the_same_bytes_in_other_shapes_or_packs_are_not_the_same():
    wide, high = visual(1, ((28, 56),)), visual(1, ((56, 28),))
    assert equal_content([wide, high]) == [None, None]
    together, apart = visual(1, ((28, 28),) * 2, ((0, 5),)), visual(1, ((28, 28),) * 2, ((0,), (5,)))
    later = visual(1, ((28, 28),) * 2, ((0, 6),))
    assert equal_content([together, apart, later, visual(1, ((28, 28),) * 2)]) == [None] * 4
    assert len(set(equal_content([together, apart, together, apart]))) == 2


def test_nothing_has_no_keys():
    assert equal_content([]) == []


def asked(folder, prepare, rows, prompts):
    """Records of the same rows for each prompt."""
    slices = 1 if prepare is PrepareClips else 4
    slicing = read_model_config(folder).slicing.model_copy(update={"max_slices": slices, "slice_side_px": 112})
    tables = [
        prepare(PrepareConfig(model_folder=str(folder), slicing=slicing, custom_prompt=prompt))(table_of(*rows))
        for prompt in prompts
    ]
    return pa.concat_tables(tables)


def records_of(folder, member):
    """Three pages, one of them twice, and a clip, for two prompts each."""
    pages = page_pictures(3, seed=5)
    once = read_model_config(folder).slicing.model_copy(update={"max_slices": 1, "slice_side_px": 112})
    frames = clip_frames(3)
    clip = clip_row(frames, once)
    if member == "minicpmv4_5":
        clip = clip_in_packs(frames, [[10 * index] for index in range(len(frames))], once)
    prompts = ("What is it?", "Write all of it down.")
    return pa.concat_tables(
        [
            asked(folder, PrepareImages, [page_row(picture) for picture in [*pages, pages[0]]], prompts),
            asked(folder, PrepareClips, [clip], prompts),
        ]
    )


@pytest.mark.parametrize("member", ["minicpmv4_6", "minicpmv4_5"])
def test_a_page_that_is_asked_twice_is_encoded_once_and_answered_as_by_itself(tmp_path, monkeypatch, member):
    write_tiny_model(tmp_path, member)
    generate = Generate(GenerateConfig(model_folder=str(tmp_path), device="cpu", max_new_tokens=16))
    records = records_of(tmp_path, member)
    assert records["error"].null_count == len(records) == 10
    encoder, seen = generate._model.encoder, []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda visuals, levels: seen.append(len(visuals)) or encode(visuals, levels))
    apart = [generate.outcomes(records.slice(row, 1))[0].token_ids for row in range(10)]
    assert seen == [1] * 10
    seen.clear()
    together = generate.outcomes(records)
    assert [together[row].token_ids for row in range(10)] == apart
    assert len(set(apart)) > 3
    # Three pages and the clip.
    assert sum(seen) == 4
    assert generate._engine.engine.stats.spared_encodings == 6
