"""Small numbers on their way from the host to the device that computes."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def on_device(numbers: Sequence[int] | Sequence[Sequence[int]] | NDArray[np.int64], device: torch.device) -> Tensor:
    """Return whole numbers as int64 on a device, in one transfer.

    Neither waits for the other: from pinned memory the copy runs in the order of the device's own work.
    """
    made = torch.as_tensor(numbers, dtype=torch.int64)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)
