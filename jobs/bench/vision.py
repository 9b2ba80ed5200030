"""The vision pass: ours for all crops at once against transformers' own, and against one crop, or pack, at a time.

Both sides have the same weights and begin with patches that are on the device already; they run in turns, and their
numbers are compared in float32 before any time is taken. Needs torch and transformers, no decoders and no Ray.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from jobs.bench.machine import machine_facts
from jobs.bench.vision_work import PATCH_PX, SCALES, make_crops, make_network, make_packs, pass_flops
from operators.minicpmv.encoder import PATCHES_PER_CALL, Chunk, Group, VisionEncoder, chunks
from operators.minicpmv.family import FAMILIES, Family, FamilyName
from operators.minicpmv.network import Network
from operators.minicpmv.patches import pack_patches

MERGER: Final[FamilyName] = "minicpmv4_6"
RESAMPLER: Final[FamilyName] = "minicpmv4_5"

TOLERANCE: Final = 1e-4
"""Largest difference of the two sides in float32, as a share of the largest value where that is above 1."""

SQUARE_SIDE: Final = {"cuda": 8192, "cpu": 2048}
"""Side of the square matrices whose product gives the limit."""

LIMIT_RUNS: Final = 5
WARM_UP_RUNS: Final = 2

Tokens = list[Tensor]
"""Visual tokens of each group, in the order of the groups."""


class SidesDifferError(RuntimeError):
    """The two sides gave different numbers: no time is worth printing."""


@dataclass
class Work:
    """A network and what it is given.

    Attributes:
        merge_levels: how often four neighbours become one.
        encoder: our pass, in the dtype that was last asked for.
    """

    network: Network
    family: Family
    groups: list[Group]
    merge_levels: int
    device: torch.device

    def __post_init__(self) -> None:
        self.use_dtype(torch.float32)

    def use_dtype(self, dtype: torch.dtype) -> None:
        """Have all weights, and what is made of them, in this dtype."""
        self.network.whole.to(dtype)
        self.encoder = VisionEncoder(self.network, self.family, PATCH_PX, self.device)

    def packed(self) -> list[Chunk]:
        """Return all groups on the device, as many at once as our pass takes."""
        bound = self.encoder.patches_per_call
        return [self.encoder.pack(some, self.merge_levels) for some in chunks(self.groups, PATCH_PX, bound)]

    def encode(self, packed: Sequence[Chunk]) -> Tokens:
        """Return the tokens of each group by our pass, chunk after chunk."""
        return [tokens for chunk in packed for tokens in self.encoder.encode_chunk(chunk)]


@dataclass(frozen=True)
class Case:
    """Two ways to the same visual tokens.

    Attributes:
        title, against: what goes through, and what the other side is.
        work: what ours does.
        other: makes the other side, from patches that are on the device.
    """

    title: str
    against: str
    work: Work
    other: Callable[[], Callable[[], Tokens]]


def measure(
    sizes: Sequence[str], device: torch.device, dtype: torch.dtype, repeat: int, crops: int | None
) -> dict[str, Any]:
    """Return the figures of all cases at these sizes.

    Args:
        sizes: which networks.
        device: where it runs.
        dtype: of the timed runs; the sides are compared in float32 before.
        repeat: timed runs a side.
        crops: how many pictures go through; None: as many as each size has.

    Raises:
        SidesDifferError: two sides gave different numbers.
    """
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for make in (whole_pass, single_crops, released_crops, single_packs):
            case = make(size, device, crops)
            rows.append({"size": size, **compare(case, dtype, repeat)})
    last = next(row for row in rows if row["size"] == sizes[-1])
    return {
        "bench": "vision",
        "ratio": rows[0]["ratio"],
        "of_limit": last["of_limit"],
        "ratio_means": f"seconds of transformers' pass over those of ours, MiniCPM-V 4.6, size {sizes[0]}",
        "of_limit_means": f"FLOP/s of our pass over those of a large matrix product, MiniCPM-V 4.6, size {sizes[-1]}",
        "rows": rows,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "repeat": repeat,
        "machine": machine_facts(),
    }


def make_work(size: str, name: FamilyName, device: torch.device, crops: int | None, *, packs: bool) -> Work:
    """Return a member's network of this size, and crops of mixed sizes or packs of frames for it."""
    scale, family = SCALES[size], FAMILIES[name]
    groups = make_packs(scale, crops) if packs else make_crops(scale, family, crops)
    levels = 2 if family.connector == "merger" else 0
    network = make_network(scale, name, device)
    return Work(network, family, groups, levels, device)


