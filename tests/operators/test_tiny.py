import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MiniCPMOcrForConditionalGeneration,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_7ForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from operators.engine.engine import Engine
from operators.engine.request import Request, SamplingParams
from operators.engine.scheduler import SchedulerConfig
from operators.minicpmv.config import read_model_config
from operators.minicpmv.family import FAMILIES
from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.prompt import PromptBuilder, PromptSettings, image_tokens
from operators.minicpmv.slicing import Size, slice_image
from operators.minicpmv.tiny import write_tiny_model
from operators.minicpmv.tiny.checkpoint import stored_bytes
from operators.minicpmv.tiny.merger import fill
from operators.minicpmv.tiny.write import make_tiny_model
from operators.minicpmv.visual import Visual
from schemas.image import Grid

MERGERS = {
    "minicpmv4_6": MiniCPMV4_6ForConditionalGeneration,
    "minicpmv4_7": MiniCPMV4_7ForConditionalGeneration,
    "minicpm_ocr": MiniCPMOcrForConditionalGeneration,
}
RESAMPLERS = [name for name, family in FAMILIES.items() if family.connector == "resampler"]

VISION_LAYERS = 4
TEXT_LAYERS = {name: 4 if name in MERGERS else 2 for name in FAMILIES}
FULL_ATTENTION_LAYERS = (3,)

