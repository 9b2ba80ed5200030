"""Folders of weights become networks: what is understood, what is refused and in which words, and where layers go."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache

from operators.minicpmv.config import read_json
from operators.minicpmv.device import choose_device, choose_devices, choose_dtype
from operators.minicpmv.encoder import VisionEncoder
from operators.minicpmv.family import FAMILIES, find_family
from operators.minicpmv.load import load_network
from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.network import network_class, network_config, parts_of
from operators.minicpmv.quantised import fit_quantisation
from operators.minicpmv.requirements import QUANTISERS, activation_dtype, require_layout, require_quantiser
from operators.minicpmv.slicing import Size
from operators.minicpmv.spread import split_layers, spread_network
from operators.minicpmv.tiny import write_tiny_model
from operators.minicpmv.visual import Visual
from operators.minicpmv.weights import HUB_FILES, HUB_SUBFOLDERS, hash_weights, resolve_model, tensor_names
from schemas.errors import ConfigError
from tests.operators.members import MEMBERS, MERGERS, RESAMPLERS, change_json

CPU = torch.device("cpu")
META = torch.device("meta")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of each member, in one file of weights; not to be changed."""
    folders = {}
    for name in MEMBERS:
        folders[name] = tmp_path_factory.mktemp(name)
        write_tiny_model(folders[name], name, shards=1)
    return folders


@pytest.fixture
def copy_of(made, tmp_path):
    """Return a function that copies a member's folder, to be changed."""
    return lambda name: Path(shutil.copytree(made[name], tmp_path / name))


def load(folder, dtype=torch.float32):
    return load_network(folder, dtype, "sdpa")