def whole_pass(size: str, device: torch.device, crops: int | None) -> Case:
    """Return mixed crops of 4.6 against transformers' pass."""
    work = make_work(size, MERGER, device, crops, packs=False)
    return Case("4.6 crops", "transformers", work, lambda: transformers_pass(work))


def single_crops(size: str, device: torch.device, crops: int | None) -> Case:
    """Return mixed crops of 4.5 against one crop at a time."""
    work = make_work(size, RESAMPLER, device, crops, packs=False)
    return Case("4.5 crops", "one at a time", work, lambda: one_at_a_time(work))


def released_crops(size: str, device: torch.device, crops: int | None) -> Case:
    """Return mixed crops of 4.5 against one crop at a time, with the keys and values that the released code has."""
    work = make_work(size, RESAMPLER, device, crops, packs=False)
    return Case("4.5 crops", "one at a time, plain", work, lambda: one_at_a_time(work, plain=True))


def single_packs(size: str, device: torch.device, crops: int | None) -> Case:
    """Return packs of frames of 4.5 against one pack at a time."""
    work = make_work(size, RESAMPLER, device, crops, packs=True)
    return Case("4.5 packs", "one at a time", work, lambda: one_at_a_time(work))


def one_at_a_time(work: Work, *, plain: bool = False) -> Callable[[], Tokens]:
    """Return our pass with every group alone; `plain`: and the resampler as it is released."""
    alone = VisionEncoder(work.network, work.family, PATCH_PX, work.device, PATCHES_PER_CALL["cuda"])
    packed = [alone.pack([group], work.merge_levels) for group in work.groups]

    def run() -> Tokens:
        alone.resample = work.network.connector if plain else work.encoder.resample
        return [tokens for chunk in packed for tokens in alone.encode_chunk(chunk)]

    return run


