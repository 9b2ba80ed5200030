"""How many slots there is memory for, beside the weights and what a pass needs."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from operators.minicpmv.memory import SPARE
from operators.minicpmv.slots import layer_bytes, rounded_up


def free_bytes(device: torch.device, share: float) -> int | None:
    """Return the bytes that this process may still take on a device; None for a CPU, whose memory is everybody's.

    What PyTorch holds and does not use is free.

    Args:
        device: which one.
        share: of a GPU's whole memory that this process may fill; others have the rest.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    return int(min(free + torch.cuda.memory_reserved(device), share * total) - used)


def keep_to_share(devices: Sequence[torch.device], share: float) -> None:
    """Let memory run out for this process, not for its neighbours, where it wants more than its share of a GPU."""
    for device in devices:
        if device.type == "cuda" and share < 1:
            torch.cuda.set_per_process_memory_fraction(share, device.index or 0)


class SlotBudget:
    """Memory that slots may take on the devices of a text model's layers.

    Args:
        config: of the text model.
        devices: where each layer is.
        dtype: of keys, values and convolutions.
        share: of each GPU that this process may fill.
        pass_bytes: that the widest pass needs beside the slots.
        row_bytes: that a pass needs for each slot.
        measure: `free_bytes`, or what stands in for it.
    """

    def __init__(
        self,
        config: Any,
        devices: Sequence[torch.device],
        dtype: torch.dtype,
        *,
        share: float,
        pass_bytes: int,
        row_bytes: int,
        measure: Callable[[torch.device, float], int | None] = free_bytes,
    ) -> None:
        self.config = config
        self.devices = tuple(devices)
        self.dtype = dtype
        self.share = share
        self.pass_bytes = pass_bytes
        self.row_bytes = row_bytes
        self.measure = measure
        self._rooms: dict[torch.device, int] | None = None

    def forget(self) -> None:
        """Measure again before the next answer: memory has run out, so others have taken some."""
        self._rooms = None

    def slots_that_fit(self, token_count: int, opened_slots: int, opened_tokens: int) -> int | None:
        """Return how many slots of this length fit in the place of those that are open; None where nothing bounds them.

        Free memory is measured once: what a pass holds for a moment must not change the plan.
        """
        if self._rooms is None:
            self._rooms = self._measured(opened_slots, opened_tokens)
        needed = self._bytes_of_slot(rounded_up(token_count))
        counts = [room // (needed[device] + self.row_bytes) for device, room in self._rooms.items()]
        return max(0, min(counts)) if counts else None

    def _measured(self, opened_slots: int, opened_tokens: int) -> dict[torch.device, int]:
        taken = self._bytes_of_slot(opened_tokens)
        rooms: dict[torch.device, int] = {}
        for device in taken:
            free = self.measure(device, self.share)
            if free is not None:
                rooms[device] = int((free + opened_slots * taken[device]) * (1 - SPARE)) - self.pass_bytes
        return rooms

    def _bytes_of_slot(self, token_count: int) -> Counter[torch.device]:
        totals: Counter[torch.device] = Counter()
        for device, count in zip(self.devices, layer_bytes(self.config, token_count, self.dtype), strict=True):
            totals[device] += count
        return totals