COMMON_FILES = {
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
BYTE_LEVEL_FILES = {"vocab.json", "merges.txt", "added_tokens.json"}
SHARDED = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
FILES = {
    "minicpmv4_6": COMMON_FILES | {"chat_template.jinja", "model.safetensors"},
    "minicpmv4_7": COMMON_FILES | {"chat_template.jinja", "model.safetensors"},
    "minicpm_ocr": COMMON_FILES | {"chat_template.jinja", "model.safetensors"},
    "minicpmv4_5": COMMON_FILES | BYTE_LEVEL_FILES | SHARDED,
    "minicpmv4_0": COMMON_FILES | {"model.safetensors"},
    "minicpmv2_6": COMMON_FILES | BYTE_LEVEL_FILES | {"model.safetensors"},
    "minicpmo2_6": COMMON_FILES | BYTE_LEVEL_FILES | {"model.safetensors"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("tiny")
    for name in FAMILIES:
        (base / name).mkdir()
        write_tiny_model(base / name, name)
    return {name: base / name for name in FAMILIES}


@pytest.fixture(scope="module")
def models(folders):
    cpu = torch.device("cpu")
    return {
        name: MiniCPMV(folder, device=cpu, dtype=torch.float32, attention="sdpa") for name, folder in folders.items()
    }


def load_tensors(folder):
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def read(folder, name):
    return json.loads((folder / name).read_text())


def both(*names):
    """Weight and bias of each."""
    return {f"{name}.{part}" for name in names for part in ("weight", "bias")}


def tower_names(tower):
    names = both(f"{tower}.embeddings.patch_embedding", f"{tower}.post_layernorm")
    names.add(f"{tower}.embeddings.position_embedding.weight")
    for index in range(VISION_LAYERS):
        layer = f"{tower}.encoder.layers.{index}"
        names |= both(*(f"{layer}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")))
        names |= both(f"{layer}.layer_norm1", f"{layer}.layer_norm2", f"{layer}.mlp.fc1", f"{layer}.mlp.fc2")
    return names


def text_layer_names(layer):
    parts = ("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return {f"{layer}.{part}.weight" for part in parts}


def merger_names():
    merger = "model.vision_tower.vit_merger"
    names = tower_names("model.vision_tower")
    names |= both(*(f"{merger}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")))
    names |= both(*(f"{merger}.{part}" for part in ("layer_norm1", "pre_norm", "linear_1", "linear_2")))
    names |= both(*(f"model.merger.mlp.0.{part}" for part in ("pre_norm", "linear_1", "linear_2")))
    names |= {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"}
    for index in range(TEXT_LAYERS["minicpmv4_6"]):
        layer = f"model.language_model.layers.{index}"
        names |= text_layer_names(layer)
        if index in FULL_ATTENTION_LAYERS:
            parts = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
            names |= {f"{layer}.self_attn.{part}.weight" for part in parts}
        else:
            parts = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "conv1d", "norm", "out_proj")
            names |= {f"{layer}.linear_attn.{part}.weight" for part in parts}
            names |= {f"{layer}.linear_attn.A_log", f"{layer}.linear_attn.dt_bias"}
    return names


def resampler_names(name):
    names = tower_names("vpm") | {"llm.model.embed_tokens.weight", "llm.lm_head.weight", "llm.model.norm.weight"}
    for index in range(TEXT_LAYERS[name]):
        layer = f"llm.model.layers.{index}"
        names |= text_layer_names(layer)
        names |= {f"{layer}.self_attn.{part}_proj.weight" for part in "qkvo"}
        if name == "minicpmv4_5":
            names |= {f"{layer}.self_attn.{part}_norm.weight" for part in "qk"}
        if name in ("minicpmv2_6", "minicpmo2_6"):
            names |= {f"{layer}.self_attn.{part}_proj.bias" for part in "qkv"}
    names |= {"resampler.query", "resampler.proj", "resampler.kv_proj.weight"}
    names |= {"resampler.attn.in_proj_weight", "resampler.attn.in_proj_bias"}
    return names | both(*(f"resampler.{part}" for part in ("attn.out_proj", "ln_q", "ln_kv", "ln_post")))


def test_weights_depend_on_their_names_alone():
    first = fill("model.merger.mlp.0.linear_1.weight", (3, 4))
    np.testing.assert_array_equal(first, fill("model.merger.mlp.0.linear_1.weight", (3, 4)))
    np.testing.assert_allclose(first[0], [0.7982896, -0.27432764, 1.215633, 0.28543445], rtol=1e-6)
    assert not np.array_equal(first, fill("model.merger.mlp.0.linear_2.weight", (3, 4)))


def test_4_6_is_the_model_that_it_always_was(folders):
    weights = load_tensors(folders["minicpmv4_6"])
    assert sum(value.numel() for value in weights.values()) == 705_960
    assert weights["model.language_model.embed_tokens.weight"].shape == (269, 64)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_makers_write_equal_files(folders, name, tmp_path):
    write_tiny_model(tmp_path, name)
    for path in folders[name].iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", FAMILIES)
def test_files_are_those_of_the_release_and_small(folders, name):
    assert {path.name for path in folders[name].iterdir()} == FILES[name]
    assert sum(path.stat().st_size for path in folders[name].iterdir()) < 3_000_000


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_have_the_published_names(folders, name):
    found = {key for key in load_tensors(folders[name]) if not key.startswith(("apm.", "audio_", "tts."))}
    assert found == (merger_names() if name in MERGERS else resampler_names(name))


@pytest.mark.parametrize("name", MERGERS)
def test_transformers_loads_every_tensor_of_a_member_with_a_merger(folders, name):
    network, report = MERGERS[name].from_pretrained(folders[name], dtype=torch.float32, output_loading_info=True)
    assert {kind: entries for kind, entries in report.items() if entries} == {}
    assert network.config.model_type == name
    assert network.lm_head.weight.data_ptr() == network.model.language_model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("name", RESAMPLERS)
def test_transformers_knows_the_text_model_and_the_tower_of_a_member_with_a_resampler(folders, name):
    settings = read(folders[name], "config.json")
    weights = load_tensors(folders[name])
    of_text = {key: value for key, value in settings.items() if key not in ("model_type", "vision_config")}
    config = CONFIG_MAPPING[FAMILIES[name].backbone](**of_text)
    text = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    text.load_state_dict({key[4:]: value for key, value in weights.items() if key.startswith("llm.")}, strict=True)
    vision = {key: value for key, value in settings["vision_config"].items() if key != "model_type"}
    tower = SiglipVisionModel(SiglipVisionConfig(**vision, vision_use_head=False))
    tower.load_state_dict({key[4:]: value for key, value in weights.items() if key.startswith("vpm.")}, strict=True)


@pytest.mark.parametrize("name", RESAMPLERS)
def test_the_resampler_has_more_heads_than_one(folders, name):
    weights = load_tensors(folders[name])
    width = read(folders[name], "config.json")["hidden_size"]
    assert width // 128 > 1
    assert weights["resampler.query"].shape == (read(folders[name], "config.json")["query_num"], width)
    assert weights["resampler.attn.in_proj_weight"].shape == (3 * width, width)
    assert weights["resampler.proj"].shape == (width, width)


def test_speech_tensors_are_all_that_o_2_6_adds_to_2_6(folders):
    plain, spoken = load_tensors(folders["minicpmv2_6"]), load_tensors(folders["minicpmo2_6"])
    added = spoken.keys() - plain.keys()
    assert {re.match(r"[a-z]+", name).group() for name in added} == {"apm", "audio", "tts"}
    assert all(torch.equal(spoken[name], value) for name, value in plain.items())


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_hold_the_same_tensors_and_the_index_says_where(folders, tmp_path, shards):
    write_tiny_model(tmp_path, "minicpmv4_5", shards=shards)
    wanted, found = load_tensors(folders["minicpmv4_5"]), load_tensors(tmp_path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == shards
    if shards > 1:
        index = read(tmp_path, "model.safetensors.index.json")
        assert index["weight_map"] == {name: path.name for path in paths for name in load_file(path)}
        assert index["metadata"]["total_size"] == sum(value.numel() * 2 for value in wanted.values())
        assert max(path.stat().st_size for path in paths) < 2 * min(path.stat().st_size for path in paths)


def test_float32_files_equal_those_of_the_library(folders, tmp_path):
    save_file(make_tiny_model("minicpmv4_6").weights, tmp_path / "library.safetensors", {"format": "pt"})
    assert (tmp_path / "library.safetensors").read_bytes() == (
        folders["minicpmv4_6"] / "model.safetensors"
    ).read_bytes()


def test_bfloat16_is_rounded_as_torch_rounds_it():
    halfway = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, -0.0, 1e-40], np.float32)
    values = np.concatenate([halfway, np.random.default_rng(0).standard_normal(1000, dtype=np.float32)])
    found = torch.frombuffer(bytearray(stored_bytes(values, "BF16")), dtype=torch.bfloat16)
    assert torch.equal(found, torch.from_numpy(values).bfloat16())
    assert np.frombuffer(stored_bytes(values, "F32"), np.float32).tobytes() == values.tobytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_our_configuration_reads_it(folders, name):
    config = read_model_config(folders[name])
    assert config.family_name == name
    assert config.is_demo
    assert config.vocabulary_size == Tokenizer.from_file(str(folders[name] / "tokenizer.json")).get_vocab_size()
    assert set(config.stop_ids) == {config.tokens.turn_end, config.tokens.text_end}
    assert config.slicing.query_count == (64 if name in RESAMPLERS else None)
    assert config.slicing.downsample_mode == ("4x" if name == "minicpm_ocr" else "16x")
    assert config.generation.max_new_tokens == 192


def test_the_placeholder_is_an_ordinary_token_of_a_qwen_and_the_first_of_a_llama(folders):
    for name in ("minicpmv4_5", "minicpmv2_6", "minicpmo2_6"):
        assert read(folders[name], "vocab.json")["<unk>"] == read_model_config(folders[name]).tokens.image_pad
        assert "<unk>" not in read(folders[name], "added_tokens.json")
    tokens = read_model_config(folders["minicpmv4_0"]).tokens
    assert (tokens.image_pad, tokens.video_pad, tokens.text_end) == (0, 0, 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_text_survives_its_tokens(folders, name):
    tokenizer = Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
    text = "Ümläut 表 !\n\n  <x> 🙂"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", FAMILIES)
def test_the_chat_template_builds_the_prompt_that_ours_is(folders, name):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders[name])
    builder = PromptBuilder(read_model_config(folders[name]))
    for thinking in (False, True) if FAMILIES[name].thinks else (False,):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is it?"}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        settings = PromptSettings(kind="image", use_image_id=True, thinking=thinking)
        assert builder.build("What is it?", [], settings) == tokenizer(chat).input_ids


def picture(height_px, width_px, seed):
    cells = np.random.default_rng(seed).integers(0, 256, (height_px // 16 + 1, width_px // 16 + 1, 3), dtype=np.uint8)
    return np.ascontiguousarray(cells.repeat(16, 0).repeat(16, 1)[:height_px, :width_px])


def request_of(model, image, text):
    sliced = slice_image(image, model.config.slicing)
    shapes = tuple(Size(*piece.shape[:2]) for piece in sliced.slices)
    tokens = image_tokens(shapes, [sliced.grid], model.config.slicing)
    ids = PromptBuilder(model.config).build(text, tokens, PromptSettings(kind="image", use_image_id=True))
    pixels = np.concatenate([piece.reshape(-1) for piece in sliced.slices])
    return Request(tuple(ids), SamplingParams(max_new_tokens=96), Visual(pixels, shapes))


def clip_of(model, times):
    """Four frames in two packs, with these temporal ids."""
    shape = Size(308, 448)
    pixels = np.concatenate([picture(*shape, seed).reshape(-1) for seed in range(4)])
    tokens = image_tokens([shape] * 4, [Grid(0, 0)] * 2, model.config.slicing, [2, 2])
    ids = PromptBuilder(model.config).build("What happens?", tokens, PromptSettings(kind="video", use_image_id=False))
    return Request(tuple(ids), SamplingParams(max_new_tokens=40), Visual(pixels, (shape,) * 4, times))


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_text_that_depends_on_pictures_and_ends(models, name):
    model = models[name]
    requests = [
        request_of(model, picture(height_px, width_px, seed), text)
        for height_px, width_px in ((448, 448), (300, 220), (520, 700))
        for seed in (1, 2)
        for text in ("Read this page.", "What is it?")
    ]
    answers = Engine(model, SchedulerConfig(slot_count=12)).generate(requests)
    assert len({answer.token_ids for answer in answers}) == len(answers)
    assert sum(answer.finish_reason == "stop" for answer in answers) >= 3
    assert len({answer.output_tokens for answer in answers}) >= 4
    assert np.mean([len(set(answer.token_ids)) / len(answer.token_ids) for answer in answers]) > 0.2
    text = "".join(PromptBuilder(model.config).decode(answer.token_ids) for answer in answers)
    assert sum(" " <= letter <= "~" for letter in text) > 0.95 * len(text)


def test_temporal_ids_change_an_answer_of_4_5(models):
    model = models["minicpmv4_5"]
    requests = [clip_of(model, times) for times in (((0, 2), (4, 6)), ((0, 20), (40, 60)), ((-1, -1), (-1, -1)))]
    answers = Engine(model, SchedulerConfig(slot_count=3)).generate(requests)
    assert len({answer.token_ids for answer in answers}) == len(requests)


def test_places_on_the_canvas_change_an_answer_of_4_7(models):
    image = picture(700, 1000, 1)
    answers = []
    for name in ("minicpmv4_6", "minicpmv4_7"):
        engine = Engine(models[name], SchedulerConfig(slot_count=1))
        answers += engine.generate([request_of(models[name], image, "Read this page.")])
    assert answers[0].token_ids != answers[1].token_ids
