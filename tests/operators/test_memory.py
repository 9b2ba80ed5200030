"""Memory that is known before a model is loaded: bytes of released models, and of passes as PyTorch allocates them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, DynamicCache

from jobs.bench.vision_work import Scale, make_crops, make_network
from operators.minicpmv.config import read_model_config
from operators.minicpmv.encoder import VisionEncoder
from operators.minicpmv.family import FAMILIES
from operators.minicpmv.load import load_network
from operators.minicpmv.memory import (
    SPARE,
    Load,
    ModelMemory,
    cache_bytes_per_token,
    clip_load,
    estimate_memory,
    page_load,
    prefill_bytes_per_token,
    state_bytes,
    vision_bytes_per_patch,
)
from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.slicing import Size
from operators.minicpmv.tiny import write_tiny_model
from operators.minicpmv.visual import Visual
from tests.operators.peak_memory import peak_bytes

A4 = Size(2339, 1654)
FULL_HD = Size(1080, 1920)
CPU = torch.device("cpu")

LINEAR = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
RELEASED = {
    "minicpmv4_6": {
        "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 256, "full_attention_interval": 4, **LINEAR,
    },
    "minicpmv4_5": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128,
    },
    "minicpmv4_0": {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 128,
    },
    "minicpmv2_6": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}  # fmt: skip
"""Numbers of the text models in the published `config.json` files."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name in FAMILIES:
        made[name] = tmp_path_factory.mktemp(name)
        write_tiny_model(made[name], name)
    return made


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("minicpmv4_6", 12_288), ("minicpmv4_5", 147_456), ("minicpmv4_0", 32_768), ("minicpmv2_6", 57_344)],
)
def test_the_cache_of_a_released_model_is_the_published_one(name, wanted):
    assert cache_bytes_per_token(RELEASED[name], FAMILIES[name], 2) == wanted


def test_linear_layers_keep_a_state_and_others_none():
    text = RELEASED["minicpmv4_6"]
    recurrent, convolved = 18 * 16 * 128 * 128 * 4, 18 * 6144 * 4 * 2
    assert state_bytes(text, FAMILIES["minicpmv4_6"], 2) == recurrent + convolved
    listed = text | {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6}
    assert state_bytes(listed, FAMILIES["minicpmv4_7"], 2) == recurrent + convolved
    assert state_bytes(RELEASED["minicpmv4_5"], FAMILIES["minicpmv4_5"], 2) == 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_take_what_they_take_when_they_are_loaded(folders, name, dtype):
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    whole = load_network(folders[name], types[dtype], "sdpa").whole
    wanted = sum(weight.numel() * weight.element_size() for weight in whole.parameters())
    assert estimate_memory(read_model_config(folders[name]), dtype, 16_384).weights == wanted


