"""Every member on CUDA, as plain functions: as on the CPU in float32, close to it in bfloat16, in any batch.

`python -m tests.gpu.family_on_cuda` runs all of it where neither pytest nor Ray nor a decoder is installed, then the
benchmark of the vision pass at every size, prints a line for each check and one JSON line for the benchmark, and ends
with 1 when a check failed. `--no-bench` leaves the benchmark out.
"""

import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
import torch

from jobs.bench.vision_work import Scale, make_crops, make_network, make_packs
from operators.engine.scheduler import SchedulerConfig
from operators.generate import Generate, GenerateConfig
from operators.minicpmv import attention
from operators.minicpmv.attention import attend, plan_attention
from operators.minicpmv.config import read_model_config
from operators.minicpmv.encoder import VisionEncoder
from operators.minicpmv.family import FAMILIES
from operators.minicpmv.load import load_network
from operators.minicpmv.model import MiniCPMV
from operators.minicpmv.visual import Visual
from operators.prepare import PrepareConfig, PrepareImages, read_pictures
from schemas.generation import DECODED
from tests.gpu.checks import run_each, write_members
from tests.operators.slot_driver import SlotDriver

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PAGE_SIZES_PX = ((842, 595), (595, 842), (300, 300), (1200, 400), (260, 700), (1600, 1200))

SMALL = Scale("small", 48, 96, 4, 4, 1, 256, 48, (4, 12))
"""As the tiny checkpoints: heads 12 wide."""

WIDE = Scale("wide", 1152, 4304, 4, 16, 1, 1024, 10)
"""The released widths, few layers: heads 72 wide."""