def transformers_pass(work: Work) -> Callable[[], Tokens]:
    """Return transformers' pass over the same groups, as many at once as ours takes."""
    calls = []
    for some in chunks(work.groups, PATCH_PX, work.encoder.patches_per_call):
        parts = [part for group in some for part in group.slices]
        # One picture after the other as columns of patches, and sizes on the host, where the pass reads them.
        columns = [as_columns(pack_patches([part], PATCH_PX, 0, work.device).pixel_values) for part in parts]
        sizes = torch.tensor([(part.shape[0] // PATCH_PX, part.shape[1] // PATCH_PX) for part in parts])
        calls.append((torch.cat(columns, dim=-1), sizes.to(torch.int32)))
    model = work.network.whole.model

    def run() -> Tokens:
        return [
            tokens
            for pixels, sizes in calls
            for tokens in model.get_image_features(pixels, sizes, downsample_mode="16x").pooler_output
        ]

    return run


def as_columns(patches: Tensor) -> Tensor:
    """Return patches as the released processors lay them out.

    Shapes:
        patches: (N, side * side * 3), row by row of the picture; ordered row, column, channel inside.
        result: (1, 3, side, side * N).
    """
    squares = patches.unflatten(1, (PATCH_PX, PATCH_PX, 3))
    return squares.permute(3, 1, 0, 2).reshape(1, 3, PATCH_PX, -1)


def compare(case: Case, dtype: torch.dtype, repeat: int) -> dict[str, Any]:
    """Return the figures of one case.

    Raises:
        SidesDifferError: the two sides gave different numbers.
    """
    work = case.work
    with torch.inference_mode():
        packed, other = work.packed(), case.other()
        difference = require_equal(case, work.encode(packed), other())
        work.use_dtype(dtype)
        limit = matrix_rate(work.device, dtype)
        sides = {"other": other, "ours": lambda: work.encode(packed), "from_pixels": lambda: work.encode(work.packed())}
        seconds = medians(sides, work.device, repeat)
        limit = max(limit, matrix_rate(work.device, dtype))
    flops = pass_flops(work.network, work.family, work.groups, work.merge_levels)
    return {
        "title": case.title,
        "against": case.against,
        "crops": sum(len(group.slices) for group in work.groups),
        "groups": len(work.groups),
        "patches": sum(group.patch_count(PATCH_PX) for group in work.groups),
        "difference": difference,
        "other_seconds": seconds["other"],
        "ours_seconds": seconds["ours"],
        "ours_from_pixels_seconds": seconds["from_pixels"],
        "ratio": round(seconds["other"] / seconds["ours"], 3),
        "gflop": round(flops / 1e9, 3),
        "gflops": round(flops / 1e9 / seconds["ours"], 3),
        "limit_gflops": round(limit / 1e9, 3),
        "of_limit": round(flops / seconds["ours"] / limit, 4),
    }


def require_equal(case: Case, ours: Tokens, other: Tokens) -> float:
    """Return the largest difference of the two sides.

    Raises:
        SidesDifferError: it is above the tolerance, or the numbers of tokens differ.
    """
    if [one.shape for one in ours] != [one.shape for one in other]:
        raise SidesDifferError(f"{case.title}: the two sides give different numbers of tokens")
    largest = max(1.0, *(float(one.abs().max()) for one in other))
    difference = max(float((one - two).abs().max()) for one, two in zip(ours, other, strict=True)) / largest
    if not difference <= TOLERANCE:
        raise SidesDifferError(f"{case.title}: the two sides differ by {difference:g}, at most {TOLERANCE:g} is right")
    return difference


def medians(sides: dict[str, Callable[[], Any]], device: torch.device, repeat: int) -> dict[str, float]:
    """Return the median seconds of each side; they take turns."""
    for run in sides.values():
        for _ in range(WARM_UP_RUNS):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeat):
        for name, run in sides.items():
            seconds[name].append(seconds_of(run, device))
    return {name: float(statistics.median(taken)) for name, taken in seconds.items()}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a product of two large square matrices, the best of a few."""
    side = SQUARE_SIDE[device.type]
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    one @ other
    return 2 * side**3 / min(seconds_of(lambda: one @ other, device) for _ in range(LIMIT_RUNS))


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Return how long `run` takes, what it leaves to the device included."""
    wait_for(device)
    began = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - began


def wait_for(device: torch.device) -> None:
    """Return once the device has done everything that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_result(result: dict[str, Any]) -> None:
    """Print one table, and the JSON line last."""
    table = Table(
        title=f"vision pass in ms, {result['device']}, {result['dtype']}, {result['repeat']} runs a side",
        caption="pixels: ours, and the patches made from pictures; limit: share of the rate of a large matrix product",
        box=None,
    )
    for column in ("MiniCPM-V", "against", "theirs", "ours", "pixels", "ratio", "limit"):
        is_text = column in ("MiniCPM-V", "against")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for row in result["rows"]:
        times = [f"{row[name] * 1000:.4g}" for name in ("other_seconds", "ours_seconds", "ours_from_pixels_seconds")]
        what = f"{row['title']}, {row['size']}"
        table.add_row(what, row["against"], *times, f"{row['ratio']:.3g}", f"{row['of_limit']:.1%}")
    Console().print(table)
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
