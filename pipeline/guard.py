"""What happens when an operator raises something that nobody foresaw: one row pays, the others go on.

`RecordError` never gets here: operators turn it into a row themselves. A defect of ours, or of a library, that shows
on one row must not end a night's run; one that shows on every row must, because then the worker is at fault.
"""

import logging
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from operators.base import Operator, rows_to_table
from schemas.errors import PagereelError, RecordError, error_struct
from schemas.generation import DECODED, IDENTITY
from schemas.source import UNIT

logger = logging.getLogger(__name__)

MOST_STRIKES = 3
"""Sources that may fail by surprise, with no success between them, before the operator is held to be broken."""


class Guard:
    """Runs one operator; a batch that raises by surprise is halved until the offending row stands alone.

    Args:
        operator: what is run. It must declare an `error` column, or start from units; others are not guarded.
    """

    def __init__(self, operator: Operator[Any]) -> None:
        self.operator = operator
        self._strikes: set[Any] = set()

    def run(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield the operator's tables for `table`, with error rows for rows it cannot take.

        Raises:
            PagereelError: raised by the operator on purpose; never guarded.
            Exception: the operator's own, after `MOST_STRIKES` sources without a success between them.
        """
        if self.operator.expands and table.num_rows > 1:
            for position in range(table.num_rows):
                yield from self.run(table.slice(position, 1))
            return
        made = 0
        try:
            for produced in self.operator.run(table):
                made += produced.num_rows
                yield produced
            self._strikes.clear()
            return
        except PagereelError:
            raise
        except Exception as error:
            if not self._guardable(table):
                raise
            failure = error
        if table.num_rows > 1:
            middle = table.num_rows // 2
            yield from self.run(table.slice(0, middle))
            yield from self.run(table.slice(middle))
            return
        # Pages of one document fail together: it counts once.
        self._strikes.add(table["doc_id"][0].as_py() if "doc_id" in table.schema.names else len(self._strikes))
        if len(self._strikes) > MOST_STRIKES:
            raise failure
        logger.warning("%s failed on one row: %r", type(self.operator).__name__, failure)
        yield error_rows(self.operator, table, made, [_surprise(self.operator, failure)])

    def _guardable(self, table: pa.Table) -> bool:
        return "error" in table.schema.names and "error" in self.operator.outgoing(table.schema).names


def _surprise(operator: Operator[Any], failure: Exception) -> dict[str, Any]:
    """Return what nobody foresaw as a value of the ERROR struct."""
    name = type(operator).__name__
    trace = "".join(traceback.format_exception(failure))[-8000:]
    wrapped = RecordError(f"{name}: {failure}", code="internal", stage="postprocess")
    wrapped.__cause__ = failure
    return error_struct(wrapped, name, trace)


def error_rows(operator: Operator[Any], table: pa.Table, done: int, errors: Sequence[dict[str, Any]]) -> pa.Table:
    """Return what leaves `operator` for rows that it does not take.

    Args:
        operator: one that is guarded.
        table: the rows.
        done: records of a unit that came out before.
        errors: a value of the ERROR struct for each row.
    """
    wanted = operator.outgoing(table.schema)
    rows = []
    for row, error in zip(table.to_pylist(), errors, strict=True):
        if operator.expands:
            rows += unit_error_rows(row, done, error)
        else:
            rows.append({key: value for key, value in row.items() if key in wanted.names} | {"error": error})
    return rows_to_table(rows, wanted)


def unit_error_rows(unit: dict[str, Any], done: int, error: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a DECODED row with `error` for each record of a unit after the first `done`.

    Args:
        unit: a row of UNIT.
        done: records that came out before the failure.
        error: a value of the ERROR struct.
    """
    shared = {name: unit[name] for name in IDENTITY.names if name in UNIT.names}
    rows = []
    for position, key in enumerate(unit["record_keys"] or []):
        row = shared | {"record_key": key, "error": error}
        if unit["page_numbers"]:
            row |= {"page_number": unit["page_numbers"][position], "page_count": unit["page_count"]}
        else:
            row |= unit["segments"][position]
        rows.append(row)
    return rows[done:]


def guarded(operator: Operator[Any]) -> Guard | Operator[Any]:
    """Return `operator` behind a guard, where its rows can carry an error."""
    from_units = operator.expands and operator.adds.names == DECODED.names
    carries = not operator.expands and not operator.replaces
    prepares = operator.replaces and not operator.expands and "error" in operator.adds.names
    return Guard(operator) if from_units or carries or prepares else operator
