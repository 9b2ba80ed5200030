import json
import subprocess
import sys
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer

from operators.minicpmv.config import read_model_config
from operators.minicpmv.demo import write_demo_model
from operators.minicpmv.prompt import (
    ImageTokens,
    PromptBuilder,
    PromptSettings,
    image_tokens,
    require_thinking,
    visual_tokens,
)
from operators.minicpmv.slicing import Size, SliceConfig, plan_slices, slice_image
from schemas.errors import ConfigError, PrepareError, PromptTooLongError
from schemas.image import Grid
from tests.operators.members import (
    MEMBERS,
    MERGERS,
    RESAMPLERS,
    SYSTEM,
    THINKING,
    change_json,
    member_tokenizer,
    write_member,
)
from tests.operators.reference_mergers import CLASSES, Reference, text_rules

TEXTS = (
    "Read this page.",
    " \n leading spaces, trailing newline \n\n",
    "Zahlen 1234567890 und Ümläute, 表格, e\u0301 🙂\n\nzweiter Absatz",
    "x < y && <table> </slice-ish> <|nope|>",
    "",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_demo_model(path)
    return path


@pytest.fixture(scope="module")
def builder(folder):
    return PromptBuilder(read_model_config(folder))


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder, with_weights=False)


def pictures(sizes):
    return [np.full((height_px, width_px, 3), 200, np.uint8) for height_px, width_px in sizes]


def our_tokens(images, slicing):
    sliced = [slice_image(image, slicing) for image in images]
    shapes = [Size(*piece.shape[:2]) for one in sliced for piece in one.slices]
    return image_tokens(shapes, [one.grid for one in sliced], slicing)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("mode", ["16x", "4x"])
@pytest.mark.parametrize("sizes", [[(700, 1000)], [(300, 220)], [(900, 400), (100, 90), (500, 1400)]])
def test_prompts_equal_template_and_processor_rules(reference, builder, kind, mode, sizes):
    slicing = SliceConfig(downsample_mode=mode)
    images = pictures(sizes)
    processed = reference.process(images, slicing)
    tokens = our_tokens(images, slicing)
    for text in TEXTS:
        for use_image_id in (True, False):
            for thinking in (True, False):
                wanted = reference.prompt_ids(
                    text, processed, slicing, kind=kind, use_image_id=use_image_id, thinking=thinking
                )
                settings = PromptSettings(kind=kind, use_image_id=use_image_id, thinking=thinking)
                assert builder.build(text, tokens, settings) == wanted


def test_a_prompt_without_pictures_equals_the_template(reference, builder):
    for text in TEXTS:
        chat = reference.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        assert (
            builder.build(text, [], PromptSettings(kind="image", use_image_id=True))
            == reference.tokenizer(chat).input_ids
        )


def test_published_placeholder_counts():
    for mode, each in (("16x", 70), ("4x", 247)):
        slicing = SliceConfig(downsample_mode=mode)
        plan = plan_slices(700, 1000, slicing)
        [image] = image_tokens(plan.shapes(), [plan.grid], slicing)
        assert image.counts == (each,) * 5


def test_text_that_spells_special_tokens_stays_text(builder):
    text = "a<|im_end|><image>b</image><|image_pad|><slice><think></think><|video_pad|><|im_start|>"
    ids = builder.build(text, [ImageTokens(Grid(0, 0), (4,))], PromptSettings(kind="image", use_image_id=False))
    tokens = builder.tokens
    assert ids.count(tokens.image_pad) == 4
    assert ids.count(tokens.image_start) == ids.count(tokens.image_end) == 1
    assert ids.count(tokens.turn_end) == 1
    assert ids.count(tokens.turn_start) == 2
    assert ids.count(tokens.think_start) == 1
    assert tokens.video_pad not in ids
    assert builder.decode(builder.encode(text)) == text


def test_images_are_numbered_and_a_clip_has_one_number(builder):
    images = [ImageTokens(Grid(0, 0), (2,))] * 12
    tokens = builder.tokens
    numbered = builder.build("q", images, PromptSettings(kind="image", use_image_id=True))
    assert numbered.count(tokens.image_id_start) == 12
    start = len(numbered) - 1 - numbered[::-1].index(tokens.image_id_start)
    assert builder.decode(numbered[start + 1 : numbered.index(tokens.image_id_end, start)]) == "11"
    clip = builder.build("q", images, PromptSettings(kind="video", use_image_id=True))
    assert clip.count(tokens.image_id_start) == 1
    assert clip.count(tokens.video_pad) == 24


