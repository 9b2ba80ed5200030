"""The engine on CUDA, as plain functions: answers as transformers gives them, recorded steps, planned memory.

`python -m tests.gpu.engine_on_cuda` runs all of it where neither pytest nor Ray nor a decoder is installed, prints a
line for each check, then how long a step takes with and without recording and the benchmark of the engine, both at full
size, and ends with 1 when a check failed. `--no-bench` leaves the two out; `--device cpu` runs what a CPU can.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from jobs.bench.engine import generate_static
from jobs.bench.engine_work import EndlessModel, write_model
from operators.engine.engine import Engine
from operators.engine.request import Request, SamplingParams
from operators.engine.scheduler import SchedulerConfig
from operators.minicpmv.config import read_model_config
from operators.minicpmv.graphs import DecodeGraphs
from operators.minicpmv.memory import SPARE
from operators.minicpmv.slots import slot_bytes
from operators.minicpmv.visual import Visual
from operators.prepare import read_pictures
from tests.gpu.checks import run_each, write_members
from tests.gpu.family_on_cuda import page_records, require_same_answers

MEMBERS = ("minicpmv4_6", "minicpmv4_5")
LENGTHS = (40, 3, 17, 64, 9, 28, 1, 50)
BENCH_SECONDS = 540
BENCH = """
import torch
from jobs.bench import engine
engine.print_result(engine.measure(
    "full", torch.device("cuda"), torch.bfloat16, requests=192, longest=800, slots=64, batches=[64], max_slices=9,
    plain=False,
))
"""


def load(folder, device, **options):
    """A tiny model in float32 whose answers are as long as was asked for."""
    return EndlessModel(folder, device=device, dtype=torch.float32, attention="sdpa", **options)


def page_requests(folder, count):
    """Requests for pages, each with an answer of its own length."""
    records = page_records(folder, count)
    packed = read_model_config(folder).family.clip_rule == "packed"
    requests = []
    for row in range(count):
        pictures = read_pictures(records, row, packed=packed)
        visual = Visual(pictures.pixels, pictures.shapes, pictures.slice_packs())
        sampling = SamplingParams(max_new_tokens=LENGTHS[row % len(LENGTHS)])
        requests.append(Request(tuple(records["prompt_ids"][row].as_py()), sampling, visual))
    return requests


def by_generate(model, request):
    """What transformers' `generate` answers, by itself; 4.5 gets the picture as the tokens that we encode."""
    whole = model.network.whole
    if model.config.family.connector == "merger":
        return tuple(generate_static(whole, [request], model.device)[0])
    with torch.inference_mode():
        [prepared] = model.encode([request.prompt_ids], [request.visual])
        embedded = model._embedded(prepared, slice(0, len(request.prompt_ids)))
        made = whole.llm.generate(
            inputs_embeds=embedded[None],
            attention_mask=torch.ones(1, len(embedded), dtype=torch.int64, device=model.device),
            do_sample=False,
            max_new_tokens=request.sampling.max_new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    return tuple(made[0].tolist())


def answers(model, requests, slot_count=5, **options):
    """Greedy answers of the engine, as token ids, and the engine."""
    engine = Engine(model, SchedulerConfig(slot_count=slot_count, chunk_tokens=300, **options))
    outcomes = engine.generate(requests)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return [outcome.token_ids for outcome in outcomes], engine


def check_answers_equal_those_of_generate(folder, device):
    """Greedy answers of the engine are those of transformers."""
    requests = page_requests(folder, 12)
    untouched = load(folder, device)
    wanted = [by_generate(untouched, request) for request in requests]
    found, _ = answers(load(folder, device), requests)
    return require_same_answers(found, wanted)


def check_recorded_steps_give_the_same_answers(folder, device):
    """Answers with recorded steps are those without."""
    requests = page_requests(folder, 16)
    wanted, _ = answers(load(folder, device), requests)
    model = load(folder, device, records_steps=True)
    model.graphs = DecodeGraphs(model.padded_step, device, record_after=2)
    found, _ = answers(model, requests)
    assert model.graphs.is_usable, "steps could not be recorded: see the warning"
    shapes = len(model.graphs._recorded)
    assert shapes > 0
    return f"{require_same_answers(found, wanted)}, {shapes} shapes recorded"


def check_slots_fit_a_small_budget(folder, device):
    """Long and short requests are answered within the memory that is said to be there."""
    short = page_requests(folder, 12)
    long = dataclasses.replace(short[0], sampling=SamplingParams(max_new_tokens=6_000))
    model = load(folder, device)
    wanted, _ = answers(model, short)
    config, longest = model.network.text.config, max(len(one.prompt_ids) for one in short) + max(LENGTHS)
    room = 10 * (slot_bytes(config, longest + 256, torch.float32) + model.budget.row_bytes)
    model.close_slots()
    model.budget.measure = lambda *_: int((room + model.budget.pass_bytes) / (1 - SPARE)) + 1
    model.budget.forget()
    # Its own answer is ended early: what counts is the room that it asks for.
    opened = []
    open_slots = model.open_slots
    model.open_slots = lambda *counts: opened.append(counts) or open_slots(*counts)
    engine = Engine(model, SchedulerConfig(slot_count=64, chunk_tokens=300))
    [ticket] = engine.submit([long])
    tickets = engine.submit(short)
    ended = {}
    for step in range(100_000):
        engine.step()
        if step == 40:
            engine.abort(ticket)
        ended |= engine.collect()
        if len(ended) == len(short) + 1:
            break
    for count, tokens in opened:
        assert count * slot_bytes(config, tokens, torch.float32) <= room, f"{count} slots of {tokens} tokens"
    assert len({count for count, _ in opened}) > 1, f"the slots did not change: {opened}"
    return f"{require_same_answers([ended[one].token_ids for one in tickets], wanted)}, slots {opened}"


def check_a_gpu_is_filled_and_not_overfilled(folder, device):
    """As many slots as are planned for can be made, and a prompt goes through beside them."""
    model = load(folder, device)
    tokens = 1024
    while (count := model.slots_that_fit(tokens)) > 256:
        tokens *= 2
    model.open_slots(count, tokens)
    ids = [5] * 2000
    logits = model.append_prompt(model.encode([ids], [None]), [count - 1], 0, len(ids))
    assert bool(torch.isfinite(logits).all())
    free, total = torch.cuda.mem_get_info(device)
    assert free < 0.3 * total, f"{free / 2**30:.1f} GiB of {total / 2**30:.1f} are left"
    model.close_slots()
    model.release_memory()
    return f"{count} slots of {tokens} tokens, {free / 2**30:.1f} GiB of {total / 2**30:.1f} left"


def check_memory_that_runs_out_costs_no_request(folder, device):
    """Where nothing is planned and the slots do not fit, fewer are made and all requests are answered."""
    requests = page_requests(folder, 12)
    model = load(folder, device)
    wanted, _ = answers(model, requests)
    model.close_slots()
    model.release_memory()
    model.slots_that_fit = lambda _: None
    config = model.network.text.config
    longest = max(len(one.prompt_ids) + one.sampling.max_new_tokens for one in requests)
    spare = 2 * model.budget.pass_bytes
    most = torch.cuda.memory_allocated(device) + spare
    total = torch.cuda.mem_get_info(device)[1]
    slot_count = max(64, 4 * spare // slot_bytes(config, longest, torch.float32))
    torch.cuda.set_per_process_memory_fraction(most / total, device)
    try:
        found, engine = answers(model, requests, slot_count=slot_count)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert engine.slot_count < slot_count, "memory did not run out"
    return f"{require_same_answers(found, wanted)}, {engine.slot_count} of {slot_count} slots"


ANYWHERE_CHECKS = (
    check_answers_equal_those_of_generate, check_recorded_steps_give_the_same_answers, check_slots_fit_a_small_budget,
)  # fmt: skip
CUDA_CHECKS = (check_a_gpu_is_filled_and_not_overfilled, check_memory_that_runs_out_costs_no_request)


def run_checks(device):
    """Run every check, print a line for each, and return how many failed."""
    checks = ANYWHERE_CHECKS + (CUDA_CHECKS if device.type == "cuda" else ())
    with tempfile.TemporaryDirectory() as made:
        return run_each(
            (f"{check.__name__} {name}", check, (folder, device))
            for name, folder in write_members(made, MEMBERS).items()
            for check in checks
        )


def step_milliseconds(model, slot_count, held, steps):
    """Time of a step of all slots, each holding so many tokens."""
    for _ in range(12):
        model.append_tokens([7] * slot_count, [held] * slot_count, [True] * slot_count)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        model.append_tokens([7] * slot_count, [held] * slot_count, [True] * slot_count).argmax(dim=-1).tolist()
    return round((time.perf_counter() - began) / steps * 1000, 3)


def measure_steps(device):
    """Print how long a step of 4.6 at full size takes, launched kernel by kernel and recorded."""
    found = {"bench": "steps", "device": torch.cuda.get_device_name(device), "held": 1300}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_model(folder, "full", device, torch.bfloat16)
        for records in (False, True):
            model = EndlessModel(folder, device=device, dtype=torch.bfloat16, attention="sdpa", records_steps=records)
            for slot_count in (1, 8, 64, 128, 256):
                model.open_slots(slot_count, 2304)
                key = f"{slot_count}_slots_{'recorded' if records else 'launched'}_ms"
                found[key] = step_milliseconds(model, slot_count, 1300, 30)
            if model.graphs is not None:
                found["recordable"] = model.graphs.is_usable
            model.close_slots()
            del model
            torch.cuda.empty_cache()
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def main(arguments):
    """Run the checks and the benchmarks, and return the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--no-bench", action="store_true")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.stdout.write(f"torch {torch.__version__} finds no CUDA device\n")
        return 1
    device = torch.device(options.device)
    failed = run_checks(device)
    if device.type == "cuda" and not options.no_bench:
        measure_steps(device)
        try:
            subprocess.run([sys.executable, "-c", BENCH], timeout=BENCH_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            sys.stdout.write(f"the benchmark was ended after {BENCH_SECONDS} s\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
