"""MiniCPM-V 4.6 on CUDA: the same answers as on the CPU in float32, close logits in bfloat16, and how fast.

As a script it prints one JSON line of timings: `python -m tests.gpu.test_cuda46 [model folder] [pages]`.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from operators.engine.scheduler import SchedulerConfig
from operators.generate import Generate, GenerateConfig
from operators.minicpmv.demo import write_demo_model
from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.slicing import SliceConfig
from operators.minicpmv.visual import Visual
from operators.prepare import PrepareClips, PrepareConfig, PrepareImages, read_pictures
from tests.operators.rows46 import clip_frames, clip_row, page_pictures, page_row, table_of
from tests.operators.slot_driver import SlotDriver

pytestmark = pytest.mark.needs_gpu


@pytest.fixture(scope="module", autouse=True)
def _cuda():
    if not torch.cuda.is_available():
        if os.environ.get("PAGEREEL_EXPECT_GPU") == "1":
            pytest.fail("PAGEREEL_EXPECT_GPU=1 and torch finds no CUDA device")
        pytest.skip("no CUDA device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_demo_model(path)
    return path


def page_records(folder, count):
    prepare = PrepareImages(PrepareConfig(model_folder=str(folder)))
    return prepare(table_of(*[page_row(picture) for picture in page_pictures(count, seed=46)]))


def clip_records(folder, count):
    slicing = SliceConfig(max_slices=1)
    prepare = PrepareClips(PrepareConfig(model_folder=str(folder), slicing=slicing))
    return prepare(table_of(*[clip_row(clip_frames(seed), slicing) for seed in range(count)]))


def answers(folder, records, **options):
    outcomes = Generate(GenerateConfig(model_folder=str(folder), max_new_tokens=48, **options)).outcomes(records)
    return [outcomes[row].token_ids for row in range(records.num_rows)]


def prefill_logits(folder, records, device, dtype):
    model = MiniCPMV(folder, device=torch.device(device), dtype=dtype, attention="sdpa")
    pictures = [read_pictures(records, row) for row in range(records.num_rows)]
    visuals = [Visual(one.pixels, one.shapes) for one in pictures]
    logits, _ = SlotDriver(model).prefill(records["prompt_ids"].to_pylist(), visuals)
    return logits.float().cpu()


@pytest.mark.parametrize("make_records", [page_records, clip_records])
def test_float32_answers_equal_those_of_the_cpu(folder, make_records):
    records = make_records(folder, 12)
    wanted = answers(folder, records, device="cpu", dtype="fp32")
    found = answers(folder, records, device="cuda", dtype="fp32")
    agreeing = sum(one == other for one, other in zip(found, wanted, strict=True))
    # A near tie may fall the other way on another device's rounding.
    assert agreeing >= len(wanted) - 1


def test_float32_logits_are_close(folder):
    records = page_records(folder, 6)
    wanted = prefill_logits(folder, records, "cpu", torch.float32)
    found = prefill_logits(folder, records, "cuda", torch.float32)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_bfloat16_logits_are_near(folder):
    records = page_records(folder, 6)
    wanted = prefill_logits(folder, records, "cpu", torch.float32)
    found = prefill_logits(folder, records, "cuda", torch.bfloat16)
    assert (found - wanted).abs().max() < 0.25 * wanted.abs().max()


def test_float32_answers_on_cuda_do_not_depend_on_the_batch(folder):
    records = page_records(folder, 12)
    alone = answers(folder, records, device="cuda", dtype="fp32", scheduler=SchedulerConfig(slot_count=1))
    batched = answers(folder, records, device="cuda", dtype="fp32", scheduler=SchedulerConfig(slot_count=12))
    assert sum(one == other for one, other in zip(alone, batched, strict=True)) >= len(alone) - 1


def measure(folder, page_count):
    """Return how long loading takes, and tokens and pages a second of one warm call, by dtype."""
    records = page_records(folder, page_count)
    figures = {}
    for dtype in ("bf16", "fp32"):
        began = time.perf_counter()
        generate = Generate(GenerateConfig(model_folder=str(folder), dtype=dtype, max_new_tokens=96))
        loaded = time.perf_counter()
        generate(records.slice(0, 2))
        warm = time.perf_counter()
        tokens = sum(generate(records)["output_tokens"].to_pylist())
        seconds = time.perf_counter() - warm
        figures[dtype] = {
            "load_seconds": round(loaded - began, 2),
            "tokens_per_second": round(tokens / seconds, 1),
            "pages_per_second": round(page_count / seconds, 2),
        }
        if torch.cuda.is_available():
            figures[dtype]["peak_device_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
    return {"device": str(generate.device), "torch": torch.__version__, "pages": page_count, **figures}


def main(arguments):
    with tempfile.TemporaryDirectory() as made:
        folder = Path(arguments[0]) if arguments else Path(made)
        if not arguments:
            write_demo_model(folder)
        sys.stdout.write(json.dumps(measure(folder, int(arguments[1]) if len(arguments) > 1 else 16)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
