"""Units that this run plans but does not read: each record is accounted for, nothing is opened."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import pyarrow as pa
from pydantic import Field

from operators.base import Operator, OperatorConfig, rows_to_table
from schemas.generation import IDENTITY, RECORD
from schemas.source import UNIT


class SkipSegmentsConfig(OperatorConfig):
    """Why the segments are passed over."""

    reason: Annotated[str, Field(min_length=1, description="Stored as the route's reason.")]


class SkipSegments(Operator[SkipSegmentsConfig]):
    """Turn units of videos into one row a segment on the route `none`, without opening the video."""

    reads: ClassVar[pa.Schema] = UNIT
    adds: ClassVar[pa.Schema] = RECORD
    expands: ClassVar[bool] = True
    replaces: ClassVar[bool] = True

    def stream(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield the rows of one unit after the other."""
        for unit in table.to_pylist():
            if unit["error"] is None:
                yield rows_to_table(self._rows(unit), RECORD)

    def _rows(self, unit: dict[str, Any]) -> list[dict[str, Any]]:
        shared = {name: unit[name] for name in IDENTITY.names if name in UNIT.names}
        shared |= {"route": "none", "route_reason": self.config.reason, "segmentation": "fixed_stride"}
        return [
            shared | segment | {"record_key": key}
            for key, segment in zip(unit["record_keys"], unit["segments"], strict=True)
        ]
