"""How many GPUs a worker takes, and how many workers that makes."""

import json
import shutil

import pytest

from operators.minicpmv.tiny import write_tiny_model
from pipeline.config import compose, planning_settings
from pipeline.reading import choose_reading
from pipeline.spec import HOW_ONLY, make_spec
from schemas.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return path


def spec_of(folder, **options):
    """A spec that names a cluster, so that GPUs are taken to be there."""
    return make_spec(
        {"task": "ocr", "inputs": ["a.pdf"], "output": "o", "model": str(folder), "address": "a"} | options
    )


def composed(spec, gpu_count):
    reading = choose_reading(spec)
    return compose(spec, reading, run_uri="-", run_id="r", worker_count=4, gpu_count=gpu_count)


@pytest.mark.parametrize(
    ("options", "gpu_count", "workers", "each", "shared_by"),
    [
        ({}, 8, 8, 1.0, 1),
        ({"gpus": 3}, 8, 3, 1.0, 1),
        ({"gpus_per_worker": 2}, 8, 4, 2.0, 2),
        ({"gpus_per_worker": 2}, 5, 2, 2.0, 2),
        ({"gpus_per_worker": 4, "gpus": 4}, 8, 1, 4.0, 4),
        ({"gpus_per_worker": 0.5}, 2, 4, 0.5, 1),
        ({"gpus_per_worker": 0.4}, 1, 2, 0.4, 1),
    ],
)
def test_gpus_are_shared_out_among_workers(folder, options, gpu_count, workers, each, shared_by):
    config = composed(spec_of(folder, **options), gpu_count)
    assert (config.gpu_workers, config.gpus_per_worker, config.generate.gpu_count) == (workers, each, shared_by)
    assert config.generate.gpu_share == min(1.0, each)


def test_more_gpus_than_there_are_is_refused(folder):
    with pytest.raises(ConfigError, match="a worker is to take 4 GPUs, and there are 2 to use"):
        composed(spec_of(folder, gpus_per_worker=4), 2)
    with pytest.raises(ConfigError, match="there are 1 to use"):
        composed(spec_of(folder, gpus_per_worker=2, gpus=1), 2)


def test_a_cpu_is_not_shared_out(folder):
    config = composed(spec_of(folder, device="cpu", gpus_per_worker=2), 0)
    assert (config.gpu_workers, config.gpus_per_worker, config.generate.gpu_count) == (1, 0.0, 1)


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.5, 65])
def test_neither_a_share_nor_a_whole_number_is_refused(folder, value):
    with pytest.raises(ConfigError, match="gpus_per_worker: "):
        spec_of(folder, gpus_per_worker=value)


def test_where_layers_are_does_not_change_what_a_row_is_named_by(folder):
    assert "gpus_per_worker" in HOW_ONLY
    settings = [
        planning_settings(spec, choose_reading(spec)) for spec in (spec_of(folder), spec_of(folder, gpus_per_worker=2))
    ]
    assert settings[0] == settings[1]


def test_auto_is_fp16_for_weights_that_run_in_nothing_else(folder, tmp_path):
    quantised = shutil.copytree(folder, tmp_path / "awq")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    assert composed(spec_of(quantised), 1).generate.dtype == "fp16"
    assert composed(spec_of(folder), 1).generate.dtype == "bf16"
    with pytest.raises(ConfigError, match="do not run in bf16"):
        choose_reading(spec_of(quantised, dtype="bf16"))
