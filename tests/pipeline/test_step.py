from collections.abc import Iterator

import pyarrow as pa
import pytest

from operators.base import Operator, OperatorConfig, rows_to_table
from pipeline import local
from pipeline.guard import MOST_STRIKES, Guard, guarded
from pipeline.metrics import Meter
from pipeline.step import Chain, Flow, Step, check_contract, workers_of
from schemas.errors import ContractError
from schemas.generation import DECODED, FAILURES
from schemas.source import UNIT

NUMBER = pa.schema([pa.field("number", pa.int64()), *FAILURES])
SQUARE = pa.schema([pa.field("square", pa.int64())])


class SquareConfig(OperatorConfig):
    fails_on: tuple[int, ...] = ()


class AddSquare(Operator[SquareConfig]):
    reads = NUMBER
    adds = pa.schema([*SQUARE, *FAILURES])

    def process(self, table: pa.Table) -> pa.Table:
        numbers = table["number"].to_pylist()
        if set(numbers) & set(self.config.fails_on):
            raise ZeroDivisionError("surprise")
        return table.append_column("square", pa.array([n * n for n in numbers], pa.int64()))


class DecodeOrBreak(Operator[SquareConfig]):
    reads = UNIT
    adds = DECODED
    expands = True
    replaces = True

    def stream(self, table: pa.Table) -> Iterator[pa.Table]:
        for unit in table.to_pylist():
            for page_number, key in zip(unit["page_numbers"], unit["record_keys"], strict=True):
                if page_number in self.config.fails_on:
                    raise ZeroDivisionError("surprise")
                row = {"unit_id": unit["unit_id"], "record_key": key, "page_number": page_number}
                yield rows_to_table([row], DECODED)


def numbers(values):
    return rows_to_table([{"number": value} for value in values], NUMBER)


def unit(unit_id, pages):
    row = {"unit_id": unit_id, "doc_id": "d", "kind": "pdf", "page_count": 9, "page_numbers": pages}
    return row | {"record_keys": [f"{unit_id}-{page}" for page in pages]}


def test_steps_group_by_the_workers_they_share():
    steps = [
        Step(AddSquare, SquareConfig()),
        Step(AddSquare, SquareConfig(), same_worker=True),
        Step(AddSquare, SquareConfig()),
    ]
    assert [len(group) for group in workers_of(steps)] == [2, 1]


def test_a_first_step_cannot_share_workers():
    with pytest.raises(ContractError, match="first step"):
        workers_of([Step(AddSquare, SquareConfig(), same_worker=True)])


def test_a_missing_column_is_found_before_anything_runs():
    with pytest.raises(ContractError, match="'number' is missing"):
        check_contract([Step(AddSquare, SquareConfig())], SQUARE)


def test_the_schema_after_steps_is_known_beforehand():
    schema = check_contract([Step(AddSquare, SquareConfig())], NUMBER)
    assert "square" in schema.names


def test_a_chain_counts_rows_of_each_operator():
    meter = Meter()
    [result] = Chain([Step(AddSquare, SquareConfig())], meter.add).run(numbers([2, 3]))
    assert result["square"].to_pylist() == [4, 9]
    counts = meter.snapshot()["AddSquare"]
    assert (counts["rows_in"], counts["rows_out"], counts["batches"]) == (2, 2, 1)


def test_a_surprise_costs_one_row_and_keeps_the_order_of_the_others():
    tables = list(Guard(AddSquare(SquareConfig(fails_on=(3,)))).run(numbers([1, 2, 3, 4, 5])))
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["number"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["square"] for row in rows] == [1, 4, None, 16, 25]
    error = rows[2]["error"]
    assert (error["error_code"], error["exception_type"], error["component"]) == (
        "internal",
        "ZeroDivisionError",
        "AddSquare",
    )
    assert "surprise" in error["traceback"]


def test_an_operator_that_fails_on_every_row_ends_the_run():
    guard = Guard(AddSquare(SquareConfig(fails_on=tuple(range(20)))))
    with pytest.raises(ZeroDivisionError):
        list(guard.run(numbers(range(MOST_STRIKES + 1))))


def test_a_surprise_in_the_middle_of_a_unit_keeps_its_first_pages_and_other_units():
    table = rows_to_table([unit("a", [1, 2]), unit("b", [3, 4, 5]), unit("c", [6])], UNIT)
    rows = pa.concat_tables(list(Guard(DecodeOrBreak(SquareConfig(fails_on=(4,)))).run(table))).to_pylist()
    assert [row["record_key"] for row in rows] == ["a-1", "a-2", "b-3", "b-4", "b-5", "c-6"]
    assert [row["error"] is not None for row in rows] == [False, False, False, True, True, False]
    assert rows[3]["page_count"] == 9


def test_operators_whose_rows_carry_errors_are_guarded():
    assert isinstance(guarded(AddSquare(SquareConfig())), Guard)
    assert isinstance(guarded(DecodeOrBreak(SquareConfig())), Guard)


def test_rebatch_keeps_every_row_in_order():
    tables = [numbers(range(3)), numbers(range(3, 10)), numbers([])]
    batches = list(local.rebatch(tables, 4))
    assert [batch.num_rows for batch in batches] == [4, 4, 2]
    assert pa.concat_tables(batches)["number"].to_pylist() == list(range(10))


def test_the_plain_loop_runs_heads_and_trunk():
    class CountPages(Operator[SquareConfig]):
        reads = DECODED
        adds = pa.schema([pa.field("record_key", pa.string())])
        replaces = True

        def process(self, table: pa.Table) -> pa.Table:
            return table.select(["record_key"])

    flow = Flow(
        heads={"documents": [Step(DecodeOrBreak, SquareConfig())]},
        trunk=[Step(CountPages, SquareConfig(), rows_per_batch=2)],
    )
    meter = Meter()
    units = {"documents": [rows_to_table([unit("a", [1, 2]), unit("b", [3])], UNIT)]}
    keys = [key for table in local.run_flow(flow, units, meter) for key in table["record_key"].to_pylist()]
    assert keys == ["a-1", "a-2", "b-3"]
    assert meter.snapshot()["CountPages"]["rows_in"] == 3
