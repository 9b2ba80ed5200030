"""Operators: a table in, a table out, with declared columns."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from schemas.errors import ContractError


class OperatorConfig(BaseModel):
    """Options of one operator: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=OperatorConfig)


class Operator(Generic[C]):
    """One job on a batch of rows.

    A subclass declares `reads` and `adds`, and writes `process` (one table for one table, same rows, same order) or,
    when `expands`, `stream`. The constructor does the expensive things once. Nothing correct may depend on `close`.

    Attributes:
        reads: columns that must be present, with these types.
        adds: columns that are present afterwards, with these types; a column that is already there is replaced.
        expands: True when one row may become several.
        replaces: True when only the columns of `adds` leave the operator.
        stage: one of `STAGES`, where a row is when it ends the process that the operator runs in.
    """

    reads: ClassVar[pa.Schema] = pa.schema([])
    adds: ClassVar[pa.Schema] = pa.schema([])
    expands: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    stage: ClassVar[str] = "postprocess"

    def __init__(self, config: C) -> None:
        self.config = config

    def process(self, table: pa.Table) -> pa.Table:
        """Return `table` with the added columns: same rows, same order."""
        raise ContractError(f"{type(self).__name__} implements neither process nor stream")

    def stream(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield tables; the base yields one. Expanding operators yield early to bound memory."""
        yield self.process(table)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return everything that `run` yields, as one table; an empty table keeps its schema."""
        tables = list(self.run(table))
        return pa.concat_tables(tables) if tables else self.outgoing(table.schema).empty_table()

    def run(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield output tables for `table`, with the contract checked on both sides.

        Raises:
            ContractError: a declared column is missing or has another type, or a row appeared or vanished.
        """
        require_columns(table, self.reads, type(self).__name__)
        wanted = self.outgoing(table.schema)
        if table.num_rows == 0:
            yield wanted.empty_table()
            return
        for produced in self.stream(table):
            require_columns(produced, self.adds, type(self).__name__)
            if not self.expands and produced.num_rows != table.num_rows:
                raise ContractError(f"{type(self).__name__} got {table.num_rows} rows and returned {produced.num_rows}")
            is_exact = produced.schema.equals(wanted, check_metadata=True)
            yield produced if is_exact else produced.select(wanted.names).cast(wanted)

    def outgoing(self, incoming: pa.Schema) -> pa.Schema:
        """Return the schema after this operator, given the one before it."""
        if self.replaces:
            return self.adds
        kept = [field for field in incoming if field.name not in self.adds.names]
        return pa.schema([*kept, *self.adds])

    def at_risk(self, table: pa.Table) -> list[bool]:
        """Return for each row whether native code works on what it holds, which may end this process.

        The base says so of none.
        """
        return [False] * table.num_rows

    def work_done(self) -> int:
        """Return a count that grows while a call gets on; the base has none. Another thread may ask."""
        return 0

    def close(self) -> None:
        """Release what the constructor took."""


def require_columns(table: pa.Table, wanted: pa.Schema, name: str) -> None:
    """Raise `ContractError` unless `table` has every wanted column with its type."""
    for field in wanted:
        index = table.schema.get_field_index(field.name)
        if index < 0:
            raise ContractError(f"{name}: column {field.name!r} is missing; there are {table.schema.names}")
        if table.schema.field(index).type != field.type:
            found = table.schema.field(index).type
            raise ContractError(f"{name}: column {field.name!r} is {found}, wanted {field.type}")


def rows_to_table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return `rows` as a table of exactly `schema`; absent keys are null, unknown keys are a defect.

    Raises:
        ContractError: a row holds a key that the schema does not.
    """
    names = set(schema.names)
    for row in rows:
        unknown = row.keys() - names
        if unknown:
            raise ContractError(f"rows carry columns {sorted(unknown)} that the schema does not have")
    return pa.Table.from_pylist(rows, schema=schema)


def with_columns(table: pa.Table, columns: Mapping[str, list[Any]], schema: pa.Schema) -> pa.Table:
    """Return `table` with each of `columns` set; types come from `schema`."""
    for name, values in columns.items():
        array = pa.array(values, schema.field(name).type)
        index = table.schema.get_field_index(name)
        field = pa.field(name, array.type)
        table = table.append_column(field, array) if index < 0 else table.set_column(index, field, array)
    return table


def large_binary(pixels: NDArray[np.uint8]) -> pa.Array:
    """Return pixels of any shape as an array of one large_binary value; contiguous ones share their memory."""
    flat = np.ascontiguousarray(pixels)
    offsets = np.array([0, flat.nbytes], np.int64)
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(flat)])