def rewrite(folder, change):
    """Put `change` of its tensors into the one file of a folder."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def renamed(pairs):
    def change(values):
        names = {name: name for name in values}
        for old, new in pairs:
            names = {name: new + known.removeprefix(old) if known.startswith(old) else known
                     for name, known in names.items()}  # fmt: skip
        return {names[name]: value for name, value in values.items()}

    return change


def refusal(folder):
    """Return the one line in which a folder is refused."""
    with pytest.raises(ConfigError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message


def logits_of(network, dtype=torch.float32):
    ids = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        embedded = network.embed(ids).to(dtype)
        return network.logits(network.text(inputs_embeds=embedded).last_hidden_state).float()


def features_of(network, name):
    pixels = np.random.default_rng(0).integers(0, 256, 448 * 560 * 3, dtype=np.uint8)
    encoder = VisionEncoder(network, FAMILIES[name], 14, CPU)
    with torch.inference_mode():
        [found] = encoder.encode([Visual(pixels, (Size(448, 560),))], [0 if name in RESAMPLERS else 2])
    return found.float()


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_loads_every_tensor_of_its_files_and_says_nothing(made, name, caplog, capfd):
    with caplog.at_level(logging.WARNING):
        found = load(made[name]).whole.state_dict()
    assert [record.getMessage() for record in caplog.records] == []
    assert "".join(capfd.readouterr()).strip() == ""
    stored = load_file(made[name] / "model.safetensors")
    used = {name: value for name, value in stored.items() if not name.startswith(("apm.", "audio_", "tts."))}
    assert used.keys() == found.keys() - ({"lm_head.weight"} if name in MERGERS else set())
    assert all(torch.equal(found[name], value.float()) for name, value in used.items())


@pytest.mark.parametrize("name", ["minicpmv4_6", "minicpmv4_5", "minicpmo2_6"])
def test_shards_load_as_one_file_does(made, name, tmp_path):
    write_tiny_model(tmp_path, name, shards=3)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    one, many = (load(folder).whole.state_dict() for folder in (made[name], tmp_path))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)


@pytest.mark.parametrize("name", MEMBERS)
def test_what_no_file_holds_is_computed_as_the_text_model_would(made, name):
    """Rates of rotary positions are not stored; a loader that leaves them empty gives numbers that look like some."""
    settings = read_json(made[name] / "config.json")
    config = network_config(find_family(settings), settings).get_text_config()
    wanted = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).model.rotary_emb
    found = load(made[name], torch.bfloat16).text.rotary_emb
    assert torch.equal(found.inv_freq, wanted.inv_freq)
    assert found.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("name", ["minicpmv4_6", "minicpmv4_5"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_take_the_type_that_is_asked_for(made, name, dtype):
    network = load(made[name], DTYPES[dtype])
    assert {parameter.dtype for parameter in network.whole.parameters()} == {DTYPES[dtype]}
    assert features_of(network, name).isfinite().all()
    assert logits_of(network, DTYPES[dtype]).isfinite().all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_that_keep_their_type_stay_in_their_file(made):
    network = load(made["minicpmv4_5"], torch.bfloat16)
    path = str((made["minicpmv4_5"] / "model.safetensors").resolve())
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(path)]
    spans = [tuple(int(bound, 16) for bound in line[0].split("-")) for line in lines]
    starts = [parameter.data_ptr() for parameter in network.whole.parameters()]
    assert all(any(first <= start < last for first, last in spans) for start in starts)


@pytest.mark.parametrize("name", MERGERS)
def test_names_of_older_files_and_unused_tensors_are_understood(made, copy_of, name):
    older = renamed([("model.vision_tower.vit_merger.", "model.vit_merger."), ("model.vision_tower.", "model.vpm.")])
    folder = rewrite(copy_of(name), lambda values: older(values) | {"mtp.layers.0.weight": torch.zeros(3)})
    assert {name for name in tensor_names(folder) if name.startswith("model.vision_tower")} == set()
    wanted, found = (load(path).whole.state_dict() for path in (made[name], folder))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["minicpmv4_6", "minicpmv4_5"])
def test_a_tied_head_needs_no_tensor(copy_of, name):
    folder = copy_of(name)
    change_json(folder / "config.json", tie_word_embeddings=True)
    network = load(rewrite(folder, lambda values: {k: v for k, v in values.items() if "lm_head" not in k}))
    assert network.head.weight is network.embed.weight


@pytest.mark.parametrize(("name", "head"), [("minicpmv4_6", "lm_head.weight"), ("minicpmv4_5", "llm.lm_head.weight")])
def test_a_head_of_its_own_is_missed(copy_of, name, head):
    folder = copy_of(name)
    change_json(folder / "config.json", tie_word_embeddings=False)
    message = refusal(rewrite(folder, lambda values: {k: v for k, v in values.items() if "lm_head" not in k}))
    assert message.endswith(f"tensors do not match {FAMILIES[name].title}; 1 missing: {head}")


def test_all_that_does_not_match_is_named_at_once(tmp_path):
    write_tiny_model(tmp_path, "minicpmv4_5", shards=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    save_file(load_file(first) | {"llm.stranger.weight": torch.zeros(3)}, first, {"format": "pt"})
    values = load_file(second)
    values.pop("resampler.proj")
    save_file(values | {"resampler.query": torch.zeros(7, 256)}, second, {"format": "pt"})
    message = refusal(tmp_path)
    for part in ("1 missing: resampler.proj", "1 unexpected: llm.stranger.weight", "1 of another shape: resampler.q"):
        assert part in message


def test_a_list_of_many_tensors_ends_with_their_number(copy_of):
    folder = copy_of("minicpmv4_5")
    change_json(folder / "config.json", num_hidden_layers=4)
    message = refusal(folder)
    assert "22 missing: llm.model.layers.2.input_layernorm.weight, " in message
    assert message.endswith(" and 12 more")


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod."])
@pytest.mark.parametrize("name", ["minicpmv4_6", "minicpmv4_5"])
def test_names_that_a_wrapper_prefixed_are_told_by_the_prefix(copy_of, name, prefix):
    message = refusal(rewrite(copy_of(name), renamed([("", prefix)])))
    assert f"every tensor's name begins with '{prefix}'" in message


@pytest.mark.parametrize("name", ["minicpmv2_6", "minicpmv4_5"])
def test_speech_is_foreign_to_a_model_that_only_reads(made, copy_of, name):
    speech = {k: v for k, v in load_file(made["minicpmo2_6"] / "model.safetensors").items() if k.startswith("tts.")}
    assert "unexpected: tts.emb_text.weight, " in refusal(rewrite(copy_of(name), lambda values: values | speech))


@pytest.mark.parametrize("missing", [1, 2])
def test_an_index_that_names_a_missing_shard_is_refused_before_anything_loads(tmp_path, missing):
    write_tiny_model(tmp_path, "minicpmv4_5", shards=3)
    for path in sorted(tmp_path.glob("*.safetensors"))[:missing]:
        path.unlink()
    with pytest.raises(ConfigError, match=f"lacks {missing} of the 3 files of its index: model-00001-of-00003.safe"):
        resolve_model(str(tmp_path))


def test_a_shard_that_broke_off_is_refused_before_anything_loads(tmp_path):
    write_tiny_model(tmp_path, "minicpmv4_5", shards=2)
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors is cut off"):
        resolve_model(str(tmp_path))


def test_shards_without_an_index_are_refused(tmp_path):
    write_tiny_model(tmp_path, "minicpmv4_5", shards=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ConfigError, match="has no weight_map"):
        resolve_model(str(tmp_path))
    index.unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        resolve_model(str(tmp_path))


def test_files_that_are_not_loaded_do_not_change_the_revision(copy_of):
    folder = copy_of("minicpmv4_6")
    before = hash_weights(folder)
    save_file({"optimizer.state": torch.zeros(3)}, folder / "training.safetensors")
    assert hash_weights(folder) == before


def test_an_adapter_is_no_model(tmp_path, copy_of):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "openbmb/MiniCPM-V-4_5"}))
    save_file({"lora_A.weight": torch.zeros(3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"a LoRA adapter .*: merge it into its base model, openbmb/MiniCPM-V-4_5"):
        resolve_model(str(tmp_path))
    merged = copy_of("minicpmv4_5")
    (merged / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="merge it into its base model with"):
        load(merged)


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("minicpmv4_6", {"merger_times": 2}, "merger_times 2"),
        ("minicpmv4_7", {"merge_kernel_size": [4, 4]}, r"merge_kernel_size \[4, 4\]"),
        ("minicpmv4_6", {"merge_kernel_size": None}, "merge_kernel_size None"),
        ("minicpm_ocr", {"insert_layer_id": -1}, "insert_layer_id -1"),
        ("minicpmv4_6", {"insert_layer_id": 4}, "insert_layer_id 4"),
        ("minicpmv4_6", {"vision_config": {"window_kernel_size": [2, 4]}}, r"window_kernel_size \[2, 4\]"),
        ("minicpmv4_6", {"vision_config": "siglip"}, "no vision_config"),
        ("minicpmv4_5", {"query_num": 0}, "query_num 0"),
        ("minicpmv2_6", {"query_num": "64"}, "query_num '64'"),
        ("minicpmv4_0", {"hidden_size": 770}, "hidden_size 770"),
        ("minicpmv4_5", {"vision_config": None}, "no vision_config"),
    ],
)
def test_an_architecture_that_the_batched_pass_does_not_compute_is_refused(copy_of, name, changes, found):
    folder = copy_of(name)
    change_json(folder / "config.json", **changes)
    for look in (lambda: resolve_model(str(folder)), lambda: load(folder)):
        with pytest.raises(ConfigError, match=found) as caught:
            look()
        assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize("name", MEMBERS)
def test_the_released_numbers_are_supported(name, tmp_path):
    own = {
        "minicpmv4_5": {"hidden_size": 4096, "batch_3d_resampler": True},
        "minicpmv4_0": {"hidden_size": 2560},
        "minicpmv2_6": {"hidden_size": 3584, "batch_3d_resampler": False},
        "minicpmo2_6": {"hidden_size": 3584},
    }.get(name, {"insert_layer_id": 6})
    require_layout({"vision_config": {"num_hidden_layers": 27}} | own, FAMILIES[name], tmp_path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("minicpmv4_6", {"text_config": {"hidden_size": "wide"}}),
        ("minicpmv4_5", {"num_attention_heads": None}),
        ("minicpmv4_5", {"hidden_act": "none of these"}),
    ],
)
def test_numbers_that_no_model_has_are_refused_in_one_line(copy_of, name, changes):
    folder = copy_of(name)
    change_json(folder / "config.json", **changes)
    assert "cannot be loaded: " in refusal(folder)


def test_a_hub_model_is_the_commit_that_its_revision_means(made, tmp_path, monkeypatch):
    """In the layout of the hub's own cache, with no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    held = tmp_path / "models--openbmb--MiniCPM-V-4.6"
    (held / "refs").mkdir(parents=True)
    (held / "refs" / "main").write_text(commit)
    shutil.copytree(made["minicpmv4_6"], held / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = resolve_model("openbmb/MiniCPM-V-4.6", "main")
    assert (found.revision, found.weights_kind) == (commit, "released")
    assert resolve_model("openbmb/MiniCPM-V-4.6", commit) == found
    assert found.folder == held / "snapshots" / commit


def test_only_what_is_read_is_fetched():
    files = [
        "config.json", "tokenizer.json", "chat_template.jinja", "model-00001-of-00002.safetensors",
        "model.safetensors.index.json", "pytorch_model.bin", "modeling_minicpmv.py", "ggml-model-Q4_K_M.gguf",
        "assets/demo.wav", "onnx/model.safetensors", "checkpoint-100/trainer_state.json", "README.md",
    ]  # fmt: skip
    fetched = filter_repo_objects(files, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_SUBFOLDERS))
    assert list(fetched) == files[:5]


