"""One model over several devices, for cards too small for all of it: each has a run of the text model's layers.

Tower, connector and embeddings are on the first device, the last norm and the head on the last; a head that is tied to
the embeddings stays with them. Work goes through the devices one after the other, so this makes room and no speed.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from operators.minicpmv.network import Network


def split_layers(layer_bytes: Sequence[int], first_bytes: int, last_bytes: int, device_count: int) -> list[int]:
    """Return the number of the device of each layer: runs that make all devices hold about as much.

    Args:
        layer_bytes: of each layer, in order.
        first_bytes: what the first device holds anyway.
        last_bytes: what the last one holds anyway.
        device_count: devices there are.
    """
    share = (first_bytes + sum(layer_bytes) + last_bytes) / device_count
    starts = [first_bytes + before for before in accumulate(layer_bytes, initial=0)]
    centres = [start + size / 2 for start, size in zip(starts, layer_bytes, strict=False)]
    return [min(int(centre / share), device_count - 1) for centre in centres]


def spread_network(network: Network, devices: Sequence[torch.device]) -> None:
    """Move the parts of `network` to `devices`, the first to the last, and let the tensors of each call follow."""
    first, last = devices[0], devices[-1]
    is_tied = network.head.weight is network.embed.weight
    at_first = [network.tower, network.connector, network.embed, network.text.rotary_emb]
    at_last = [network.text.norm]
    (at_first if is_tied else at_last).append(network.head)
    layers = list(network.text.layers)
    places = split_layers(
        [byte_count([layer]) for layer in layers], byte_count(at_first), byte_count(at_last), len(devices)
    )
    for part in at_first:
        part.to(first)
    for part in at_last:
        part.to(last)
    for layer, place in zip(layers, places, strict=True):
        layer.to(devices[place])
    for number, device in enumerate(devices):
        follow([layer for layer, place in zip(layers, places, strict=True) if place == number], device)
    follow([network.text.norm], last)
    follow([network.head], first if is_tied else last)


def byte_count(modules: Sequence[nn.Module]) -> int:
    """Return the bytes of the weights of `modules`, shared ones once."""
    tensors = {id(tensor): tensor for module in modules for tensor in module.parameters()}
    return sum(tensor.nbytes for tensor in tensors.values())


def follow(modules: Sequence[nn.Module], device: torch.device) -> None:
    """Let whatever these modules are called with follow to their device."""
    bring = Bring(device)
    for module in modules:
        module.register_forward_pre_hook(bring, with_kwargs=True)
    if modules:
        # After a pass for the memory's sake, and before one for that of a pass that broke off.
        modules[0].register_forward_pre_hook(bring.forget, prepend=True)
        modules[-1].register_forward_hook(bring.forget)


class Bring:
    """Brings the tensors of a call to one device.

    Masks and positions are the same for every layer: they cross once a pass, not once a layer.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.brought: dict[int, tuple[Any, Any]] = {}

    def forget(self, *_: Any) -> None:
        """Let go of what the last pass brought."""
        self.brought.clear()

    def __call__(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the arguments of a module on its device."""
        moved = {name: self.bring(value) for name, value in named.items()}
        return tuple(self.bring(value) for value in args), moved

    def bring(self, value: Any) -> Any:
        """Return `value` on the device: a tensor, a tuple of them, or anything else as it is."""
        if isinstance(value, tuple):
            return tuple(self.bring(part) for part in value)
        if not isinstance(value, Tensor) or value.device == self.device:
            return value
        if id(value) not in self.brought:
            # The tensor is kept as well, so that no other can take its number.
            self.brought[id(value)] = (value, value.to(self.device))
        return self.brought[id(value)][1]