def page_records(folder, count):
    """Records of generated pages, ready for the model."""
    generator = np.random.default_rng(46)
    rows = []
    for number in range(count):
        height_px, width_px = PAGE_SIZES_PX[number % len(PAGE_SIZES_PX)]
        coarse = generator.integers(0, 256, (height_px // 20 + 1, width_px // 20 + 1, 3), np.uint8)
        image = coarse.repeat(20, axis=0).repeat(20, axis=1)[:height_px, :width_px]
        rows.append(
            {
                "unit_id": "u",
                "record_key": f"k{number}",
                "source_uri": "file:///a.pdf",
                "doc_id": "d",
                "kind": "pdf",
                "task": "ocr",
                "page_number": number + 1,
                "image": np.ascontiguousarray(image).tobytes(),
                "image_height_px": height_px,
                "image_width_px": width_px,
                "route": "model",
            }
        )
    prepare = PrepareImages(PrepareConfig(model_folder=str(folder), slicing=read_model_config(folder).slicing))
    return prepare(pa.Table.from_pylist(rows, schema=DECODED))


def answers(folder, records, **options):
    """Greedy answers to records, as token ids."""
    outcomes = Generate(GenerateConfig(model_folder=str(folder), max_new_tokens=48, **options)).outcomes(records)
    return [outcomes[row].token_ids for row in range(records.num_rows)]


def prefill_logits(folder, records, device, dtype):
    """Logits after the prompts of records, float32 on the CPU."""
    model = MiniCPMV(folder, device=device, dtype=dtype, attention="sdpa")
    pictures = [read_pictures(records, row) for row in range(records.num_rows)]
    visuals = [Visual(one.pixels, one.shapes) for one in pictures]
    logits, _ = SlotDriver(model).prefill(records["prompt_ids"].to_pylist(), visuals)
    return logits.float().cpu()


def features(network, name, device, merge_levels):
    """Visual tokens of mixed crops, and of packs where a member has them, float32 on the CPU."""
    family = FAMILIES[name]
    scale = WIDE if network.tower.config.hidden_size == WIDE.width else SMALL
    crops = make_crops(scale, family)
    packs = make_packs(scale) if family.clip_rule == "packed" else []
    network.whole.to(device)
    with torch.inference_mode():
        found = VisionEncoder(network, family, 14, device).encode_groups([*crops, *packs], merge_levels)
    return torch.cat(found).float().cpu()


def merge_levels_of(name):
    """How often four neighbours become one: each way that a member has."""
    return (2, 1) if FAMILIES[name].connector == "merger" else (0,)


def require_close(found, wanted, share):
    """Fail unless the largest difference is at most this share of the largest value."""
    assert found.shape == wanted.shape
    difference = float((found - wanted).abs().max()) / float(wanted.abs().max())
    assert difference <= share, f"differs by {difference:.2g} of the largest value, at most {share:g} is right"
    return f"{difference:.2g} of the largest value"


def require_same_answers(found, wanted):
    """Fail unless all answers but one are equal: a near tie may fall the other way on another device's rounding."""
    agreeing = sum(one == other for one, other in zip(found, wanted, strict=True))
    assert agreeing >= len(wanted) - 1, f"{agreeing} of {len(wanted)} answers are equal"
    return f"{agreeing} of {len(wanted)} answers"


def check_features_in_float32(folder, name):
    """Visual tokens on CUDA equal those on the CPU."""
    return "; ".join(
        require_close(
            features(load_network(folder, torch.float32, "sdpa"), name, CUDA, levels),
            features(load_network(folder, torch.float32, "sdpa"), name, CPU, levels),
            1e-4,
        )
        for levels in merge_levels_of(name)
    )


def check_features_in_bfloat16(folder, name):
    """Visual tokens in bfloat16 on CUDA are near those in float32 on the CPU."""
    return "; ".join(
        require_close(
            features(load_network(folder, torch.bfloat16, "sdpa"), name, CUDA, levels),
            features(load_network(folder, torch.float32, "sdpa"), name, CPU, levels),
            0.1,
        )
        for levels in merge_levels_of(name)
    )


def check_logits_in_float32(folder, name):
    """Logits after a page on CUDA equal those on the CPU."""
    records = page_records(folder, 6)
    wanted = prefill_logits(folder, records, CPU, torch.float32)
    return require_close(prefill_logits(folder, records, CUDA, torch.float32), wanted, 1e-3)


def check_logits_in_bfloat16(folder, name):
    """Logits in bfloat16 on CUDA are near those in float32 on the CPU."""
    records = page_records(folder, 6)
    wanted = prefill_logits(folder, records, CPU, torch.float32)
    return require_close(prefill_logits(folder, records, CUDA, torch.bfloat16), wanted, 0.25)


def check_answers_in_float32(folder, name):
    """Greedy answers on CUDA equal those on the CPU."""
    records = page_records(folder, 8)
    wanted = answers(folder, records, device="cpu", dtype="fp32")
    return require_same_answers(answers(folder, records, device="cuda", dtype="fp32"), wanted)


def check_answers_in_any_batch(folder, name):
    """Greedy answers on CUDA do not depend on what is in a batch."""
    records = page_records(folder, 8)
    alone = answers(folder, records, device="cuda", dtype="fp32", scheduler=SchedulerConfig(slot_count=1))
    return require_same_answers(
        answers(folder, records, device="cuda", dtype="fp32", scheduler=SchedulerConfig(slot_count=8)), alone
    )


def check_answers_in_bfloat16(folder, name):
    """The default of a GPU gives answers, and says how fast."""
    records = page_records(folder, 16)
    generate = Generate(GenerateConfig(model_folder=str(folder), max_new_tokens=48))
    generate(records.slice(0, 2))
    began = time.perf_counter()
    tokens = sum(generate(records)["output_tokens"].to_pylist())
    assert tokens >= 16
    return f"{tokens / (time.perf_counter() - began):.0f} tokens a second, {generate.device}"


FAMILY_CHECKS = (
    check_features_in_float32, check_features_in_bfloat16, check_logits_in_float32, check_logits_in_bfloat16,
    check_answers_in_float32, check_answers_in_any_batch, check_answers_in_bfloat16,
)  # fmt: skip


def without_varlen(*_):
    """Stands in for `runs_varlen` where the other path is wanted."""
    return False


def by_both_paths(run):
    """What `run` returns with the variable-length kernel, and without it."""
    assert attention.runs_varlen is not without_varlen
    with_kernel = run()
    kept = attention.runs_varlen
    attention.runs_varlen = without_varlen
    try:
        return with_kernel, run()
    finally:
        attention.runs_varlen = kept


def check_the_kernel_equals_sdpa(head_width):
    """Attention by the variable-length kernel equals that by padded calls, for heads of this width."""
    lengths = sorted([1, 4, 7, 64, 70, 300, 1024, 1026, 1036, 1120] * 2)
    generator = torch.Generator(CUDA).manual_seed(head_width)
    shape = (sum(lengths), 4, head_width)
    made = [torch.randn(shape, generator=generator, device=CUDA).to(torch.bfloat16) for _ in range(3)]

    def run():
        plan = plan_attention(lengths, head_width, CUDA, torch.bfloat16)
        return plan.cumulative is not None, attend(*made, plan).float().cpu()

    (uses_kernel, found), (uses_kernel_too, wanted) = by_both_paths(run)
    assert uses_kernel, "the variable-length kernel does not run here"
    assert not uses_kernel_too
    return require_close(found, wanted, 0.02)


def check_a_wide_tower_by_both_paths(name):
    """Visual tokens of a tower of released widths are the same by both paths, and near those in float32."""
    network = make_network(WIDE, name, CPU)
    levels = merge_levels_of(name)[0]
    exact = features(network, name, CUDA, levels)
    network.whole.to(torch.bfloat16)
    found, wanted = by_both_paths(lambda: features(network, name, CUDA, levels))
    return f"{require_close(found, wanted, 0.1)}; float32: {require_close(found, exact, 0.15)}"


PATH_CHECKS = (
    *((check_the_kernel_equals_sdpa, width) for width in (16, 64, 72)),
    *((check_a_wide_tower_by_both_paths, name) for name in ("minicpmv4_6", "minicpmv4_5")),
)


def run_checks():
    """Run every check, print a line for each, and return how many failed."""
    with tempfile.TemporaryDirectory() as made:
        checks = [(f"{check.__name__} {value}", check, (value,)) for check, value in PATH_CHECKS]
        for name, folder in write_members(made, FAMILIES).items():
            checks += [(f"{check.__name__} {name}", check, (folder, name)) for check in FAMILY_CHECKS]
        return run_each(checks)


def main(arguments):
    """Run the checks and the benchmark, and return the exit status."""
    if not torch.cuda.is_available():
        sys.stdout.write(f"torch {torch.__version__} finds no CUDA device\n")
        return 1
    failed = run_checks()
    if "--no-bench" not in arguments:
        from jobs.bench import vision as bench

        bench.print_result(bench.measure(["tiny", "middle", "full"], CUDA, torch.bfloat16, 5, None))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
