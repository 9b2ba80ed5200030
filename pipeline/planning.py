"""The step that plans: sources in, plan parts written, counts out."""

from typing import Annotated, Any, ClassVar, Final

import pyarrow as pa
from pydantic import Field

from operators.base import Operator, OperatorConfig, rows_to_table
from operators.probe import ProbeConfig, ProbeSources
from pipeline.plan import write_plan_part
from pipeline.storage import Storage
from schemas.source import SOURCE

PLANNED: Final = pa.schema(
    [
        pa.field("source_index", pa.int64()),
        pa.field("unit_count", pa.int32()),
        pa.field("record_count", pa.int64()),
        pa.field("kind", pa.string()),
        pa.field("error_code", pa.string()),
    ]
)
"""One row a source: what the driver counts while the plan grows."""


class PlanSourcesConfig(OperatorConfig):
    """How sources are probed, and where their units are written."""

    probe: ProbeConfig
    run_uri: Annotated[str | None, Field(description="Run whose plan grows; None writes nothing.")] = None
    settings_digest: Annotated[str, Field(description="Of everything that shapes units and record keys.")]
    part_number: Annotated[int | None, Field(description="As `write_plan_part` takes it.")] = None


class PlanSources(Operator[PlanSourcesConfig]):
    """Probe a batch of sources, write all of their units as one plan part, and return one count row a source.

    The units never pass through the driver. A batch that is probed twice writes two equal parts, of which readers
    take the newest.
    """

    reads: ClassVar[pa.Schema] = SOURCE
    adds: ClassVar[pa.Schema] = PLANNED
    replaces: ClassVar[bool] = True

    def __init__(self, config: PlanSourcesConfig) -> None:
        super().__init__(config)
        self._probe = ProbeSources(config.probe)
        self._storage = Storage(config.run_uri) if config.run_uri else None

    def process(self, table: pa.Table) -> pa.Table:
        """Return PLANNED rows for SOURCE rows."""
        units = self._probe(table)
        if self._storage:
            number = self.config.part_number
            write_plan_part(self._storage, units, table, self.config.settings_digest, number=number)
        counts: dict[int, dict[str, Any]] = {
            index: {"source_index": index, "unit_count": 0, "record_count": 0}
            for index in table["source_index"].to_pylist()
        }
        for unit in units.select(["source_index", "record_keys", "kind", "error"]).to_pylist():
            row = counts[unit["source_index"]]
            row["unit_count"] += 1
            row["record_count"] += len(unit["record_keys"] or [])
            row["kind"] = unit["kind"]
            row["error_code"] = unit["error"]["error_code"] if unit["error"] else None
        return rows_to_table(list(counts.values()), PLANNED)

    def close(self) -> None:
        """End the decoder process."""
        self._probe.close()
