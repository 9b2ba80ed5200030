"""The text model on slots: transformers' layers, with attention and linear attention of ours that read and write slots.

Letters: `B` sequences, `T` tokens, `H` heads, `K` key-value heads, `C` channels, `D` width of a head.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import conv1d, scaled_dot_product_attention, silu, softplus
from transformers import AttentionInterface
from transformers.models.qwen3_5 import modeling_qwen3_5

from operators.minicpmv.slots import LINEAR, Call, SlotCache

ATTENTION: Final = "pagereel_slots"


def slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Return attention of the queries of the current call to what their slots hold.

    Shapes:
        query: (B, H, T, D).
        key, value: (B, K, stop, D).
        result: (B, T, H, D).
    """
    call: Call = rest["call"].on(query.device)
    if call.is_decode or (call.mask is not None and query.is_cuda):
        return grouped_attention(query, key, value, call.mask, scaling).transpose(1, 2), None
    attended = scaled_dot_product_attention(
        query, key, value, attn_mask=call.mask, is_causal=call.mask is None, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2), None


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Return attention with the heads that share a key-value head taken as further queries of it.

    No key is repeated. On a GPU no kernel of PyTorch takes both a mask and heads that share: it would compute, and
    keep, the scores of all queries and keys.

    Shapes:
        query, result: (B, H, T, D).
        key, value: (B, K, stop, D).
        mask: (T, stop) or (B, 1, 1, stop).
    """
    batch, heads, count, width = query.shape
    sharing = heads // key.shape[1]
    grouped = query.reshape(batch, key.shape[1], sharing * count, width)
    if mask is not None and count > 1:
        mask = mask.repeat(sharing, 1)
    attended: Tensor = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return attended.reshape(batch, heads, count, width)


AttentionInterface.register(ATTENTION, slot_attention)


def use_slots(text: Any) -> None:
    """Make a text model of transformers run on slots."""
    text.set_attn_implementation(ATTENTION)
    for layer in text.layers:
        mixer = getattr(layer, LINEAR.replace("attention", "attn"), None)
        if mixer is not None:
            mixer.forward = types.MethodType(linear_attention, mixer)


def run_text(text: Any, embeddings: Tensor, positions: Tensor, cache: SlotCache, call: Call) -> Tensor:
    """Return the hidden states after each token of a call, (B, T, width).

    Args:
        text: a text model that `use_slots` has prepared.
        embeddings: (B, T, width) of the tokens.
        positions: (B, T), or (3, B, T) where the model has three.
        cache: the slots.
        call: which of them.
    """
    cache.call = call
    output = text(
        inputs_embeds=embeddings,
        # A mask of four dimensions is handed on as it is; the call brings the one that counts.
        attention_mask=embeddings.new_zeros(1, 1, 1, 1),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        call=call,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def linear_attention(
    self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **rest: Any
) -> Tensor:
    """Stand in for the forward pass of a gated delta net: the same numbers, with its past in slots.

    Source:
        Gated Delta Networks (arXiv 2412.06464); transformers `models/qwen3_5/modeling_qwen3_5.py`.
    """
    cache: SlotCache = cache_params
    call: Call = rest["call"].on(hidden_states.device)
    batch, count, _ = hidden_states.shape
    mixed = convolve(self, self.in_proj_qkv(hidden_states).transpose(1, 2), cache.convolutions[self.layer_idx], call)
    query, key, value = mixed.transpose(1, 2).split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
    query = query.reshape(batch, count, -1, self.head_k_dim)
    key = key.reshape(batch, count, -1, self.head_k_dim)
    value = value.reshape(batch, count, -1, self.head_v_dim)
    rate = self.in_proj_b(hidden_states).sigmoid()
    decay = -self.A_log.float().exp() * softplus(self.in_proj_a(hidden_states).float() + self.dt_bias)
    states = cache.states[self.layer_idx]
    if call.is_decode:
        attended = step_states(query[:, 0], key[:, 0], value[:, 0], decay[:, 0], rate[:, 0], states[call.rows], call)
    else:
        attended, last = chunk_rule(query.device)(
            query,
            key,
            value,
            g=decay,
            beta=rate,
            initial_state=states[call.rows] if call.start else None,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        states[call.rows] = last
    gate = self.in_proj_z(hidden_states).reshape(-1, self.head_v_dim)
    normed = self.norm(attended.reshape(-1, self.head_v_dim), gate)
    mixed_out: Tensor = self.out_proj(normed.reshape(batch, count, -1))
    return mixed_out


def chunk_rule(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the gated delta rule over many tokens.

    Where flash-linear-attention is installed transformers takes its kernels, on every device; they run on GPUs alone.
    """
    rule: Callable[..., tuple[Tensor, Tensor]] = modeling_qwen3_5.torch_chunk_gated_delta_rule
    return rule if device.type == "cuda" else inspect.unwrap(rule)


def convolve(layer: Any, inputs: Tensor, kept: Tensor, call: Call) -> Tensor:
    """Return the causal convolution of each channel with its past, and keep the last inputs for the next call.

    Shapes:
        inputs: (B, C, T).
        kept: (S, C, kernel - 1) of all slots.
        result: (B, C, T).
    """
    weight = layer.conv1d.weight
    past = kept[call.rows] if call.start != 0 else inputs.new_zeros(inputs.shape[0], *kept.shape[1:])
    whole = torch.cat([past, inputs], dim=-1)
    last = whole[:, :, -kept.shape[2] :]
    kept[call.rows] = last if call.active is None else torch.where(call.active[:, None, None], last, past)
    if call.is_decode:
        return silu((whole * weight[:, 0]).sum(dim=-1, keepdim=True))
    return silu(conv1d(whole, weight, groups=whole.shape[1]))


def step_states(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, states: Tensor, call: Call
) -> Tensor:
    """Return the answer of each state to one token, and bring the states up to date in place.

    A state is read once for the query and the key together, and written twice; slots that only fill a gap neither
    decay nor take anything up.

    Shapes:
        query, key: (B, heads, D) before normalising.
        value: (B, value heads, Dv).
        decay, rate: (B, value heads), decay as a logarithm.
        states: (B, value heads, D, Dv) float32, changed.
        result: (B, value heads, Dv) in the dtype of `value`.
    """
    if call.active is not None:
        decay, rate = decay * call.active[:, None], rate * call.active[:, None]
    repeats = states.shape[1] // key.shape[1]
    both = torch.stack([unit(query) / query.shape[-1] ** 0.5, unit(key)], dim=2)
    if repeats > 1:
        both = both.repeat_interleave(repeats, dim=1)
    kept = decay.exp()[..., None]
    seen = torch.matmul(both, states) * kept[..., None]
    change = (value.float() - seen[:, :, 1]) * rate.float()[..., None]
    states.mul_(kept[..., None]).addcmul_(both[:, :, 1, :, None], change[:, :, None, :])
    overlap = (both[:, :, 0] * both[:, :, 1]).sum(dim=-1, keepdim=True)
    return (seen[:, :, 0] + overlap * change).to(value.dtype)


def unit(vectors: Tensor) -> Tensor:
    """Return float32 vectors of length one, as the released layers normalise them."""
    exact = vectors.float()
    return exact * torch.rsqrt((exact * exact).sum(dim=-1, keepdim=True) + 1e-6)
