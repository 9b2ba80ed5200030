import json
import os
import subprocess
import sys

import huggingface_hub.constants
import pytest
import torch
from safetensors.numpy import load_file, save_file

from operators.minicpmv import weights
from operators.minicpmv.config import read_model_config
from operators.minicpmv.demo import write_demo_model
from operators.minicpmv.family import FAMILIES
from operators.minicpmv.weights import hash_weights, locate_model, model_folder, resolve_model
from schemas.errors import ConfigError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("PAGEREEL_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    write_demo_model(path)
    return path


def test_demo_is_made_once_and_marked(cache):
    first = resolve_model("demo")
    made_at = (first.folder / "model.safetensors").stat().st_mtime_ns
    again = resolve_model("demo")
    assert again == first
    assert first.weights_kind == "demo_random"
    assert first.folder.parent == cache
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == made_at
    assert [path.name for path in cache.iterdir() if path.name.startswith(".demo")] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_every_member_has_a_demo(cache, name):
    found = resolve_model(f"demo:{name}")
    assert (found.model_id, found.weights_kind) == (f"demo:{name}", "demo_random")
    assert found.folder == model_folder(f"demo:{name}")
    assert read_model_config(found.folder).family_name == name
    assert locate_model("/absent/here", found.model_id, found.revision, "demo_random") == found


def test_demo_alone_is_4_6(cache):
    assert resolve_model("demo").folder == resolve_model("demo:minicpmv4_6").folder
    assert resolve_model("demo").revision == resolve_model("demo:minicpmv4_6").revision
    assert len({resolve_model(f"demo:{name}").revision for name in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("name", ["demo:", "demo:minicpmv", "demo:MiniCPM-V 4.5"])
def test_a_demo_that_there_is_none_of_is_refused_with_those_there_are(cache, name):
    with pytest.raises(ConfigError, match="there is no demo model") as caught:
        resolve_model(name)
    assert all(f"demo:{known}" in str(caught.value) for known in FAMILIES)
    assert "\n" not in str(caught.value)
    assert not cache.exists()


def test_several_processes_may_make_it_at_once(cache):
    code = "from operators.minicpmv.weights import resolve_model; print(resolve_model('demo').revision)"
    makers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    revisions = {maker.communicate(timeout=120)[0] for maker in makers}
    assert [maker.returncode for maker in makers] == [0, 0, 0]
    assert len(revisions) == 1
    assert len([path for path in cache.iterdir() if "demo" in path.name]) == 1


def test_a_local_folder_is_hashed_over_its_bytes(folder, cache):
    before = resolve_model(str(folder))
    values = load_file(folder / "model.safetensors")
    values["model.language_model.norm.weight"][0] += 1
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    after = resolve_model(str(folder))
    assert before.revision != after.revision
    assert before.model_id == str(folder)


def test_a_hash_is_remembered_until_the_file_changes(folder, cache, monkeypatch):
    first = hash_weights(folder)
    read = []
    digest_file = weights.hashlib.file_digest
    monkeypatch.setattr(weights.hashlib, "file_digest", lambda *a: read.append(1) or digest_file(*a))
    assert hash_weights(folder) == first
    assert read == []
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert hash_weights(folder) == first
    assert len(read) == 1


def test_a_cache_that_cannot_be_written_costs_only_time(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PAGEREEL_CACHE", str(tmp_path / "file"))
    assert len(hash_weights(folder)) == 64
    with pytest.raises(ConfigError, match="cannot be written"):
        resolve_model("demo")


def test_unmarked_weights_are_local(folder, cache):
    config = json.loads((folder / "config.json").read_text())
    config.pop("pagereel_demo")
    (folder / "config.json").write_text(json.dumps(config))
    assert resolve_model(str(folder)).weights_kind == "local"


def test_what_is_neither_folder_nor_hub_id_is_refused(cache):
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        resolve_model("/nowhere/at/all")


def test_an_unreachable_hub_model_says_what_to_do(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ConfigError, match="--model demo") as caught:
        resolve_model("openbmb/MiniCPM-V-4.6")
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_loaded(folder, cache):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        resolve_model(str(folder))


def test_a_worker_takes_what_the_driver_found(folder, cache):
    found = locate_model(str(folder), "openbmb/MiniCPM-V-4.6", "abc", "released")
    assert (found.model_id, found.revision, found.weights_kind) == ("openbmb/MiniCPM-V-4.6", "abc", "released")
    plain = locate_model(str(folder), None, None, None)
    assert plain.revision == hash_weights(folder)
    assert plain.weights_kind == "demo_random"


def test_a_worker_without_the_folder_makes_the_demo_itself(cache):
    driver = resolve_model("demo")
    found = locate_model("/absent/here", "demo", driver.revision, "demo_random")
    assert found == driver
    with pytest.raises(ConfigError, match="revision"):
        locate_model("/absent/here", "demo", "another", "demo_random")
    with pytest.raises(ConfigError, match="does not exist"):
        locate_model("/absent/here", None, None, None)


@pytest.mark.parametrize(("kept", "message"), [(0.5, "is cut off"), (0.0, "is no safetensors file")])
def test_weights_that_broke_off_are_refused_before_anything_loads(tmp_path, kept, message):
    write_demo_model(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ConfigError, match=message):
        resolve_model(str(tmp_path))
