"""The answers of a model or a server, written into the rows that asked."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pyarrow as pa

from operators.base import with_columns
from schemas.errors import RecordError, error_struct
from schemas.generation import ANSWERED_BY, FAILURES, GENERATION

ANSWERED: Final = pa.schema([*GENERATION, *FAILURES, pa.field("answered_by", ANSWERED_BY)])
"""The columns that answering adds."""


def with_answers(
    table: pa.Table,
    answers: Mapping[int, Mapping[str, Any]],
    outcomes: Mapping[int, object],
    component: str,
    lost: Mapping[int, Sequence[Mapping[str, Any]]] | None = None,
) -> pa.Table:
    """Return `table` with the generation columns of the rows that asked, and the errors of those that got none.

    Args:
        table: rows of which some asked; the others keep what they have.
        answers: values of `GENERATION`, by row.
        outcomes: by row; a `RecordError` becomes the row's error.
        component: who asked, for the error.
        lost: by row, the failures of attempts before the last; they go to `recovered`.
    """
    columns: dict[str, list[Any]] = {}
    for name in GENERATION.names:
        before = table[name].to_pylist() if name in table.schema.names else [None] * table.num_rows
        columns[name] = [answers[row][name] if row in answers else before[row] for row in range(table.num_rows)]
    names = [field.name for field in ANSWERED_BY]
    columns["answered_by"] = [
        {name: answers[row][name] for name in names} if row in answers else None for row in range(table.num_rows)
    ]
    errors, survived = table["error"].to_pylist(), table["recovered"].to_pylist()
    for row, outcome in outcomes.items():
        if isinstance(outcome, RecordError):
            errors[row] = error_struct(outcome, component, attempt=answers[row]["attempt"])
        if lost and lost.get(row):
            survived[row] = [*(survived[row] or ()), *lost[row]]
    return with_columns(table, columns | {"error": errors, "recovered": survived}, ANSWERED)


def asks_model(table: pa.Table, row: int) -> bool:
    """Return whether a row is routed to the model, has not failed, and was not answered before."""
    if "ledger_hit" in table.column_names and table["ledger_hit"][row].as_py():
        return False
    return table["route"][row].as_py() == "model" and not table["error"][row].is_valid