@pytest.mark.parametrize("method", QUANTISERS)
def test_a_quantised_folder_names_the_packages_it_lacks(tmp_path, monkeypatch, method):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    packages = " ".join(QUANTISERS[method].packages)
    with pytest.raises(ConfigError, match=f"{QUANTISERS[method].title} weights need .*: pip install {packages}"):
        require_quantiser(method, tmp_path)
    require_quantiser(None, tmp_path)


@pytest.mark.parametrize("method", ["hqq", "unnamed"])
def test_other_ways_to_quantise_are_refused_with_those_there_are(copy_of, method):
    folder = copy_of("minicpmv4_5")
    change_json(folder / "config.json", quantization_config={"quant_method": method})
    assert refusal(folder).endswith(f"{method!r} are not supported; supported: bitsandbytes, AWQ, GPTQ")


def test_the_driver_refuses_a_quantised_folder_without_torch(copy_of):
    folder = copy_of("minicpmv4_5")
    change_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    code = (
        "import sys; from importlib import util; from schemas.errors import ConfigError\n"
        "from pipeline.reading import choose_reading; from pipeline.spec import make_spec\n"
        "util.find_spec = lambda name: None\n"
        f"spec = make_spec(dict(task='ocr', inputs=['a.pdf'], output='o', model={str(folder)!r}, device='cpu'))\n"
        "try: choose_reading(spec)\n"
        "except ConfigError as error: print(error)\n"
        "print(sorted({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == [
        f"{folder}: its GPTQ weights need accelerate and optimum and gptqmodel: "
        "pip install accelerate optimum gptqmodel",
        "[]",
    ]