def test_quantised_weights_take_what_their_file_says(folders, tmp_path):
    for path in folders["minicpmv4_6"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = estimate_memory(read_model_config(folders["minicpmv4_6"]), "bf16", 1)
    # The tiny file holds float32.
    assert estimate_memory(read_model_config(tmp_path), "bf16", 1).weights == 2 * plain.weights


def cached_bytes(cache):
    """Bytes of everything that a cache holds, by what kind of layer: keys and values, and states."""
    totals = {"tokens": 0, "state": 0}
    for layer in cache.layers:
        for name in ("keys", "values"):
            if torch.is_tensor(getattr(layer, name, None)):
                totals["tokens"] += getattr(layer, name).nbytes
        for name in ("conv_states", "recurrent_states"):
            held = getattr(layer, name, None)
            held = held.values() if isinstance(held, dict) else [held]
            totals["state"] += sum(tensor.nbytes for tensor in held if torch.is_tensor(tensor))
    return totals


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prefill_leaves_the_cache_that_was_estimated(folders, name):
    config = read_model_config(folders[name])
    settings = json.loads((folders[name] / "config.json").read_text())
    text = settings.get("text_config", settings)
    network = load_network(folders[name], torch.float32, "sdpa")
    with torch.inference_mode():
        cache = DynamicCache(config=network.text.config)
        network.text(inputs_embeds=torch.randn(3, 21, text["hidden_size"]), past_key_values=cache, use_cache=True)
    found = cached_bytes(cache)
    assert found["tokens"] == 3 * 21 * cache_bytes_per_token(text, config.family, 4)
    assert found["state"] == 3 * state_bytes(text, config.family, 4)


@pytest.mark.parametrize(
    ("name", "slices", "patches", "tokens"),
    [
        ("minicpmv4_6", 10, 11_200, 700),
        ("minicpmv4_7", 10, 11_200, 700),
        ("minicpm_ocr", 10, 9_880, 2_470),
        ("minicpmv4_5", 10, 10_260, 640),
        ("minicpmv4_0", 10, 10_260, 640),
        ("minicpmv2_6", 10, 10_260, 640),
    ],
)
def test_a_page_asks_for_the_published_number_of_tokens(folders, name, slices, patches, tokens):
    load = page_load(read_model_config(folders[name]), A4, "Read this page.", 100)
    assert (load.slices, load.patches, load.visual_tokens) == (slices, patches, tokens)
    assert load.prompt_tokens > load.visual_tokens + 2 * slices
    assert load.patches_of_largest <= 1120


@pytest.mark.parametrize(
    ("name", "slices", "patches", "tokens"),
    [
        ("minicpmv4_6", 30, 30 * 1056, 30 * 66),
        ("minicpm_ocr", 30, 30 * 1008, 30 * 252),
        ("minicpmv4_5", 90, 90 * 1032, 90 * 64),
        ("minicpmv2_6", 90, None, 90 * 64),
    ],
)
def test_a_clip_asks_for_the_frames_of_its_members_recipe(folders, name, slices, patches, tokens):
    load = clip_load(read_model_config(folders[name]), FULL_HD, 30.0, 30.0, "What happens?", 100)
    assert (load.slices, load.visual_tokens) == (slices, tokens)
    assert load.patches == patches or patches is None


def test_a_long_clip_of_packs_needs_the_largest_pack_at_once(folders):
    model = read_model_config(folders["minicpmv4_5"])
    load = clip_load(model, FULL_HD, 150.0, 30.0, "What happens?", 100)
    assert load.patches == 450 * 1032
    assert load.visual_tokens == 150 * 64
    assert load.patches_of_largest == 3 * 1032


def assert_estimated(measured, estimate):
    """What is allocated lies between half of an estimate and a tenth above it."""
    assert estimate / 2 <= measured <= 1.1 * estimate, f"measured {measured}, estimated {estimate}"


@pytest.mark.parametrize(("name", "levels"), [("minicpmv4_6", 2), ("minicpmv4_6", 1), ("minicpmv4_5", 0)])
@pytest.mark.parametrize("mixed", [True, False])
def test_the_vision_pass_allocates_what_was_estimated(folders, name, levels, mixed):
    model = read_model_config(folders[name])
    scale = Scale("small", 384, 1536, 2, 6, 0, 1024, 4)
    network = make_network(scale, name, CPU)
    groups = make_crops(scale, model.family)
    groups = groups if mixed else groups[:1] * 4
    encoder = VisionEncoder(network, model.family, 14, CPU, patches_per_call=65_536)
    with torch.inference_mode():
        encoder.encode_groups(groups, levels)
        measured = peak_bytes(lambda: encoder.encode_groups(groups, levels))
    patches = sum(group.patch_count(14) for group in groups)
    vision = {"hidden_size": scale.width, "intermediate_size": scale.inner}
    text = {"hidden_size": scale.text_width}
    assert_estimated(measured, patches * vision_bytes_per_patch(vision, text, model, 4))


SMALL = {"num_hidden_layers": 2, "vocab_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
TEXTS = {
    "minicpmv4_6": SMALL | {
        "hidden_size": 512, "intermediate_size": 1792, "head_dim": 128,
        "layer_types": ["linear_attention", "full_attention"],
        **(LINEAR | {"linear_num_key_heads": 8, "linear_num_value_heads": 8}),
    },
    "minicpmv4_5": SMALL | {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 64},
    "minicpmv4_0": SMALL | {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 64},
    "minicpmv2_6": SMALL | {"hidden_size": 512, "intermediate_size": 2706},
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(("rows", "tokens"), [(1, 768), (3, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prefill_allocates_what_was_estimated(name, rows, tokens, dtype):
    family, text = FAMILIES[name], TEXTS[name]
    config = CONFIG_MAPPING[family.backbone](**text)
    network = AutoModel.from_config(config, attn_implementation="sdpa").eval().to(dtype)
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    mask[0, : 50 if rows > 1 else 0] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)

    def prefill():
        embeddings = torch.zeros(rows, tokens, text["hidden_size"], dtype=dtype)
        return network(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=DynamicCache(config=config),
            use_cache=True,
        )

    size = dtype.itemsize
    with torch.inference_mode():
        prefill()
        measured = peak_bytes(prefill)
    kept = rows * (tokens * cache_bytes_per_token(text, family, size) + state_bytes(text, family, size))
    padded = tokens * (1 + size) if rows > 1 else 0
    widest = rows * tokens * (prefill_bytes_per_token(text, family, size) + padded)
    assert_estimated(measured, kept + widest)


def test_a_whole_prefill_of_a_tiny_model_needs_no_more_than_was_estimated(folders):
    folder = folders["minicpmv4_6"]
    model = MiniCPMV(folder, device=CPU, dtype=torch.float32, attention="sdpa")
    pixels = np.random.default_rng(0).integers(0, 256, 448 * 448 * 3, dtype=np.uint8)
    visual = Visual(pixels, (Size(448, 448),))
    prompt = [model.config.tokens.image_pad] * 64 + list(range(1, 60))
    memory = estimate_memory(model.config, "fp32", 16_384)
    load = Load(len(prompt), 64, 0, 1, 1024, 1024)

    def whole_prefill():
        model.open_slots(4, len(prompt))
        model.append_prompt(model.encode([prompt] * 4, [visual] * 4), range(4), 0, len(prompt))

    whole_prefill()
    model.close_slots()
    measured = peak_bytes(whole_prefill)
    assert measured <= 1.1 * (memory.needed(load, 4) - memory.weights)


def test_the_largest_batch_is_the_last_that_fits():
    memory = ModelMemory(
        weights=10**9,
        cache_per_token=12_288,
        state_per_record=19_759_104,
        vision_per_patch=24_176,
        patches_per_call=65_536,
        prefill_per_token=129_024,
        per_visual_token=2048,
        mask_per_pair=3,
        logits_per_record=2_480_940,
    )
    load = Load(1_400, 700, 2_048, 10, 11_200, 1_120)
    for free in (2 * 10**9, 24 * 10**9, 140 * 10**9):
        rows = memory.largest_batch(load, free)
        assert rows > 0
        assert memory.needed(load, rows) <= free * (1 - SPARE) < memory.needed(load, rows + 1)
    assert memory.largest_batch(load, 10**9) == 0


def test_an_estimate_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import operators.minicpmv.memory"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
