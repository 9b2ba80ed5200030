"""The engine on a mixed workload, against `generate` of transformers in static batches: same weights, one run."""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import MiniCPMV4_6ForConditionalGeneration, StoppingCriteria, StoppingCriteriaList
from transformers.models.qwen3_5 import modeling_qwen3_5

from jobs.bench.engine_work import EndlessModel, make_requests, write_model
from jobs.bench.machine import machine_facts
from operators.engine.engine import Engine
from operators.engine.request import Completion, Request, SamplingParams
from operators.engine.scheduler import SchedulerConfig
from operators.engine.stats import EngineStats
from operators.minicpmv.language import step_states
from operators.minicpmv.patches import normalise, slice_views
from operators.minicpmv.slots import Call
from operators.minicpmv.visual import Visual

PATCH_PX = 14


def measure(
    scale: str,
    device: torch.device,
    dtype: torch.dtype,
    requests: int,
    longest: int,
    slots: int,
    batches: Sequence[int],
    max_slices: int,
    *,
    plain: bool,
) -> dict[str, Any]:
    """Return what both sides took for the same requests.

    Args:
        scale: `middle`, or `full` for the released numbers of 4.6.
        device: where both run.
        dtype: of weights and activations.
        requests: how many.
        longest: tokens of the longest answer.
        slots: of the engine.
        batches: sizes of static batches to try; the best counts.
        max_slices: most slices a page.
        plain: whether transformers' own recurrence is measured as well, with the best batch.
    """
    with tempfile.TemporaryDirectory(prefix="pagereel-bench-") as name:
        folder = Path(name)
        write_model(folder, scale, device, dtype)
        model = EndlessModel(folder, device=device, dtype=dtype, attention="sdpa")
        reference = MiniCPMV4_6ForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
        work = make_requests(model, requests, longest, max_slices)
    ours, answers = run_engine(model, work, slots, device)
    say(f"engine, {slots} slots", ours)
    static: list[dict[str, Any]] = []
    for own_recurrence in (True, False) if plain else (True,):
        for size in batches if own_recurrence else [best(static)["batch"]]:
            found, tokens = run_static(reference, work, size, device, own_recurrence=own_recurrence)
            found["equal_answers"] = sum(one == other for one, other in zip(tokens, answers, strict=True))
            static.append(found)
            say(f"static {size}", found)
    ratios = {
        own: round(ours["requests_per_second"] / best(sides)["requests_per_second"], 3)
        for own in (True, False)
        if (sides := [side for side in static if side["own_recurrence"] == own])
    }
    return {
        "bench": "engine",
        "scale": scale,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "requests": requests,
        "longest": longest,
        "prompt_tokens": sum(len(request.prompt_ids) for request in work),
        "answer_tokens": sum(request.sampling.max_new_tokens for request in work),
        "ratio": ratios[True],
        "ratio_means": f"requests/s over those of the best of static batches of {', '.join(map(str, batches))}, "
        "with the same recurrence on both sides",
        "ratio_over_plain": ratios.get(False),
        "of_limit": ours["occupancy"],
        "limit": "slots that write while requests wait",
        "engine": ours,
        "static": static,
        "machine": machine_facts(),
    }


def say(name: str, side: dict[str, Any]) -> None:
    """Print what one side took, on the way: all of them together take minutes."""
    sys.stderr.write(f"{name}: {side['seconds']:g} s, {side['cpu_seconds']:g} s of processor time\n")


