"""Attention and the gated delta rule as they run on one device and another."""

import functools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen3_5 import modeling_qwen3_5

from operators.minicpmv.language import chunk_rule, grouped_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LARGEST_DIFFERENCE = 1e-5


def noise(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hidden_from(seen):
    return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)


@pytest.mark.parametrize(("heads", "shared"), [(8, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize(("count", "stop"), [(1, 9), (5, 12), (64, 64)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_heads_that_share_keys_attend_as_if_each_had_its_own(heads, shared, count, stop, scaling):
    query = noise(3, heads, count, 16, seed=1)
    key, value = noise(3, shared, stop, 16, seed=2), noise(3, shared, stop, 16, seed=3)
    repeated = [tensor.repeat_interleave(heads // shared, dim=1) for tensor in (key, value)]
    masks = [None] if count == 1 else []
    if count > 1:
        masks.append(hidden_from(torch.arange(stop)[None, :] <= torch.arange(stop - count, stop)[:, None]))
    else:
        masks.append(hidden_from(torch.arange(stop)[None, :] <= torch.tensor([2, 0, 8])[:, None])[:, None, None, :])
    for mask in masks:
        found = grouped_attention(query, key, value, mask, scaling)
        wanted = scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=scaling)
        assert float((found - wanted).abs().max()) < LARGEST_DIFFERENCE


def test_kernels_that_transformers_finds_are_left_to_gpus(monkeypatch):
    def in_torch():
        return "torch"

    @functools.wraps(in_torch)
    def kernel():
        return "kernel"

    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", kernel)
    assert chunk_rule(CPU)() == "torch"
    assert chunk_rule(CUDA)() == "kernel"


def test_the_rule_of_a_cpu_is_the_one_that_transformers_publishes():
    shape = (2, 70, 3, 8)
    query, key, value = (noise(*shape, seed=seed) for seed in range(3))
    decay, rate = -noise(*shape[:3], seed=4).abs(), noise(*shape[:3], seed=5).sigmoid()
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    found, state = chunk_rule(CPU)(query, key, value, g=decay, beta=rate, **options)
    wanted, last = modeling_qwen3_5.torch_recurrent_gated_delta_rule(
        query, key, value, g=decay, beta=rate, initial_state=None, **options
    )
    assert float((found - wanted).abs().max()) < LARGEST_DIFFERENCE
    assert float((state - last).abs().max()) < LARGEST_DIFFERENCE
