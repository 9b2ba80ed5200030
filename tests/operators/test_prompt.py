import json
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from operators.minicpmv.config import read_model_config
from operators.minicpmv.demo import write_demo_model
from operators.minicpmv.prompt import (
    ImageTokens,
    PromptBuilder,
    PromptSettings,
    image_tokens,
    visual_tokens,
)
from operators.minicpmv.slicing import Size, SliceConfig, plan_slices, slice_image
from schemas.errors import ConfigError, PrepareError, PromptTooLongError
from schemas.image import Grid
from tests.operators.reference46 import Reference

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


def test_config_reads_the_defaults_of_the_release(folder):
    config = read_model_config(folder)
    assert config.slicing == SliceConfig()
    assert config.use_image_id
    assert config.is_demo
    assert config.generation.max_new_tokens == 96
    assert config.stop_ids == tuple(sorted((config.tokens.text_end, config.tokens.turn_end)))
    assert config.max_positions == 32768


def test_another_model_type_is_refused_by_name(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    with pytest.raises(ConfigError, match=r"'llava' is not supported; supported: .*minicpmv4_6"):
        read_model_config(tmp_path)


def test_a_tokenizer_that_contradicts_the_config_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_token_id": 7}))
    with pytest.raises(ConfigError, match="image_token_id 7"):
        read_model_config(tmp_path)


def test_a_missing_or_broken_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="object"):
        read_model_config(tmp_path)


def test_cpu_modules_import_no_torch():
    code = (
        "import sys, operators.prepare, operators.minicpmv.weights; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def merging_folder(folder, path):
    """The model of `folder` with a tokenizer that merges bytes, newlines among them, as released ones do."""
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["user\nRead this page.\n\n\n Zahlen und assistant\n\n <table>\n\n"] * 50, trainer)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    tokenizer.add_tokens([AddedToken(one["content"], special=one["special"], normalized=False) for one in added])
    tokenizer.save(str(path / "tokenizer.json"))
    config = json.loads((path / "config.json").read_text())
    config |= {f"{kind}_token_id": tokenizer.token_to_id(f"<|{kind}_pad|>") for kind in ("image", "video")}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_tokenizer_that_merges_gives_the_same_prompts(folder, tmp_path):
    path = merging_folder(folder, tmp_path)
    merging, reference = PromptBuilder(read_model_config(path)), Reference(path, with_weights=False)
    assert len(merging.encode("\n\n")) == 1
    slicing = SliceConfig()
    images = pictures([(700, 1000)])
    processed, tokens = reference.process(images, slicing), our_tokens(images, slicing)
    for text in (*TEXTS, "\nstarts with a newline", "#\n\n# x\n\n"):
        for thinking in (True, False):
            wanted = reference.prompt_ids(text, processed, slicing, kind="image", use_image_id=True, thinking=thinking)
            settings = PromptSettings(kind="image", use_image_id=True, thinking=thinking)
            assert merging.build(text, tokens, settings) == wanted