def best(sides: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the fastest of several runs."""
    return max(sides, key=lambda side: float(side["requests_per_second"]))


def run_engine(
    model: EndlessModel, work: Sequence[Request[Visual | None]], slots: int, device: torch.device
) -> tuple[dict[str, Any], list[list[int]]]:
    """Return figures of the engine, and its answers."""
    engine: Engine[Visual | None] = Engine(model, SchedulerConfig(slot_count=slots))
    engine.generate([shortened(request, 3) for request in work[:2]])
    engine.stats = EngineStats()
    last_admission = 0.0
    began, processor_began = time.perf_counter(), time.process_time()
    with peak_memory(device) as memory:
        tickets = engine.submit(work)
        ended: dict[int, Any] = {}
        while len(ended) < len(work):
            busy = engine.stats.busy_steps
            engine.step()
            ended |= engine.collect()
            if engine.stats.busy_steps > busy:
                last_admission = time.perf_counter() - began
    seconds, processor_seconds = time.perf_counter() - began, time.process_time() - processor_began
    answers = []
    for ticket in tickets:
        outcome = ended[ticket]
        if not isinstance(outcome, Completion):
            raise outcome
        answers.append(list(outcome.token_ids))
    stats = engine.stats
    figures = sides_figures(seconds, processor_seconds, answers) | {
        "slots": slots,
        "occupancy": round(stats.occupancy(slots) or 0.0, 4),
        "padded_share": round(1 - stats.decoded_tokens / max(stats.decode_rows, 1), 4),
        "drain_seconds": round(seconds - last_admission, 2),
        "encode_seconds": round(stats.encode_seconds, 2),
        "prefill_seconds": round(stats.prefill_seconds, 2),
        "decode_seconds": round(stats.decode_seconds, 2),
        "peak_memory_mb": memory(),
    }
    return figures, answers


def run_static(
    reference: Any, work: Sequence[Request[Visual | None]], size: int, device: torch.device, *, own_recurrence: bool
) -> tuple[dict[str, Any], list[list[int]]]:
    """Return figures of transformers' `generate` in batches of `size`, in the requests' order, and its answers."""
    restore = use_recurrence(fast_recurrence) if own_recurrence else None
    answers: list[list[int]] = []
    rows = useful = 0
    try:
        # The first call looks for kernels that are not installed, which takes many seconds.
        generate_static(reference, [shortened(request, 3) for request in work[:2]], device)
        with peak_memory(device) as memory, torch.inference_mode():
            began, processor_began = time.perf_counter(), time.process_time()
            for start in range(0, len(work), size):
                batch = work[start : start + size]
                made = generate_static(reference, batch, device)
                answers += made
                rows += len(batch) * max(len(one) for one in made)
                useful += sum(len(one) for one in made)
            seconds, processor_seconds = time.perf_counter() - began, time.process_time() - processor_began
    finally:
        if restore:
            restore()
    figures = sides_figures(seconds, processor_seconds, answers) | {
        "batch": size,
        "own_recurrence": own_recurrence,
        "padded_share": round(1 - useful / rows, 4),
        "peak_memory_mb": memory(),
    }
    return figures, answers


def shortened(request: Request[Visual | None], tokens: int) -> Request[Visual | None]:
    """Return a request for an answer of so many tokens."""
    return replace(request, sampling=SamplingParams(max_new_tokens=tokens))


def generate_static(reference: Any, batch: Sequence[Request[Visual | None]], device: torch.device) -> list[list[int]]:
    """Return the answers of one left-padded batch, each of its own length."""
    longest = max(len(request.prompt_ids) for request in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        ids[row, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[row, longest - len(request.prompt_ids) :] = 1
    wanted = torch.tensor([request.sampling.max_new_tokens for request in batch], device=device)
    # Pictures of clips stand in the place of video tokens: both kinds go in under their own names.
    inputs: dict[str, Tensor] = {}
    video = reference.config.video_token_id
    for suffix, chosen in (("", False), ("_videos", True)):
        visuals = [one.visual for one in batch if one.visual is not None and (video in one.prompt_ids) == chosen]
        if visuals:
            inputs |= released_inputs(visuals, suffix, device)
    made = reference.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        do_sample=False,
        max_new_tokens=int(wanted.max()),
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([OwnLength(longest, wanted)]),
        **inputs,
    )
    return [made[row, longest : longest + int(own)].tolist() for row, own in enumerate(wanted)]


class OwnLength(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a batch at its own length."""

    def __init__(self, prompt_tokens: int, wanted: Tensor) -> None:
        self.prompt_tokens = prompt_tokens
        self.wanted = wanted

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Return which rows are done, (B,) bool."""
        return self.wanted <= input_ids.shape[1] - self.prompt_tokens


def released_inputs(visuals: Sequence[Visual], suffix: str, device: torch.device) -> dict[str, Tensor]:
    """Return pictures as transformers' network takes them: patches side by side, and the grid of each slice."""
    slices = [part for visual in visuals for part in slice_views(visual.pixels, visual.shapes)]
    columns = []
    for part in slices:
        height, width, _ = part.shape
        pixels = normalise(torch.from_numpy(part.copy())).permute(2, 0, 1)
        split = pixels.reshape(3, height // PATCH_PX, PATCH_PX, width // PATCH_PX, PATCH_PX)
        columns.append(split.permute(0, 2, 1, 3, 4).reshape(3, PATCH_PX, -1))
    sizes = [[part.shape[0] // PATCH_PX, part.shape[1] // PATCH_PX] for part in slices]
    return {
        f"pixel_values{suffix}": torch.cat(columns, dim=-1)[None].to(device),
        f"target_sizes{suffix}": torch.tensor(sizes, dtype=torch.int32),
    }


def use_recurrence(function: Callable[..., Any]) -> Callable[[], None]:
    """Make transformers' layers step with `function`; return what undoes it."""
    before = modeling_qwen3_5.torch_recurrent_gated_delta_rule
    modeling_qwen3_5.torch_recurrent_gated_delta_rule = function

    def restore() -> None:
        modeling_qwen3_5.torch_recurrent_gated_delta_rule = before

    return restore


def fast_recurrence(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Return one step of the gated delta rule by our own recurrence, in transformers' form."""
    state: Tensor = rest["initial_state"]
    call = Call(rows=slice(None), start=None, stop=0, device=query.device)
    made = step_states(query[:, 0], key[:, 0], value[:, 0], rest["g"][:, 0], rest["beta"][:, 0], state, call)
    return made[:, None], state


def sides_figures(seconds: float, processor_seconds: float, answers: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the figures that both sides have."""
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(processor_seconds, 2),
        "requests_per_second": round(len(answers) / seconds, 4),
        "tokens_per_second": round(sum(map(len, answers)) / seconds, 2),
    }


class peak_memory:  # noqa: N801
    """Follows the memory of the device while work is done; called afterwards it says how much, in MB."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> "peak_memory":
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def __call__(self) -> int | None:
        """Return the peak in MB; None on a CPU, where both sides share one process."""
        return torch.cuda.max_memory_allocated() // 2**20 if self._device.type == "cuda" else None


def print_result(result: dict[str, Any]) -> None:
    """Print one table, and the JSON line last."""
    table = Table(
        title=f"engine, {result['scale']} size on {result['device']}: {result['requests']} requests, "
        f"{result['prompt_tokens']} prompt and {result['answer_tokens']} answer tokens"
    )
    for column in ("", "requests/s", "tokens/s", "padded work", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    ours = result["engine"]
    sides = [(f"engine, {ours['slots']} slots", ours)]
    sides += [
        (f"static {side['batch']}" + ("" if side["own_recurrence"] else ", transformers' recurrence"), side)
        for side in result["static"]
    ]
    for name, side in sides:
        table.add_row(
            name,
            f"{side['requests_per_second']:g}",
            f"{side['tokens_per_second']:g}",
            f"{side['padded_share']:.1%}",
            f"{side['seconds']:g}",
        )
    table.add_row("ratio, same kernels", f"{result['ratio']:g}", "", "", "")
    if result["ratio_over_plain"] is not None:
        table.add_row("ratio over plain transformers", f"{result['ratio_over_plain']:g}", "", "", "")
    table.add_row("occupancy until the drain", f"{ours['occupancy']:.1%}", "", "", "")
    Console().print(table)
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