def test_a_prompt_over_the_bound_is_refused(builder):
    image = ImageTokens(Grid(0, 0), (500,))
    with pytest.raises(PromptTooLongError, match="at most 300"):
        builder.build("q", [image], PromptSettings(kind="image", use_image_id=True, max_prompt_tokens=300))


def test_a_prompt_over_the_models_positions_is_refused(builder):
    with pytest.raises(PromptTooLongError):
        builder.build("word " * 10_000, [], PromptSettings(kind="image", use_image_id=True))


def test_slices_must_fit_their_grid():
    slicing = SliceConfig()
    with pytest.raises(PrepareError, match="grid"):
        ImageTokens(Grid(2, 2), (70, 70))
    with pytest.raises(PrepareError, match="grids that hold 1"):
        image_tokens([Size(448, 448)] * 2, [Grid(0, 0)], slicing)
    with pytest.raises(PrepareError, match="does not divide"):
        visual_tokens(Size(450, 448), slicing)


def test_cpu_modules_import_no_torch():
    code = (
        "import sys, operators.prepare, operators.minicpmv.weights; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_tokenizer_that_merges_gives_the_same_prompts(folder, tmp_path):
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    template = (tmp_path / "tokenizer_config.json").read_bytes()
    write_member(tmp_path, "minicpmv4_6")
    (tmp_path / "tokenizer_config.json").write_bytes(template)
    change_json(tmp_path / "preprocessor_config.json", image_processor_type="MiniCPMV4_6ImageProcessor")
    merging, reference = PromptBuilder(read_model_config(tmp_path)), Reference(tmp_path, with_weights=False)
    assert len(merging.encode("\n\n")) == 1
    slicing = SliceConfig()
    images = pictures([(700, 1000)])
    processed, tokens = reference.process(images, slicing), our_tokens(images, slicing)
    for text in (*TEXTS, "\nstarts with a newline", "#\n\n# x\n\n"):
        for thinking in (True, False):
            wanted = reference.prompt_ids(text, processed, slicing, kind="image", use_image_id=True, thinking=thinking)
            settings = PromptSettings(kind="image", use_image_id=True, thinking=thinking)
            assert merging.build(text, tokens, settings) == wanted


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """A builder of each member, with the tokenizer's own reading of a whole prompt."""
    made = {}
    for name in MEMBERS:
        path = write_member(tmp_path_factory.mktemp(name), name)
        config = read_model_config(path)
        whole = Tokenizer.from_file(str(path / "tokenizer.json"))
        made[name] = SimpleNamespace(config=config, builder=PromptBuilder(config), whole=whole)
    return made


def opening(name, *, thinking):
    """How each member's answer is opened: only members that think have a thought, empty when none is asked for."""
    if name not in THINKING:
        return "<|im_start|>assistant\n"
    return "<|im_start|>assistant\n<think>\n" + ("" if thinking else "\n</think>\n\n")


def conversation(name, content, *, thinking=False):
    """The text of a whole prompt, as the chat templates of the releases make it."""
    system = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n" if name == "minicpmv2_6" else ""
    body = content.strip() if name in MERGERS else content
    return f"{system}<|im_start|>user\n{body}<|im_end|>\n{opening(name, thinking=thinking)}"


def placeholder(grid, counts, pad, number=None):
    """What stands for one image, restated: the overview, then the slices row by row."""
    cells = [f"<slice>{pad * count}</slice>" for count in counts[1:]]
    rows = ["".join(cells[row * grid.cols : (row + 1) * grid.cols]) for row in range(grid.rows)]
    prefix = "" if number is None else f"<image_id>{number}</image_id>"
    return f"{prefix}<image>{pad * counts[0]}</image>" + "\n".join(rows)


IMAGES = (
    ImageTokens(Grid(2, 3), (5, 4, 3, 4, 3, 4, 3)),
    ImageTokens(Grid(0, 0), (2,)),
    ImageTokens(Grid(1, 2), (3, 1, 1)),
)
"""Slices of one image that differ in tokens, as adaptive enlarging makes them."""


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_images_of_every_member_are_numbered_parts_before_the_text(members, name, numbered, count):
    member = members[name]
    pad = "<|image_pad|>" if name in MERGERS else "<unk>"
    for text in (*TEXTS, "\nstarts with a newline", "#\n\n# x\n\n"):
        for thinking in (False, True) if name in THINKING else (False,):
            parts = [
                placeholder(image.grid, image.counts, pad, number if numbered else None)
                for number, image in enumerate(IMAGES[:count])
            ]
            wanted = member.whole.encode(conversation(name, "\n".join([*parts, text]), thinking=thinking)).ids
            settings = PromptSettings(kind="image", use_image_id=numbered, thinking=thinking)
            assert member.builder.build(text, IMAGES[:count], settings) == wanted


@pytest.mark.parametrize("name", MERGERS)
@pytest.mark.parametrize("numbered", [True, False])
def test_a_clip_of_a_merger_is_one_part(members, name, numbered):
    member = members[name]
    pictures = "".join(placeholder(image.grid, image.counts, "<|video_pad|>") for image in IMAGES)
    # The released processor of 4.7 gives no clip a number.
    prefix = "<image_id>0</image_id>" if numbered and name != "minicpmv4_7" else ""
    wanted = member.whole.encode(conversation(name, f"{prefix}{pictures}\nWhat happens?")).ids
    settings = PromptSettings(kind="video", use_image_id=numbered)
    assert member.builder.build("What happens?", IMAGES, settings) == wanted


@pytest.mark.parametrize("name", ["minicpmv4_0", "minicpmv2_6", "minicpmo2_6"])
@pytest.mark.parametrize("numbered", [True, False])
def test_frames_of_earlier_members_are_images(members, name, numbered):
    as_clip = members[name].builder.build("q", IMAGES, PromptSettings(kind="video", use_image_id=numbered))
    assert as_clip == members[name].builder.build("q", IMAGES, PromptSettings(kind="image", use_image_id=numbered))


@pytest.mark.parametrize("grid", [Grid(0, 0), Grid(2, 1)])
@pytest.mark.parametrize("numbered", [True, False])
def test_packs_of_frames_stand_where_their_first_frame_does(members, grid, numbered):
    """The rule of the release: frames after the first of a pack lose their placeholder and the newline before it."""
    member, frames, slots = members["minicpmv4_5"], [3, 3, 1], 1 + grid.rows * grid.cols
    slicing = SliceConfig(query_count=64)
    shapes = [Size(336, 602)] * sum(frames) * slots
    packs = image_tokens(shapes, [grid] * 3, slicing, frame_counts=frames)
    assert [pack.counts for pack in packs] == [(64,) * slots] * 3

    firsts = set(accumulate(frames[:-1], initial=0))
    content = ""
    for frame in range(sum(frames)):
        if frame in firsts:
            stands = placeholder(grid, (64,) * slots, "<unk>", frame if numbered else None)
            content += ("\n" if frame else "") + stands
    wanted = member.whole.encode(conversation("minicpmv4_5", f"{content}\nWhat happens?")).ids
    settings = PromptSettings(kind="video", use_image_id=numbered)
    assert member.builder.build("What happens?", packs, settings) == wanted


def test_sixty_six_tokens_a_pack_and_a_newline(members):
    member = members["minicpmv4_5"]
    packs = [ImageTokens(Grid(0, 0), (64,), 3)] * 60
    settings = PromptSettings(kind="video", use_image_id=False)
    with_packs = member.builder.build("q", packs, settings)
    assert len(member.builder.encode("\n")) == 1
    assert len(with_packs) - len(member.builder.build("q", [], settings)) == 60 * 67


@pytest.mark.parametrize("name", MERGERS)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_placeholders_of_mergers_equal_the_released_processors_rules(members, name, kind):
    markers = {
        f"{part}_{side}_token": f"<{'/' if side == 'end' else ''}{part}>"
        for part in ("image", "slice", "image_id")
        for side in ("start", "end")
    }
    own = SimpleNamespace(image_token="<|image_pad|>", video_token="<|video_pad|>", **markers)
    rules = text_rules(CLASSES[name][1], own)
    pad = f"<|{kind}_pad|>"
    slicing = SliceConfig(downsample_mode="4x")
    plans = [plan_slices(700, 1000, slicing), plan_slices(300, 220, slicing)]
    grids = np.array([plan.grid for plan in plans])
    sizes = np.array([[shape.height_px // 14, shape.width_px // 14] for plan in plans for shape in plan.shapes()])
    counts = [len(plan.shapes()) for plan in plans]
    if kind == "image":
        facts = {"grids": grids, "num_patches_per_image": counts, "target_sizes": sizes}
        made = [rules.replace_image_token(facts, image_idx=index, image_token_divisor=4) for index in range(2)]
    else:
        facts = {"target_sizes_videos": sizes, "num_frames_per_video": np.array([2]), "grids_videos": grids}
        made = [rules.replace_video_token(facts, video_idx=0, video_token_divisor=4)]
    made = rules._prepend_local_ids([pad * len(made)], made, pad)
    member = members[name]
    wanted = member.whole.encode(conversation(name, "\n".join([*made, "q"]))).ids
    images = image_tokens([shape for plan in plans for shape in plan.shapes()], [plan.grid for plan in plans], slicing)
    assert member.builder.build("q", images, PromptSettings(kind=kind, use_image_id=True)) == wanted


@pytest.mark.parametrize("name", RESAMPLERS)
def test_a_resampler_makes_as_many_tokens_of_every_slice(name, members):
    slicing = SliceConfig(query_count=64)
    assert visual_tokens(Size(14, 1400), slicing) == visual_tokens(Size(448, 448), slicing) == 64
    with pytest.raises(PrepareError, match="14 does not divide"):
        visual_tokens(Size(449, 448), slicing)
    plan = plan_slices(1754, 1240, slicing)
    [image] = image_tokens(plan.shapes(), [plan.grid], slicing)
    ids = members[name].builder.build("q", [image], PromptSettings(kind="image", use_image_id=True))
    assert ids.count(members[name].builder.tokens.image_pad) == 576


def test_frames_are_packed_only_where_a_resampler_takes_them_together():
    shapes = [Size(448, 448)] * 2
    with pytest.raises(PrepareError, match="no resampler"):
        image_tokens(shapes, [Grid(0, 0)], SliceConfig(), frame_counts=[2])
    resampled = SliceConfig(query_count=64)
    assert image_tokens(shapes, [Grid(0, 0)], resampled, frame_counts=[2]) == [ImageTokens(Grid(0, 0), (64,), 2)]
    with pytest.raises(PrepareError, match="1 packs, and 2 grids"):
        image_tokens(shapes, [Grid(0, 0)] * 2, resampled, frame_counts=[2])
    with pytest.raises(PrepareError, match="2 slices for grids that hold 3"):
        image_tokens(shapes, [Grid(0, 0)], resampled, frame_counts=[3])


@pytest.mark.parametrize("name", MEMBERS)
def test_text_that_spells_special_tokens_of_any_member_stays_text(members, name):
    member = members[name]
    special = json.loads(member.whole.to_str())["added_tokens"]
    text = "a".join(token["content"] for token in special)
    assert not {token["id"] for token in special} & set(member.builder.encode(text))
    assert member.builder.decode(member.builder.encode(text)) == text


@pytest.mark.parametrize("name", MEMBERS)
def test_a_thought_is_asked_only_of_members_that_think(members, name):
    builder, config = members[name].builder, members[name].config
    settings = PromptSettings(kind="image", use_image_id=False, thinking=True)
    require_thinking(config, False)
    if name in THINKING:
        require_thinking(config, True)
        assert builder.build("q", [], settings)[-2:] == [builder.tokens.think_start, *builder.encode("\n")]
        return
    with pytest.raises(ConfigError, match="does not think"):
        require_thinking(config, True)
    with pytest.raises(PrepareError, match="does not think"):
        builder.build("q", [], settings)


def test_a_prompt_begins_with_the_token_that_the_tokenizer_puts_before_texts(members):
    settings = PromptSettings(kind="image", use_image_id=False)
    for name, member in members.items():
        first = member.builder.build("q", [], settings)[0]
        assert first == (1 if name == "minicpmv4_0" else member.builder.tokens.turn_start)


@pytest.mark.parametrize("prefix", ["prepend", "always", "first", "never"])
def test_spaces_that_a_tokenizer_puts_before_texts_are_those_of_the_whole_prompt(prefix, tmp_path):
    path = write_member(tmp_path, "minicpmv4_0", prefix=prefix)
    whole = Tokenizer.from_file(str(path / "tokenizer.json"))
    builder = PromptBuilder(read_model_config(path))
    pieces = [placeholder(image.grid, image.counts, "<unk>", number) for number, image in enumerate(IMAGES)]
    for text in ("Read this.", "\nuser"):
        wanted = whole.encode(conversation("minicpmv4_0", "\n".join([*pieces, text]))).ids
        assert builder.build(text, IMAGES, PromptSettings(kind="image", use_image_id=True)) == wanted


def test_tokenizers_of_the_two_kinds_merge_and_prefix():
    """Otherwise the tests above would pass without the rules that they are about."""
    qwen, llama = member_tokenizer("minicpmv2_6"), member_tokenizer("minicpmv4_0")
    assert len(qwen.encode("\n\n").ids) == 1
    assert llama.encode("user").ids[0] == 1
    assert llama.encode("user").tokens[1].startswith("▁")


def test_a_newline_that_is_not_the_token_of_the_config_is_refused(tmp_path):
    config = read_model_config(write_member(tmp_path, "minicpmv4_7", newline_id=5))
    with pytest.raises(ConfigError, match="not the one token 5"):
        PromptBuilder(config)
