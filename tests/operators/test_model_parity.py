"""Greedy answers of our operators against transformers' own processor rules and `generate`, token for token."""

import math

import numpy as np
import pyarrow as pa
import pymupdf
import pytest

from operators.engine.scheduler import SchedulerConfig
from operators.generate import Generate, GenerateConfig
from operators.minicpmv.demo import write_demo_model
from operators.minicpmv.slicing import SliceConfig
from operators.minicpmv.temporal import StackedConfig, Timeline, composite, plan_clip
from operators.prepare import PrepareClips, PrepareConfig, PrepareImages
from operators.prompts import prompt_for
from tests.operators.reference_mergers import Reference
from tests.operators.rows46 import clip_row, page_pictures, page_row, table_of

MAX_NEW_TOKENS = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_demo_model(path)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder)


@pytest.fixture(scope="module")
def generate(folder):
    config = GenerateConfig(
        model_folder=str(folder),
        device="cpu",
        dtype="fp32",
        max_new_tokens=MAX_NEW_TOKENS,
        scheduler=SchedulerConfig(slot_count=8),
    )
    return Generate(config)


def our_answers(generate, table):
    """Prompt ids, and generated ids with the end token where the model wrote one, of each row."""
    assert table["error"].null_count == table.num_rows
    outcomes = generate.outcomes(table)
    answers = [outcomes[row] for row in range(table.num_rows)]
    filled = generate(table).to_pylist()
    assert [row["output_tokens"] for row in filled] == [answer.output_tokens for answer in answers]
    assert [row["finish_reason"] for row in filled] == [answer.finish_reason for answer in answers]
    return list(zip(table["prompt_ids"].to_pylist(), answers, strict=True))


def assert_parity(reference, ours, pictures, text, slicing, *, kind):
    prompt_ids, answer = ours
    processed = reference.process(pictures, slicing)
    wanted_prompt = reference.prompt_ids(text, processed, slicing, kind=kind, use_image_id=kind == "image")
    assert prompt_ids == wanted_prompt
    wanted = reference.greedy(wanted_prompt, processed, slicing, kind=kind, max_new_tokens=MAX_NEW_TOKENS)
    assert answer.token_ids == tuple(wanted[: len(answer.token_ids)])
    assert answer.output_tokens == len(wanted)
    assert answer.finish_reason == ("length" if len(answer.token_ids) == MAX_NEW_TOKENS else "stop")


def assert_pages_agree(folder, reference, generate, pictures, slicing):
    prepare = PrepareImages(PrepareConfig(model_folder=str(folder), slicing=slicing))
    table = prepare(table_of(*[page_row(picture) for picture in pictures]))
    text = prompt_for("ocr", "pdf", None).text
    answers = our_answers(generate, table)
    for picture, ours in zip(pictures, answers, strict=True):
        assert_parity(reference, ours, [picture], text, slicing, kind="image")
    return [answer for _, answer in answers]


def test_twenty_pages_agree(folder, reference, generate):
    answers = assert_pages_agree(folder, reference, generate, page_pictures(20, seed=46), SliceConfig())
    assert len({answer.token_ids for answer in answers}) > 8


def test_pages_agree_in_the_fine_mode(folder, reference, generate):
    slicing = SliceConfig(downsample_mode="4x", max_slices=4)
    assert_pages_agree(folder, reference, generate, page_pictures(4, seed=4), slicing)


@pytest.mark.needs_corpus
def test_twenty_corpus_pages_agree(folder, reference, generate, corpus):
    pictures = list(corpus_pages(corpus, 20))
    assert len(pictures) == 20
    assert_pages_agree(folder, reference, generate, pictures, SliceConfig())


def corpus_pages(corpus, count):
    """First pages of well-formed corpus documents at 120 dpi, each (height, width, 3) uint8."""
    found = 0
    for path in sorted((corpus / "pdf").glob("*.pdf")):
        document = pymupdf.open(path)
        if document.needs_pass or document.page_count == 0:
            continue
        pixmap = document[0].get_pixmap(dpi=120, colorspace=pymupdf.csRGB, alpha=False)
        if pixmap.width * pixmap.height > 6_000_000:
            continue
        yield np.frombuffer(pixmap.samples, np.uint8).reshape(pixmap.height, pixmap.width, 3)
        found += 1
        if found == count:
            return


