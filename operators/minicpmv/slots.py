"""What a running sequence leaves behind in every layer, kept in slots: keys and values, convolutions and states.

A slot belongs to one request from its first prompt token to its last answer token; nothing is padded, and nothing is
copied when a neighbour comes or goes.

Letters: `S` slots, `B` sequences of a call, `T` tokens, `H` heads, `K` key-value heads, `C` channels, `D` width of a
head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from operators.transfer import on_device

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
        order: (B,) int64 from 0 on, beside `ends`.
        active: (B,) bool, False for slots that only fill a gap; None when all are meant.
        device: where the tensors are.
        keeps_gaps: whether slots that are not active keep all that they hold; else what they hold at `ends` is lost.
        mask: added to the scores: (B, 1, 1, stop) while decoding, (T, stop) while prefilling; None: not needed.
    """

    rows: slice | Tensor
    start: int | None
    stop: int
    device: torch.device
    ends: Tensor | None = None
    order: Tensor | None = None
    active: Tensor | None = None
    mask: Tensor | None = None
    keeps_gaps: bool = False
    moved: dict[torch.device, "Call"] = field(default_factory=dict, compare=False)

    def on(self, device: torch.device) -> "Call":
        """Return this call with its tensors on `device`; layers may be spread over several."""
        if device == self.device:
            return self
        if device not in self.moved:
            own = {name: getattr(self, name) for name in ("rows", "ends", "order", "active", "mask")}
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
        capacity_tokens: tokens a slot can hold.
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
        self.kinds: list[str] = layer_kinds(config)
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
                token = fresh[:, :, 0]
                if call.keeps_gaps and call.active is not None:
                    token = torch.where(call.active[:, None, None], token, own[call.order, :, call.ends])
                own[call.order, :, call.ends] = token
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

    def holds(self, slot_count: int, capacity_tokens: int) -> bool:
        """Return whether there are exactly so many slots, with room for so many tokens."""
        return slot_count == self.slot_count and capacity_tokens <= self.capacity_tokens

    def resize(self, slot_count: int, capacity_tokens: int) -> None:
        """Have so many slots with room for sequences of this length; the first ones keep what they hold.

        As many slots as before keep more room where they have it. A layer is made anew after the other, so that memory
        for one more is needed, not for all twice.
        """
        if self.holds(slot_count, capacity_tokens):
            return
        wanted = rounded_up(capacity_tokens)
        # Where memory runs out between two layers, there is what all of them have.
        self.slot_count, aim = min(slot_count, self.slot_count), slot_count
        self.capacity_tokens = min(wanted, self.capacity_tokens)
        for buffers in (self.keys, self.values):
            for layer, old in list(buffers.items()):
                buffers[layer] = resized(old, (slot_count, old.shape[1], wanted, old.shape[3]))
        for buffers in (self.convolutions, self.states):
            for layer, old in list(buffers.items()):
                buffers[layer] = resized(old, (slot_count, *old.shape[1:]))
        self.slot_count, self.capacity_tokens = aim, wanted

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


def rounded_up(token_count: int) -> int:
    """Return the room that slots get which are made anew for so many tokens."""
    return -(-token_count // GROWTH_TOKENS) * GROWTH_TOKENS


def resized(old: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor of another shape with what fits of the old one at its beginning, zeros elsewhere."""
    if tuple(shape) == tuple(old.shape):
        return old
    fresh = old.new_zeros(*shape)
    kept = tuple(slice(0, min(before, after)) for before, after in zip(old.shape, shape, strict=True))
    fresh[kept] = old[kept]
    return fresh


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


def layer_kinds(config: Any) -> list[str]:
    """Return of each layer whether it keeps keys and values, or a convolution and a state."""
    kinds = list(getattr(config, "layer_types", None) or [])
    return kinds if len(kinds) == config.num_hidden_layers else ["full_attention"] * config.num_hidden_layers


def layer_bytes(config: Any, capacity_tokens: int, dtype: torch.dtype) -> list[int]:
    """Return the bytes of one slot in each layer."""
    full = 2 * config.num_key_value_heads * head_width(config) * capacity_tokens * dtype.itemsize
    linear = 0
    kinds = layer_kinds(config)
    if LINEAR in kinds:
        kept = conv_channels(config) * (config.linear_conv_kernel_dim - 1)
        linear = math.prod(state_shape(config)) * torch.float32.itemsize + kept * dtype.itemsize
    return [linear if kind == LINEAR else full for kind in kinds]


def slot_bytes(config: Any, capacity_tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of one slot."""
    return sum(layer_bytes(config, capacity_tokens, dtype))


def decode_call(
    ends: Sequence[int],
    active: Sequence[bool],
    device: torch.device,
    dtype: torch.dtype,
    numbers: Tensor | None = None,
) -> Call:
    """Return the call that gives one token to each of the first slots.

    Args:
        ends: tokens that each slot holds.
        active: whether a slot gets a token of its own; others are computed along and left as they are.
        device: where the tensors go.
        dtype: of the scores.
        numbers: (2, B) int64, both of these on the device; None: they are not there yet.
    """
    numbers = on_device([ends, active], device) if numbers is None else numbers
    stop = max((end for end, used in zip(ends, active, strict=True) if used), default=0) + 1
    return Call(
        rows=slice(0, len(ends)),
        start=None,
        stop=stop,
        device=device,
        # What a gap writes at its own end is written over by whoever comes next.
        ends=numbers[0],
        order=torch.arange(len(ends), device=device),
        active=None if all(active) else numbers[1].bool(),
        mask=step_mask(numbers[0], stop, dtype) if any(end + 1 < stop for end in ends) else None,
    )


def padded_call(ends: Tensor, active: Tensor, stop: int, dtype: torch.dtype) -> Call:
    """Return the call that gives one token to each active one of the first slots, made of tensors alone.

    Its shapes are those of its arguments, whatever they hold, and slots that are not active keep all that they hold:
    it can be recorded once and replayed with other numbers.

    Args:
        ends: (B,) int64 tokens that each slot holds; any where it is not active.
        active: (B,) bool.
        stop: positions that are read, at least one more than any active slot holds.
        dtype: of the scores.
    """
    return Call(
        rows=slice(0, len(ends)),
        start=None,
        stop=stop,
        device=ends.device,
        ends=ends,
        order=torch.arange(len(ends), device=ends.device),
        active=active,
        mask=step_mask(ends, stop, dtype),
        keeps_gaps=True,
    )


def step_mask(ends: Tensor, stop: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores of a step: each slot sees what it holds and its new token.

    Shapes:
        ends: (B,) int64.
        result: (B, 1, 1, stop), 0 or minus infinity.
    """
    hidden = torch.arange(stop, device=ends.device)[None, :] > ends[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=ends.device).masked_fill_(hidden, -torch.inf)[:, None, None, :]


def prefill_call(slots: Sequence[int], start: int, count: int, device: torch.device, dtype: torch.dtype) -> Call:
    """Return the call that gives `count` tokens to slots that hold `start` each."""
    stop = start + count
    first, last = min(slots), max(slots)
    neighbours = list(slots) == list(range(first, last + 1))
    rows = slice(first, last + 1) if neighbours else on_device(slots, device)
    mask = None
    if start:
        seen = torch.arange(stop, device=device)[None, :] <= torch.arange(start, stop, device=device)[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
    return Call(rows=rows, start=start, stop=stop, device=device, mask=mask)
