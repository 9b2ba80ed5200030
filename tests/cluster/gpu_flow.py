"""A flow with a step that takes a GPU, for clusters whose GPUs do not exist: `python -m tests.cluster.gpu_flow FOLDER`.

Each unit takes a moment, and says on which host it was worked on. The host's address goes into FOLDER as soon as its
worker is built; the driver prints the rows at the end.
"""

import sys
import time
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import ray

from operators.base import Operator, OperatorConfig, rows_to_table
from pipeline.executor import RayExecutor
from pipeline.spec import make_spec
from pipeline.step import Flow, Step
from schemas.source import UNIT

UNITS = 40
ANSWER = pa.schema([pa.field("unit_id", pa.string()), pa.field("host", pa.string()), pa.field("gpus", pa.string())])


class SlowConfig(OperatorConfig):
    """Where a worker leaves its address."""

    folder: str


class TakesGpu(Operator[SlowConfig]):
    """Stands for a model: one unit at a time, and no GPU is touched."""

    reads: ClassVar[pa.Schema] = UNIT
    adds: ClassVar[pa.Schema] = ANSWER
    replaces: ClassVar[bool] = True

    def __init__(self, config: SlowConfig) -> None:
        super().__init__(config)
        self._host = ray.util.get_node_ip_address()
        (Path(config.folder) / self._host).touch()

    def process(self, table: pa.Table) -> pa.Table:
        """Return the host beside each unit."""
        time.sleep(0.3)
        gpus = str(ray.get_gpu_ids())
        rows = [{"unit_id": unit, "host": self._host, "gpus": gpus} for unit in table["unit_id"].to_pylist()]
        return rows_to_table(rows, ANSWER)


class PassOn(Operator[OperatorConfig]):
    """Stands for a decoder: another pool before the one with the GPU, whose blocks a lost host takes along."""

    reads: ClassVar[pa.Schema] = UNIT
    adds: ClassVar[pa.Schema] = pa.schema([])

    def process(self, table: pa.Table) -> pa.Table:
        """Return `table`."""
        return table


def main(folder: str) -> None:
    """Run the flow and print each unit with its host."""
    executor = RayExecutor(make_spec({"task": "ocr", "inputs": ["-"], "output": "-", "address": "auto"}))
    executor.start()
    units = [executor.hold(rows_to_table([{"unit_id": f"u{n:02}"}], UNIT)) for n in range(UNITS)]
    model = Step(TakesGpu, SlowConfig(folder=folder), cpus=0.5, gpus=1.0, rows_per_batch=1)
    flow = Flow(heads={"documents": [Step(PassOn, OperatorConfig(), cpus=0.5, rows_per_batch=1)]}, trunk=[model])
    for table in executor.run(flow, {"documents": units}):
        for row in table.to_pylist():
            sys.stdout.write(f"ROW {row['unit_id']} {row['host']} {row['gpus']}\n")
    executor.close()


if __name__ == "__main__":
    main(sys.argv[1])
