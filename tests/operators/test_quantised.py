"""Quantised folders: what they need, what is refused, and that they answer as the numbers they stand for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from operators.minicpmv.config import read_json
from operators.minicpmv.device import choose_dtype
from operators.minicpmv.load import load_network
from operators.minicpmv.quantised import fit_quantisation
from operators.minicpmv.requirements import QUANTISERS, activation_dtype, require_quantiser
from operators.minicpmv.weights import tensor_names
from schemas.errors import ConfigError
from tests.operators.loading import CPU, DTYPES, META, features_of, load, logits_of, refusal, rewrite
from tests.operators.members import change_json


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
