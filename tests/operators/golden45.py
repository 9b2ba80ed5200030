"""The golden file of MiniCPM-V 4.5 (see tests/data/README.md): its network, refilled, and its inputs."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from operators.minicpmv.family import FAMILIES
from operators.minicpmv.network import ResamplerNetwork, network_config, parts_of
from operators.minicpmv.slicing import SliceConfig, slice_image

PATH = Path(__file__).parents[1] / "data" / "golden" / "minicpmv45_tiny.safetensors"
FAMILY = FAMILIES["minicpmv4_5"]


def tensors():
    return load_file(PATH)


def network():
    """The network whose numbers the file holds; the weights follow from their names by the file's rule."""
    with safe_open(PATH, "np") as file:
        facts = file.metadata()
    config = network_config(FAMILY, json.loads(facts["config"]))
    config.text_config._attn_implementation = "eager"
    whole = ResamplerNetwork(config).eval()
    weights = whole.state_dict()
    assert sorted(weights) == sorted(json.loads(facts["param_names"]))
    for name, tensor in weights.items():
        tensor.copy_(torch.from_numpy(filled(name, tuple(tensor.shape))))
    return parts_of(whole, FAMILY)


def filled(name, shape):
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return noise * np.float32(0.7 / math.sqrt(math.prod(shape) / shape[0]))
    return noise * np.float32(0.02) if name.endswith("bias") else 1 + noise * np.float32(0.05)


def noise_image(height_px, width_px, seed):
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), np.uint8)


def page_slices():
    """The nine crops of the three images of part A."""
    config = SliceConfig(query_count=64)
    sizes = ((700, 1000, 1), (300, 220, 2), (350, 600, 3))
    return [part for size in sizes for part in slice_image(noise_image(*size), config).slices]


def clip_packs():
    """Frames and temporal ids of the five packs of the two clips of part B."""
    config = SliceConfig(query_count=64, max_slices=1)
    first = [slice_image(noise_image(240, 426, 100 + index), config).slices[0] for index in range(7)]
    second = [slice_image(noise_image(500, 300, 200 + index), config).slices[0] for index in range(4)]
    return [
        (first[:3], (0, 2, 4)),
        (first[3:6], (6, 8, 10)),
        (first[6:], (12,)),
        (second[:2], (3, 5)),
        (second[2:], (9, 700)),
    ]


def odd_patches():
    """The patches of part C, a 25 x 41 grid of noise: (N, 588) float32."""
    pixels = np.random.default_rng(77).standard_normal((1, 3, 14, 14 * 25 * 41)).astype(np.float32)
    return torch.from_numpy(pixels).reshape(3, 14, 25 * 41, 14).permute(2, 1, 3, 0).reshape(25 * 41, -1)