@pytest.mark.parametrize(
    ("method", "wanted", "on_gpu", "found"),
    [
        (None, "auto", True, "bf16"), (None, "auto", False, "fp32"), (None, "fp16", True, "fp16"),
        (None, "fp16", False, "fp16"), ("bitsandbytes", "auto", True, "bf16"), ("gptq", "auto", True, "bf16"),
        ("awq", "auto", True, "fp16"), ("awq", "fp16", True, "fp16"), ("awq", "auto", False, "fp32"),
        ("awq", "bf16", False, "bf16"),
    ],
)  # fmt: skip
def test_auto_is_a_type_that_the_weights_run_in(method, wanted, on_gpu, found):
    assert activation_dtype(method, wanted, on_gpu=on_gpu) == found
    if not on_gpu:
        assert choose_dtype(wanted, CPU, method) == DTYPES[found]


def test_a_type_that_the_kernels_do_not_take_is_refused():
    with pytest.raises(ConfigError, match="AWQ weights do not run in bf16 on a GPU: use --dtype fp16 or auto"):
        activation_dtype("awq", "bf16", on_gpu=True)


def test_which_layers_are_quantised_is_read_off_the_files():
    names = [
        "vpm.encoder.layers.0.mlp.fc1.weight", "resampler.kv_proj.weight", "resampler.query", "llm.lm_head.weight",
        "llm.model.layers.0.mlp.up_proj.qweight", "llm.model.layers.0.mlp.up_proj.scales",
        "llm.model.layers.1.mlp.up_proj.weight",
    ]  # fmt: skip
    plain = ["llm.lm_head", "llm.model.layers.1.mlp.up_proj", "resampler.kv_proj", "vpm.encoder.layers.0.mlp.fc1"]
    awq = fit_quantisation("awq", {"bits": 4, "modules_to_not_convert": None}, names, "llm.lm_head", "float16")
    assert awq == {"bits": 4, "modules_to_not_convert": plain}
    gptq = fit_quantisation("gptq", {"bits": 4}, names, "llm.lm_head", "float16")
    assert gptq["block_name_to_quantize"] == "llm.model.layers"
    assert gptq["modules_in_block_to_quantize"] == [["llm.model.layers.0.mlp.up_proj"]]
    four = [name.replace(".qweight", ".weight.absmax") for name in names] + ["llm.model.layers.0.mlp.up_proj.weight"]
    bits = fit_quantisation("bitsandbytes", {"load_in_4bit": True}, four, "llm.lm_head", "bfloat16")
    assert bits == {"load_in_4bit": True, "llm_int8_skip_modules": plain, "bnb_4bit_compute_dtype": "bfloat16"}


