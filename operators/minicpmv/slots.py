"""What a running sequence leaves behind in every layer, kept in slots: keys and values, convolutions and states.

A slot belongs to one request from its first prompt token to its last answer token; nothing is padded, and nothing is
copied when a neighbour comes or goes.

Letters: `S` slots, `B` sequences of a call, `T` tokens, `H` heads, `K` key-value heads, `C` channels, `D` width of a
head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

LINEAR: Final = "linear_attention"
GROWTH_TOKENS: Final = 256


@dataclass(frozen=True)
class Call:
    """Which slots one pass through the text model reads and writes.

    Attributes:
        rows: the slots, as a slice where they are neighbours, else as (B,) int64.
        start: tokens that a prefilled slot already holds; None when each slot gets one token where its own end is.
        stop: tokens that the longest slot holds afterwards.
        ends: (B,) int64 tokens that each slot holds before; None while prefilling.
        active: (B,) bool, False for slots that only fill a gap; None when all are meant.
        device: where the tensors are.
        mask: added to the scores: (B, 1, 1, stop) while decoding, (T, stop) while prefilling; None: not needed.
    """

    rows: slice | Tensor
    start: int | None
    stop: int
    device: torch.device
    ends: Tensor | None = None
    active: Tensor | None = None
    mask: Tensor | None = None
    moved: dict[torch.device, "Call"] = field(default_factory=dict, compare=False)

    def on(self, device: torch.device) -> "Call":
        """Return this call with its tensors on `device`; layers may be spread over several."""
        if device == self.device:
            return self
        if device not in self.moved:
            own = {name: getattr(self, name) for name in ("rows", "ends", "active", "mask")}
            there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in own.items()}
            self.moved[device] = replace(self, device=device, moved={}, **there)
        return self.moved[device]

    @property
    def is_decode(self) -> bool:
        """Return whether each slot gets one token."""
        return self.start is None


class SlotCache:
    """Buffers of all layers for a number of slots.

    It stands in the place of transformers' cache: attention layers hand their keys and values to `update`.

    Args:
        config: of the text model.
        slot_count: most sequences at once.
        capacity_tokens: tokens a slot can hold; grows when more are asked for.
        devices: where each layer is.
        dtype: of keys, values and convolutions; states are float32.
    """

    def __init__(
        self,
        config: Any,
        slot_count: int,
        capacity_tokens: int,
        devices: Sequence[torch.device],
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.slot_count = slot_count
        self.capacity_tokens = capacity_tokens
        self.kinds: list[str] = list(getattr(config, "layer_types", None) or ["full_attention"])
        if len(self.kinds) != config.num_hidden_layers:
            self.kinds = ["full_attention"] * config.num_hidden_layers
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.convolutions: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}
        self.call: Call | None = None
        for layer, (kind, device) in enumerate(zip(self.kinds, devices, strict=True)):
            if kind == LINEAR:
                self.convolutions[layer] = torch.zeros(
                    slot_count, conv_channels(config), config.linear_conv_kernel_dim - 1, dtype=dtype, device=device
                )
                self.states[layer] = torch.zeros(slot_count, *state_shape(config), device=device)
            else:
                shape = (slot_count, config.num_key_value_heads, capacity_tokens, head_width(config))
                self.keys[layer] = torch.zeros(shape, dtype=dtype, device=device)
                self.values[layer] = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values of the current call; return those that its queries may see.

        Shapes:
            keys, values: (B, K, T, D).
            result: (B, K, stop, D) each.
        """
        call = self.current.on(keys.device)
        stored: list[Tensor] = []
        for buffer, fresh in ((self.keys[layer_idx], keys), (self.values[layer_idx], values)):
            if call.is_decode:
                own = buffer[call.rows]
                own[torch.arange(len(own), device=own.device), :, call.ends] = fresh[:, :, 0]
                stored.append(own[:, :, : call.stop])
            else:
                buffer[call.rows, :, call.start : call.stop] = fresh
                stored.append(fresh if call.start == 0 else buffer[call.rows, :, : call.stop])
        return stored[0], stored[1]

    @property
    def current(self) -> Call:
        """Return the call under way."""
        assert self.call is not None, "no call is under way"
        return self.call

    def grow(self, capacity_tokens: int) -> None:
        """Make room for sequences of this length, if there is not."""
        if capacity_tokens <= self.capacity_tokens:
            return
        wanted = -(-capacity_tokens // GROWTH_TOKENS) * GROWTH_TOKENS
        for buffers in (self.keys, self.values):
            for layer, old in list(buffers.items()):
                fresh = old.new_zeros(*old.shape[:2], wanted, old.shape[3])
                fresh[:, :, : old.shape[2]] = old
                buffers[layer] = fresh
        # Last: where memory runs out between two layers, the room is what all of them have.
        self.capacity_tokens = wanted

    def move(self, source: int, target: int, token_count: int) -> None:
        """Copy what one slot holds into another."""
        for buffers in (self.keys, self.values):
            for buffer in buffers.values():
                buffer[target, :, :token_count] = buffer[source, :, :token_count]
        for buffers in (self.convolutions, self.states):
            for buffer in buffers.values():
                buffer[target] = buffer[source]

    def byte_count(self) -> int:
        """Return the bytes of all buffers."""
        groups = (self.keys, self.values, self.convolutions, self.states)
        return sum(buffer.nbytes for buffers in groups for buffer in buffers.values())


def head_width(config: Any) -> int:
    """Return the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def conv_channels(config: Any) -> int:
    """Return the channels that the convolution of a linear-attention layer mixes in time."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    return int(2 * keys + config.linear_num_value_heads * config.linear_value_head_dim)


def state_shape(config: Any) -> tuple[int, int, int]:
    """Return heads, key width and value width of the state of a linear-attention layer."""
    return (config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim)


def slot_bytes(config: Any, capacity_tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of one slot."""
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    linear = kinds.count(LINEAR)
    full = (len(kinds) - linear) * 2 * config.num_key_value_heads * head_width(config) * capacity_tokens
    total = full * dtype.itemsize
    if linear:
        heads, keys, values = state_shape(config)
        convolution = conv_channels(config) * (config.linear_conv_kernel_dim - 1) * dtype.itemsize
        total += linear * (heads * keys * values * 4 + convolution)
    return int(total)


def decode_call(ends: Sequence[int], active: Sequence[bool], device: torch.device, dtype: torch.dtype) -> Call:
    """Return the call that gives one token to each of the first slots.

    Args:
        ends: tokens that each slot holds.
        active: whether a slot gets a token of its own; others are computed along and left as they are.
        device: where the tensors go.
        dtype: of the scores.
    """
    stop = max((end for end, used in zip(ends, active, strict=True) if used), default=0) + 1
    # What a gap writes at its own end is written over by whoever comes next.
    places = torch.tensor(list(ends))
    seen = torch.arange(stop)[None, :] <= places[:, None]
    mask = None
    if not bool(seen.all()):
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)[:, None, None, :].to(device)
    return Call(
        rows=slice(0, len(ends)),
        start=None,
        stop=stop,
        device=device,
        ends=places.to(device),
        active=None if all(active) else torch.tensor(list(active), device=device),
        mask=mask,
    )


def prefill_call(slots: Sequence[int], start: int, count: int, device: torch.device, dtype: torch.dtype) -> Call:
    """Return the call that gives `count` tokens to slots that hold `start` each."""
    stop = start + count
    first, last = min(slots), max(slots)
    neighbours = list(slots) == list(range(first, last + 1))
    rows = slice(first, last + 1) if neighbours else torch.tensor(list(slots), device=device)
    mask = None
    if start:
        seen = torch.arange(stop, device=device)[None, :] <= torch.arange(start, stop, device=device)[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
    return Call(rows=rows, start=start, stop=stop, device=device, mask=mask)