def reference_units(frames, fps, max_num_frames, stack_frames):
    """The pictures of a clip by the released sampling and stacking rules, restated."""
    duration = len(frames) / fps
    last = len(frames) - 1
    if duration <= max_num_frames:
        mains = [int(second * fps) for second in range(math.ceil(duration))]
    else:
        candidates = [min(int(round(i * 0.1, 1) * fps), last) for i in range(int(duration / 0.1))]
        places = np.linspace(0, len(candidates) - 1, max_num_frames, dtype=int)
        mains = [candidates[i] for i in places] if len(candidates) > max_num_frames else candidates
    times = [s + j / stack_frames for s in range(math.ceil(duration)) for j in range(1, stack_frames)]
    times = [time for time in times if time < duration]
    if len(times) > max_num_frames * (stack_frames - 1):
        times = [times[i] for i in np.linspace(0, len(times) - 1, max_num_frames * (stack_frames - 1), dtype=int)]
    units = []
    for number, main in enumerate(mains):
        units.append(frames[main])
        group = [frames[min(int(time * fps), last)] for time in times if int(time) == number]
        if group:
            units.append(reference_composite(group))
    return units


def reference_composite(frames):
    """Frames tiled with 6 black pixels between them, in the arrangement nearest to a square."""
    height, width = frames[0].shape[:2]
    count = len(frames)

    def distance(arrangement):
        rows, cols = arrangement
        return abs((cols * width + (cols - 1) * 6) / (rows * height + (rows - 1) * 6) - 1)

    if count == 4:
        rows, cols = 2, 2
    elif count in (2, 3):
        rows, cols = min([(1, count), (count, 1)], key=distance)
        if count == 2 and distance((1, 2)) == distance((2, 1)):
            rows, cols = (1, 2) if width >= height else (2, 1)
    else:
        rows, cols = 1, count
    lines = [
        np.concatenate(
            [pad_right(frame, index < cols - 1) for index, frame in enumerate(frames[row * cols :][:cols])], 1
        )
        for row in range(rows)
    ]
    return np.concatenate([pad_below(line, row < rows - 1) for row, line in enumerate(lines)], 0)


def pad_right(frame, wanted):
    return np.pad(frame, ((0, 0), (0, 6 * wanted), (0, 0)))


def pad_below(line, wanted):
    return np.pad(line, ((0, 6 * wanted), (0, 0), (0, 0)))


def moving_frames(count, height_px, width_px, seed):
    """A box that moves over noise: `count` frames, each (height, width, 3) uint8."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 256, (height_px // 8 + 1, width_px // 8 + 1, 3), dtype=np.uint8)
    background = noise.repeat(8, 0).repeat(8, 1)[:height_px, :width_px]
    frames = []
    for index in range(count):
        frame = background.copy()
        left = index * 5 % (width_px - 40)
        frame[10:60, left : left + 40] = (index * 9 % 256, 255 - index * 7 % 256, 128)
        frames.append(frame)
    return frames


CLIPS = [
    # frames, frames a second, height, width, most main frames, frames a second in the stack, most slices
    (35, 10.0, 120, 200, 128, 1, 1),
    (26, 10.0, 200, 120, 128, 3, 1),
    (40, 25.0, 160, 240, 128, 5, 1),
    (60, 10.0, 96, 128, 4, 4, 1),
    (20, 10.0, 500, 700, 128, 3, 4),
]


def test_five_clips_agree(folder, reference, generate):
    text = prompt_for("caption", "video", None).text
    tables, units = [], []
    for number, (count, fps, height_px, width_px, most, stacked, slices) in enumerate(CLIPS):
        frames = moving_frames(count, height_px, width_px, number)
        timeline = Timeline(np.arange(count) / fps, count / fps, fps, 1 / 90_000)
        plan = plan_clip(timeline, StackedConfig(max_frames=most, stack_frames=stacked))
        pictures = [
            composite([frames[position] for position in image.positions])
            if image.is_composite
            else frames[image.positions[0]]
            for image in plan
        ]
        wanted = reference_units(frames, fps, most, stacked)
        assert len(pictures) == len(wanted)
        assert all(np.array_equal(one, other) for one, other in zip(pictures, wanted, strict=True))
        slicing = SliceConfig(max_slices=slices)
        prepare = PrepareClips(PrepareConfig(model_folder=str(folder), slicing=slicing))
        tables.append(prepare(table_of(clip_row(pictures, slicing))))
        units.append((wanted, slicing))
    answers = our_answers(generate, pa.concat_tables(tables))
    for ours, (wanted, slicing) in zip(answers, units, strict=True):
        assert_parity(reference, ours, wanted, text, slicing, kind="video")
    assert len({answer.token_ids for _, answer in answers}) > 2
