"""Steps of decoding in shapes that come again, recorded as CUDA graphs and replayed.

A step of a text model is some hundred small kernels; launching them takes a host longer than a GPU needs to run them.
A graph launches all of them at once, on the tensors that it was recorded with. So steps are padded to few shapes:
with rows that are not active, and with cache positions that nobody sees.

Letters: `B` slots of a step, `V` tokens of the vocabulary.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from operators.transfer import on_device

logger = logging.getLogger(__name__)

FEW_ROWS: Final = 8
"""Up to here numbers of rows double, then they grow by as many."""

STOP_STEP: Final = 256
"""Cache positions by which steps are padded: about a tenth is read in vain at the length of a page and its answer."""

RECORD_AFTER: Final = 8
"""Steps of a shape before it is recorded, which takes as long as some of them."""

MOST_GRAPHS: Final = 64
"""Each holds the results of a step, and what the driver needs."""

NOT_RECORDED: Final = (RuntimeError, ValueError, TypeError, KeyError)
"""What recording may raise: a kernel that cannot be recorded, a number that the host must know, memory."""


@dataclass(frozen=True)
class Shape:
    """What steps are padded to: slots, and positions of each that are read."""

    rows: int
    stop: int


@dataclass(frozen=True)
class Recorded:
    """A step on tensors of its own.

    Attributes:
        numbers: (4, B) int64 that it reads: token, position, end and whether it is active, of each slot.
        run: does it, and returns the logits, (B, V); they are written over by the next step of any shape.
    """

    numbers: Tensor
    run: Callable[[], Tensor]


class DecodeGraphs:
    """Records steps that come often.

    Args:
        step: takes (4, B) numbers and the positions that are read, and returns logits. Slots that are not active must
            be left as they are.
        device: where it runs. On a CPU nothing is recorded: the padded step runs as it is.
        record_after: steps of a shape before it is recorded.
    """

    def __init__(
        self, step: Callable[[Tensor, int], Tensor], device: torch.device, record_after: int = RECORD_AFTER
    ) -> None:
        self.step = step
        self.device = device
        self.record_after = record_after
        self.is_usable = True
        self._uses: Counter[Shape] = Counter()
        self._recorded: dict[Shape, Recorded] = {}
        self._pool: Any = None
        self._stream: Any = None

    def forget(self) -> None:
        """Drop what was recorded: the buffers of the slots are others now."""
        self._uses.clear()
        self._recorded.clear()
        self._pool = None

    def run(self, numbers: Sequence[Sequence[int]], shape: Shape) -> Tensor | None:
        """Return the logits of a step, (B, V), or None where it is not recorded and must be run as it is.

        Args:
            numbers: token, position, end and whether it is active, of each of the first slots.
            shape: at least as large, see `padded_shape`.
        """
        recorded = self._recorded.get(shape) or self._record(shape)
        if recorded is None:
            return None
        count = len(numbers[0])
        padding = [0] * (shape.rows - count)
        recorded.numbers.copy_(on_device([[*row, *padding] for row in numbers], self.device))
        return recorded.run()[:count]

    def _record(self, shape: Shape) -> Recorded | None:
        self._uses[shape] += 1
        if not self.is_usable or self._uses[shape] < self.record_after or len(self._recorded) >= MOST_GRAPHS:
            return None
        numbers = torch.zeros(4, shape.rows, dtype=torch.int64, device=self.device)
        if self.device.type != "cuda":
            recorded = Recorded(numbers, lambda: self.step(numbers, shape.stop))
        else:
            try:
                recorded = self._record_on_gpu(numbers, shape)
            except NOT_RECORDED as error:
                self.is_usable = False
                self.forget()
                logger.warning("steps are launched kernel by kernel, as they cannot be recorded: %s", error)
                return None
        self._recorded[shape] = recorded
        return recorded

    def _record_on_gpu(self, numbers: Tensor, shape: Shape) -> Recorded:
        usual = torch.cuda.current_stream(self.device)
        # Graphs that share memory are to be recorded on one stream.
        stream = self._stream = self._stream or torch.cuda.Stream(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # No slot is active yet: what runs here, so that libraries have set themselves up, changes nothing.
            stream.wait_stream(usual)
            with torch.cuda.stream(stream):
                self.step(numbers, shape.stop)
            usual.wait_stream(stream)
            # Threads that prepare other batches may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                logits = self.step(numbers, shape.stop)
        finally:
            # A recording that fails leaves its own stream in the place of the usual one.
            torch.cuda.set_stream(usual)
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return Recorded(numbers, replay)


def padded_shape(row_count: int, stop: int, slot_count: int, capacity_tokens: int) -> Shape:
    """Return the shape to which a step is padded, within the slots that there are."""
    rows = 1 << (row_count - 1).bit_length() if row_count <= FEW_ROWS else -(-row_count // FEW_ROWS) * FEW_ROWS
    return Shape(min(rows, slot_count), min(-(-stop // STOP_STEP) * STOP_STEP, capacity_tokens))
