"""The benchmark of the vision pass: what it needs, what it prints, and that it counts and compares rightly."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jobs.bench import vision
from jobs.bench.vision_work import SCALES, make_crops, make_packs, pass_flops, resampler_flops
from operators.minicpmv.encoder import Group
from operators.minicpmv.family import FAMILIES

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

ABSENT = ("ray", "pymupdf", "pymupdf4llm", "decord", "av", "cv2", "rapidocr_onnxruntime", "onnxruntime", "s3fs")
"""Modules that a machine with a GPU and nothing of ours installed lacks."""

BENCH = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
sys.argv[1:] = ["bench", "vision", "--size", "tiny", "--repeat", "1", "--crops", "6", "--device", "cpu", *sys.argv[1:]]
from jobs.__main__ import main
main()
"""


def test_it_runs_where_decoders_and_ray_are_absent_and_prints_json_last(tmp_path):
    saved = tmp_path / "results" / "vision.json"
    done = subprocess.run(
        [sys.executable, "-c", BENCH, "--save", str(saved)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(saved.read_text())
    assert {"bench", "ratio", "of_limit", "rows", "machine", "threads", "dtype"} <= set(result)
    assert [(row["title"], row["against"]) for row in result["rows"]] == [
        ("4.6 crops", "transformers"), ("4.5 crops", "one at a time"), ("4.5 crops", "one at a time, plain"),
        ("4.5 packs", "one at a time"),
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["difference"] <= 1e-4
        assert row["ratio"] == pytest.approx(row["other_seconds"] / row["ours_seconds"], rel=0.01)
        assert row["of_limit"] == pytest.approx(row["gflops"] / row["limit_gflops"], rel=0.01)


def test_an_unknown_size_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "bench", "vision", "--size", "huge"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "tiny, middle, full" in done.stderr


@pytest.mark.parametrize("make", [vision.whole_pass, vision.single_crops, vision.single_packs])
def test_a_pass_that_gives_other_numbers_is_not_timed(make):
    case = make("tiny", CPU, 4)
    packed = case.work.packed()
    with torch.inference_mode():
        found = case.work.encode(packed)
        assert vision.require_equal(case, found, case.other()()) <= 1e-4
        with pytest.raises(vision.SidesDifferError, match="differ by"):
            vision.require_equal(case, [tokens + 0.1 for tokens in found], case.other()())
        with pytest.raises(vision.SidesDifferError, match="numbers of tokens"):
            vision.require_equal(case, found[:-1], case.other()())
        with pytest.raises(vision.SidesDifferError, match="differ by nan"):
            vision.require_equal(case, [tokens * torch.nan for tokens in found], case.other()())


def released(connector):
    """A network of released sizes, numbers only."""
    tower = SimpleNamespace(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, insert_layer_id=6)
    return SimpleNamespace(tower=SimpleNamespace(config=tower), connector=connector)


def test_the_counted_flops_are_those_published_for_a_crop_of_1024_patches():
    crop = [Group(0, (np.zeros((448, 448, 3), np.uint8),), (-1,))]
    merger = SimpleNamespace(mlp=[SimpleNamespace(linear_2=SimpleNamespace(out_features=1024))])
    assert pass_flops(released(merger), FAMILIES["minicpmv4_6"], crop, 2) == pytest.approx(480e9, rel=2e-3)
    assert pass_flops(released(merger), FAMILIES["minicpmv4_6"], crop, 1) == pytest.approx(987e9, rel=2e-3)
    resampler = SimpleNamespace(query=torch.empty(64, 4096, device="meta"))
    assert pass_flops(released(resampler), FAMILIES["minicpmv4_5"], crop, 0) == pytest.approx(974e9 + 85.9e9, rel=2e-3)
    assert resampler_flops([1024], 1152, 64, 4096) == pytest.approx(85.9e9, rel=2e-3)


def sides_of(groups):
    return [(part.shape[0] // 14, part.shape[1] // 14) for group in groups for part in group.slices]


def test_tiny_crops_are_mixed_and_larger_ones_have_about_a_thousand_patches():
    for name, step in (("minicpmv4_6", 4), ("minicpmv4_5", 1)):
        tiny = sides_of(make_crops(SCALES["tiny"], FAMILIES[name]))
        assert len(tiny) == 64
        assert len(set(tiny)) >= 9
        assert all(4 <= side <= 12 and side % step == 0 for grid in tiny for side in grid)
        for rows, cols in sides_of(make_crops(SCALES["middle"], FAMILIES[name])):
            assert 980 <= rows * cols <= 1120


def test_packs_hold_all_frames_and_times_ascend():
    groups = make_packs(SCALES["middle"], 11)
    assert sum(len(group.slices) for group in groups) == 11
    times = [time for group in groups for time in group.times]
    assert times == sorted(set(times))
    assert max(len(group.times) for group in groups) == 6