def test_gptq_outside_the_text_model_is_refused():
    names = ["llm.model.layers.0.mlp.up_proj.qweight", "vpm.encoder.layers.0.mlp.fc1.qweight"]
    with pytest.raises(ConfigError, match="layers of the text model alone"):
        fit_quantisation("gptq", {}, names, "llm.lm_head", "float16")


@pytest.fixture(scope="module", params=["minicpmv4_6", "minicpmv4_5", "minicpmo2_6"])
def in_four_bits(request, made, tmp_path_factory):
    """A member's name, its folder in four bits, and one with the same numbers plain."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from tests.operators.four_bits import write_four_bits

    packed, plain = (tmp_path_factory.mktemp(f"{request.param}-{kind}") for kind in ("nf4", "plain"))
    write_four_bits(made[request.param], packed, plain)
    return request.param, packed, plain


@pytest.mark.parametrize("dtype", DTYPES)
def test_four_bits_answer_as_the_numbers_they_stand_for(in_four_bits, dtype):
    """Bit for bit: on a CPU a layer unpacks its weights and multiplies as a plain one does."""
    name, packed, plain = in_four_bits
    networks = [load(folder, DTYPES[dtype]) for folder in (packed, plain)]
    counts = [sum(type(m).__name__ == "Linear4bit" for m in network.whole.modules()) for network in networks]
    assert counts[0] > 20
    assert counts[1] == 0
    assert torch.equal(*[logits_of(network, DTYPES[dtype]) for network in networks])
    assert torch.equal(*[features_of(network, name) for network in networks])


@pytest.mark.parametrize("skipped", [None, ["lm_head"], ["nothing.of.the.kind"]])
def test_a_list_of_plain_layers_that_says_otherwise_does_no_harm(in_four_bits, tmp_path, skipped):
    name, packed, plain = in_four_bits
    folder = Path(shutil.copytree(packed, tmp_path / "other"))
    config = read_json(folder / "config.json")
    change_json(
        folder / "config.json", quantization_config=config["quantization_config"] | {"llm_int8_skip_modules": skipped}
    )
    assert torch.equal(features_of(load(folder), name), features_of(load(plain), name))


def test_a_missing_tensor_of_a_quantised_folder_is_named(in_four_bits, tmp_path):
    _, packed, _ = in_four_bits
    folder = Path(shutil.copytree(packed, tmp_path / "other"))
    removed = next(name for name in tensor_names(folder) if name.endswith(".post_layernorm.weight"))
    rewrite(folder, lambda values: {k: v for k, v in values.items() if k != removed})
    assert f"1 missing: {removed}" in refusal(folder)


def test_quantised_weights_are_not_spread(in_four_bits):
    _, packed, _ = in_four_bits
    with pytest.raises(ConfigError, match="bitsandbytes are not spread over 2 GPUs"):
        load_network(packed, torch.float32, "sdpa", (CPU, META))


def test_the_layers_of_a_model_are_split_by_bytes():
    assert split_layers([10] * 6, 0, 0, 2) == [0, 0, 0, 1, 1, 1]
    assert split_layers([10] * 6, 0, 0, 3) == [0, 0, 1, 1, 2, 2]
    # What the first and the last hold anyway counts: 40 + 20 against 40 + 20.
    assert split_layers([10] * 6, 40, 20, 2) == [0, 0, 1, 1, 1, 1]
    assert split_layers([10] * 6, 500, 20, 2) == [1] * 6
    # MiniCPM-V 4.5 in bf16, in MB: 2.2 GB of tower, resampler and embeddings, 36 layers of 386, a head of 1243.
    assert split_layers([386] * 36, 2230, 1243, 2) == [0] * 17 + [1] * 19
    assert split_layers([386] * 36, 2230, 1243, 4) == [0] * 5 + [1] * 12 + [2] * 11 + [3] * 8


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_layer_has_one_device_and_they_ascend(count):
    sizes = [7, 1, 9, 3, 3, 8, 2, 6]
    places = split_layers(sizes, 5, 4, count)
    assert places == sorted(places)
    assert set(places) <= set(range(count))
    held = [sum(size for size, place in zip(sizes, places, strict=True) if place == own) for own in range(count)]
    held[0] += 5
    held[-1] += 4
    assert max(held) <= sum(held) / count + 2 * max(sizes)


def deeper(made, name, layer_count=6):
    """Return a network of random weights whose text model is large beside its tower."""
    settings = json.loads((made[name] / "config.json").read_text())
    text = settings["text_config"] if name in MERGERS else settings
    text |= {"num_hidden_layers": layer_count, "intermediate_size": 2048}
    text.pop("layer_types", None)
    family = find_family(settings)
    torch.manual_seed(0)
    whole = network_class(family)(network_config(family, settings)).eval()
    whole.tie_weights()
    return parts_of(whole, family)


def owners(value):
    """Yield the device of every tensor in the arguments of a call."""
    if isinstance(value, torch.Tensor):
        yield value.device
    elif isinstance(value, tuple):
        for part in value:
            yield from owners(part)


@pytest.mark.parametrize("name", ["minicpmv4_5", "minicpmv4_0", "minicpmv2_6", "minicpmv4_6"])
def test_tensors_follow_the_layers_to_another_device(made, name):
    """The second device is one that only knows shapes: nothing here has two that compute."""
    network = deeper(made, name)
    spread_network(network, (CPU, META))
    places = [next(layer.parameters()).device for layer in network.text.layers]
    assert places == sorted(places, key=str)
    assert set(places) == {CPU, META}
    held = {key: value.device for key, value in network.whole.named_parameters()}
    assert {device for key, device in held.items() if ".layers." not in key.partition("language_model")[2]} <= {
        CPU,
        META,
    }
    seen = []

    def check(module: nn.Module, args, named):
        own = {parameter.device for parameter in module.parameters()}
        found = {device for value in (*args, *named.values()) for device in owners(value)}
        seen.append(found)
        assert not own or found <= own, f"{type(module).__name__} on {own} is called with tensors on {found}"

    for part in (*network.text.layers.modules(), network.text.norm):
        part.register_forward_pre_hook(check, with_kwargs=True)
    ids = torch.zeros(2, 10, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = DynamicCache(config=network.text.config)
    with torch.inference_mode():
        for step in (ids, ids[:, :1]):
            hidden = network.text(
                inputs_embeds=network.embed(step),
                attention_mask=mask,
                position_ids=mask.cumsum(1)[:, -step.shape[1] :] - 1,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            mask = torch.cat([mask, torch.ones_like(ids[:, :1])], dim=1)
    assert hidden.device == META
    assert {META} in seen
    assert {CPU} in seen
    with torch.inference_mode():
        if name in RESAMPLERS:
            assert network.logits(hidden).device == META
            return
        # A tied head stays where the embeddings are, and asks for what this device does not have.
        assert network.head.weight.device == CPU
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            network.logits(hidden)


@pytest.mark.parametrize("name", ["minicpmv4_5", "minicpmv4_6"])
def test_a_spread_model_answers_as_one_in_one_piece(made, name):
    whole, parts = (
        MiniCPMV(made[name], device=CPU, dtype=torch.float32, attention="sdpa", more_devices=more)
        for more in ((), (CPU, CPU))
    )
    assert torch.equal(logits_of(whole.network), logits_of(parts.network))
    assert torch.equal(features_of(whole.network, name), features_of(parts.network, name))


def test_a_last_device_without_layers_gets_what_the_others_made(made):
    network = deeper(made, "minicpmv4_5", layer_count=1)
    spread_network(network, (CPU, CPU, META))
    assert {parameter.device for parameter in network.text.layers.parameters()} == {CPU}
    with torch.inference_mode():
        hidden = network.text(inputs_embeds=network.embed(torch.zeros(1, 5, dtype=torch.int64))).last_hidden_state
    assert hidden.device == META


def test_nothing_that_crossed_is_kept_after_a_pass(made):
    network = deeper(made, "minicpmv4_5")
    spread_network(network, (CPU, META))
    brought = [
        hook.brought
        for layer in network.text.layers
        for hook in layer._forward_pre_hooks.values()
        if hasattr(hook, "brought")
    ]
    assert len(brought) == len(network.text.layers)
    counts = []

    def run():
        with torch.inference_mode():
            network.text(inputs_embeds=network.embed(torch.zeros(1, 5, dtype=torch.int64)))

    def break_off(*_):
        counts.append(len(brought[-1]))
        raise MemoryError

    handle = network.text.layers[-1].register_forward_pre_hook(break_off)
    for _ in range(2):
        with pytest.raises(MemoryError):
            run()
    # Hidden states, positions, cosines and sines: what the first pass left behind is gone in the second.
    assert counts == [4, 4]
    handle.remove()
    run()
    assert all(kept == {} for kept in brought)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_cpu_is_one_device_and_a_gpu_that_is_not_here_is_refused():
    assert choose_devices("auto", 4) == (CPU,)
    assert choose_devices("cpu", 1) == (choose_device("cpu"),)
    with pytest.raises(ConfigError, match="finds none"):
        choose_devices("cuda", 2)
