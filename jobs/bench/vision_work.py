"""What the benchmark of the vision pass runs: networks of three sizes, random weights, pictures, and their FLOPs."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from operators.minicpmv.encoder import Group
from operators.minicpmv.family import FAMILIES, Family, FamilyName
from operators.minicpmv.load import load_network
from operators.minicpmv.network import Network, network_class, network_config, parts_of
from operators.minicpmv.resampler import NO_TIME
from operators.minicpmv.tiny import write_tiny_model

PATCH_PX: Final = 14
POSITIONS_PX: Final = 980
FRAMES_A_PACK: Final = (6, 3, 1, 6, 2)
"""Packs of a clip, over and over: full ones, ends of clips, and frames alone."""

MERGED_GRIDS: Final = ((28, 40), (32, 32), (40, 28), (24, 44), (36, 28))
"""Rows and columns of patches that pages and frames become in members with a merger."""

RESAMPLED_GRIDS: Final = ((27, 38), (32, 32), (38, 27), (24, 43), (28, 37))
"""The same in members with a resampler."""

FRAME_GRID: Final = (24, 43)


@dataclass(frozen=True)
class Scale:
    """Numbers of a network, and how much it is given.

    Attributes:
        width, inner, layers, heads: of the tower.
        merge_after: number of the layer after which windows merge, where they do.
        text_width: of the text model.
        crops: how many pictures go through.
        patches_a_side: of each crop, from and to; None: the grids of pages.
    """

    name: str
    width: int
    inner: int
    layers: int
    heads: int
    merge_after: int
    text_width: int
    crops: int
    patches_a_side: tuple[int, int] | None = None


SCALES: Final[dict[str, Scale]] = {
    scale.name: scale
    for scale in (
        Scale("tiny", 48, 96, 4, 4, 1, 256, 64, (4, 12)),
        Scale("middle", 384, 1536, 12, 6, 3, 1024, 8),
        Scale("full", 1152, 4304, 27, 16, 6, 4096, 64),
    )
}
"""`tiny` is the tiny checkpoint; `full` has the released numbers."""


def make_network(scale: Scale, name: FamilyName, device: torch.device) -> Network:
    """Return a network in float32 with random weights; of its text model only the width is that of `scale`."""
    family = FAMILIES[name]
    if scale.name == "tiny":
        with tempfile.TemporaryDirectory(prefix="pagereel-bench-") as folder:
            write_tiny_model(Path(folder), name)
            network = load_network(Path(folder), torch.float32, "sdpa")
        network.whole.to(device)
        return network
    with torch.device(device):
        whole: Any = network_class(family)(network_config(family, settings_of(scale, family)))  # type: ignore[arg-type]
    fill(whole, device)
    return parts_of(whole.eval(), family)


def settings_of(scale: Scale, family: Family) -> dict[str, Any]:
    """Return the `config.json` of a network of this scale, its text model as small as can be."""
    width = 1024 if family.connector == "merger" else scale.text_width
    text = {
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": 64,
        "layer_types": ["full_attention"],
    }
    vision = {
        "hidden_size": scale.width,
        "intermediate_size": scale.inner,
        "num_hidden_layers": scale.layers,
        "num_attention_heads": scale.heads,
        "image_size": POSITIONS_PX,
        "patch_size": PATCH_PX,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }
    if family.connector == "resampler":
        return text | {"vision_config": vision, "query_num": 64}
    return {
        "vision_config": vision,
        "text_config": text | {"model_type": family.backbone},
        "insert_layer_id": scale.merge_after,
        "image_token_id": 1,
        "video_token_id": 2,
    }


def fill(module: torch.nn.Module, device: torch.device) -> None:
    """Give every weight a random value of the size at which activations neither vanish nor grow."""
    generator = torch.Generator(device).manual_seed(46)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.normal_(generator=generator)
            if weight.dim() > 1:
                weight.mul_(0.7 / math.sqrt(weight.numel() / weight.shape[0]))
            elif name.endswith("bias"):
                weight.mul_(0.02)
            else:
                weight.mul_(0.05).add_(1)


def make_crops(scale: Scale, family: Family, count: int | None = None) -> list[Group]:
    """Return crops of mixed sizes, each a group of its own; as many as `scale` has, or `count`."""
    count = count or scale.crops
    generator = np.random.default_rng(46)
    if scale.patches_a_side:
        step = 4 if family.connector == "merger" else 1
        low, high = scale.patches_a_side
        grids = generator.integers(low // step, high // step, (count, 2), endpoint=True) * step
    else:
        known = MERGED_GRIDS if family.connector == "merger" else RESAMPLED_GRIDS
        grids = np.array([known[place % len(known)] for place in range(count)])
    return [Group(0, (picture(generator, *grid),), (NO_TIME,)) for grid in grids.tolist()]


def make_packs(scale: Scale, count: int | None = None) -> list[Group]:
    """Return frames of one size in packs with ascending times; as many as `scale` has crops, or `count`."""
    left = count or scale.crops
    generator = np.random.default_rng(45)
    grid = FRAME_GRID if scale.patches_a_side is None else scale.patches_a_side
    groups: list[Group] = []
    time = 0
    while left:
        own = min(FRAMES_A_PACK[len(groups) % len(FRAMES_A_PACK)], left)
        times = tuple(range(time, time + 3 * own, 3))
        groups.append(Group(0, tuple(picture(generator, *grid) for _ in times), times))
        left, time = left - own, time + 3 * own
    return groups


def picture(generator: np.random.Generator, rows: int, cols: int) -> NDArray[np.uint8]:
    """Return noise that is this many patches high and wide, (height, width, 3) uint8."""
    return generator.integers(0, 256, (rows * PATCH_PX, cols * PATCH_PX, 3), np.uint8)


def pass_flops(network: Network, family: Family, groups: list[Group], merge_levels: int) -> int:
    """Return the FLOPs of tower and connector for these groups, two for a multiply and an add."""
    lengths: list[int] = [part.shape[0] * part.shape[1] // PATCH_PX**2 for group in groups for part in group.slices]
    config, connector = network.tower.config, network.connector
    width, inner, layers = int(config.hidden_size), int(config.intermediate_size), int(config.num_hidden_layers)
    patches = sum(lengths)
    embedding = patches * 2 * 3 * PATCH_PX**2 * width
    if family.connector == "resampler":
        query_count, text_width = connector.query.shape
        packs = [group.patch_count(PATCH_PX) for group in groups]
        return (
            embedding
            + layers_flops(layers, lengths, width, inner)
            + resampler_flops(packs, width, int(query_count), int(text_width))
        )
    merger = 8 * width * (4 * width + int(connector.mlp[-1].linear_2.out_features))
    if merge_levels == 1:
        return embedding + layers_flops(layers, lengths, width, inner) + patches // 4 * merger
    before = int(config.insert_layer_id) + 1
    windows = patches * (8 * width**2 + 16 * width + 10 * inner * width)
    merged = [length // 4 for length in lengths]
    return (
        embedding
        + layers_flops(before, lengths, width, inner)
        + windows
        + layers_flops(layers - before, merged, width, inner)
        + patches // 16 * merger
    )


def layers_flops(layers: int, lengths: list[int], width: int, inner: int) -> int:
    """Return the FLOPs of layers of the tower for slices of so many patches each."""
    patches, pairs = sum(lengths), sum(length**2 for length in lengths)
    return layers * (patches * (8 * width**2 + 4 * width * inner) + 4 * pairs * width)


def resampler_flops(lengths: list[int], vision_width: int, query_count: int, width: int) -> int:
    """Return the FLOPs of the resampler for packs of so many patches each; the queries are projected once for all."""
    patches = sum(lengths)
    keys_and_values = patches * (2 * vision_width * width + 4 * width**2)
    attention = patches * 4 * query_count * width
    outputs = len(lengths) * query_count * 4 * width**2
    return keys_and_values + attention + outputs + query_count * 2 * width**2
