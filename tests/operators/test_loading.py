"""Folders of weights become networks: what is understood, what is refused and in which words."""

import json
import logging
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from operators.minicpmv.config import read_json
from operators.minicpmv.family import FAMILIES, find_family
from operators.minicpmv.network import network_config
from operators.minicpmv.requirements import require_layout
from operators.minicpmv.tiny import write_tiny_model
from operators.minicpmv.weights import HUB_FILES, HUB_SUBFOLDERS, hash_weights, resolve_model, tensor_names
from schemas.errors import ConfigError
from tests.operators.loading import DTYPES, features_of, load, logits_of, refusal, renamed, rewrite
from tests.operators.members import MEMBERS, MERGERS, change_json


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
