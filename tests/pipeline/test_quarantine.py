"""The quarantine around operators, without Ray: who runs with whom, what comes out, and in which order."""

import math
import threading
import uuid
from typing import ClassVar

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.base import Operator, OperatorConfig, rows_to_table, with_columns
from pipeline.quarantine import Part, Quarantine, grouped, part_of_unit, parts, parts_in_order, watched
from pipeline.shared import LocalShared
from pipeline.strikes import MOST_DEATHS, Strikes
from pipeline.witness import Doors, Witness
from schemas.errors import ContractError, TransientError, WorkerLostError, WorkersBrokenError
from schemas.generation import DECODED, FAILURES, REQUEST, RESULT
from schemas.source import UNIT
from tests.pipeline.made_rows import document_unit, failure, units_table

ROW = pa.schema([pa.field("record_key", pa.string()), REQUEST.field("content_key"), *FAILURES])


class PoisonConfig(OperatorConfig):
    """What ends the worker: rows of these content keys, or pages of these numbers."""

    poison: frozenset[str] = frozenset()
    pages: frozenset[int] = frozenset()


class Upper(Operator[PoisonConfig]):
    """Writes the key in capitals; a poisoned row ends the worker, and so does everything where `*` is poison."""

    reads = ROW
    adds = pa.schema([RESULT.field("text"), *FAILURES])
    stage: ClassVar[str] = "generate"
    seen: ClassVar[list[list[str]]] = []

    def at_risk(self, table):
        return [not error.is_valid for error in table["error"]]

    def process(self, table):
        risky = [key for key, risk in zip(table["content_key"].to_pylist(), self.at_risk(table), strict=True) if risk]
        self.seen.append(risky)
        if risky and ("*" in self.config.poison or self.config.poison & set(risky)):
            raise WorkerLostError("the device failed")
        names = {name: table[name].to_pylist() for name in FAILURES.names}
        return with_columns(table, {"text": [(key or "").upper() for key in table["content_key"].to_pylist()], **names},
                            self.adds)  # fmt: skip


class Decode(Operator[PoisonConfig]):
    """A page a record, streamed; a poisoned page ends the worker."""

    reads = UNIT
    adds = DECODED
    expands = True
    replaces = True
    stage: ClassVar[str] = "render"
    seen: ClassVar[list[list[int]]] = []

    def at_risk(self, table):
        return [not error.is_valid for error in table["error"]]

    def stream(self, table):
        for unit in table.to_pylist():
            self.seen.append(unit["page_numbers"])
            for key, number in zip(unit["record_keys"], unit["page_numbers"], strict=True):
                if number in self.config.pages:
                    raise WorkerLostError("the renderer took this process with it")
                yield rows_to_table([{"record_key": key, "page_number": number}], DECODED)


class Machine:
    """Runs batches in workers that are replaced when they die, as Ray does, and keeps what came out before a death."""

    def __init__(self, folder, kind, **config):
        self.shared = LocalShared(Strikes(str(folder)))
        self.kind, self.config = kind, PoisonConfig(**config)
        self.starts = 0
        kind.seen.clear()
        self.start()

    def start(self):
        self.starts += 1
        witness = Witness(self.shared, "actor", f"i{self.starts}", "node")
        witness.arrive(["node"], None)
        self.quarantine = watched(self.kind(self.config), witness)
        witness.built()

    def run(self, table):
        handed_on: list[pa.Table] = []
        for _ in range(300):
            try:
                for place, made in enumerate(made for made in self.quarantine.run(table) if made.num_rows):
                    if place < len(handed_on):
                        # Ray takes from a task that runs again only what it has not taken before.
                        assert made.equals(handed_on[place]), "what came out before a death came out otherwise"
                    else:
                        handed_on.append(made)
            except WorkerLostError:
                self.start()
            else:
                return pa.concat_tables(handed_on)
        raise AssertionError("the batch never ended")

    @property
    def deaths(self):
        return self.starts - 1


def rows_of(*keys, failed=()):
    rows = [{"record_key": f"r{place}", "content_key": key} for place, key in enumerate(keys)]
    return rows_to_table([row | ({"error": failure()} if row["content_key"] in failed else {}) for row in rows], ROW)


def keys_of(count):
    return [f"k{number}" for number in range(count)]


def test_the_63_beside_one_record_that_kills_come_out_and_it_costs_three_deaths(tmp_path):
    machine = Machine(tmp_path, Upper, poison={"k37"})
    result = machine.run(rows_of(*keys_of(64))).to_pylist()
    assert machine.deaths == 3
    assert [row["content_key"] for row in result] == keys_of(64)
    assert [row["text"] for row in result if row["error"] is None] == [k.upper() for k in keys_of(64) if k != "k37"]
    [dead] = [row for row in result if row["error"] is not None]
    found = {name: dead["error"][name] for name in ("error_code", "stage", "component", "batch_size", "bisect_depth")}
    assert found == {
        "error_code": "worker_died", "stage": "generate", "component": "Upper", "batch_size": 64, "bisect_depth": 2,
    }  # fmt: skip
    assert dead["error"]["attempt"] == MOST_DEATHS
    assert (dead["error"]["node_id"], dead["error"]["actor_id"]) == ("node", "actor")
    assert "with 63 others, with 7 others, alone" in dead["error"]["message"]


def test_several_culprits_of_one_batch_cost_two_further_deaths_each(tmp_path):
    machine = Machine(tmp_path, Upper, poison={"k5", "k37", "k38"})
    result = machine.run(rows_of(*keys_of(64))).to_pylist()
    assert {row["content_key"] for row in result if row["error"]} == {"k5", "k37", "k38"}
    assert machine.deaths <= 1 + 3 * 2


def test_neighbours_that_all_kill_are_found_where_others_are_survived_between_them(tmp_path):
    poison = {f"k{number}" for number in range(8)}
    machine = Machine(tmp_path, Upper, poison=poison)
    result = machine.run(rows_of(*keys_of(64))).to_pylist()
    assert {row["content_key"] for row in result if row["error"]} == poison


def test_equal_pages_share_their_strikes(tmp_path):
    machine = Machine(tmp_path, Upper, poison={"same"})
    result = machine.run(rows_of("same", "a", "same", "b")).to_pylist()
    assert machine.deaths == 3
    assert [row["error"] is not None for row in result] == [True, False, True, False]
    machine.run(rows_of("c", "same"))
    assert machine.deaths == 3


def test_rows_that_the_operator_does_not_touch_are_never_suspected(tmp_path):
    machine = Machine(tmp_path, Upper, poison={"bad", "failed"})
    result = machine.run(rows_of("a", "failed", "bad", "b", failed={"failed"})).to_pylist()
    assert [row["content_key"] for row in result] == ["a", "failed", "bad", "b"]
    assert [row["error"] and row["error"]["error_code"] for row in result] == [None, "damaged", "worker_died", None]


def test_a_record_that_is_alone_dies_three_times_and_the_next_call_tries_it_again(tmp_path):
    machine = Machine(tmp_path, Upper, poison={"bad"})
    [row] = machine.run(rows_of("bad")).to_pylist()
    assert machine.deaths == 3
    assert row["error"]["retryable"] is True
    again = Machine(tmp_path, Upper)
    [row] = again.run(rows_of("bad")).to_pylist()
    assert row["text"] == "BAD"


def test_a_broken_worker_ends_the_run_and_nobody_is_quarantined(tmp_path):
    machine = Machine(tmp_path, Upper, poison={"*"})
    with pytest.raises(WorkersBrokenError, match="3 different records one after the other"):
        machine.run(rows_of(*keys_of(64)))
    assert machine.deaths <= 6
    with pytest.raises(WorkersBrokenError):
        machine.quarantine.run(rows_of("another")).__next__()
    healthy = Machine(tmp_path, Upper)
    assert healthy.run(rows_of(*keys_of(64)))["error"].null_count == 64
    assert Upper.seen == [keys_of(64)]


def test_a_broken_worker_with_batches_of_one_commits_nothing_for_good(tmp_path):
    machine = Machine(tmp_path, Upper, poison={"*"})
    rows = [machine.run(rows_of(key)).to_pylist()[0] for key in "ab"]
    with pytest.raises(WorkersBrokenError):
        machine.run(rows_of("c"))
    assert [row["error"]["retryable"] for row in rows] == [True, True]


def test_strikes_are_kept_where_the_run_ends_in_between(tmp_path):
    first = Machine(tmp_path, Upper, poison={"k3"})
    for _ in range(2):
        with pytest.raises(WorkerLostError):
            list(first.quarantine.run(rows_of(*keys_of(9))))
        first.start()
    second = Machine(tmp_path, Upper, poison={"k3"})
    second.run(rows_of(*keys_of(9)))
    assert second.deaths == 1


def test_an_error_that_is_not_the_end_of_the_worker_accuses_nobody(tmp_path):
    class Refuses(Upper):
        def process(self, table):
            raise ContractError("no")

    machine = Machine(tmp_path, Refuses)
    with pytest.raises(ContractError):
        machine.run(rows_of("a", "b"))
    machine.start()
    assert machine.shared.call("standing", "actor", ["Refuses/a", "Refuses/b"]).strikes == {}


def test_a_generator_that_is_given_up_accuses_nobody(tmp_path):
    machine = Machine(tmp_path, Decode)
    stream = machine.quarantine.run(units_table([document_unit(0, [1, 2, 3])]))
    next(stream)
    stream.close()
    machine.start()
    assert machine.run(units_table([document_unit(0, [1, 2, 3])])).num_rows == 3
    assert Decode.seen[-1] == [1, 2, 3]


def test_work_goes_on_where_the_strikes_cannot_be_reached(tmp_path, monkeypatch):
    class Unreachable:
        def call(self, method, *arguments):
            raise TransientError("gone")

    monkeypatch.setattr("pipeline.witness.SHARED_PAUSE_SECONDS", 0)
    quarantine = Quarantine(Upper(PoisonConfig()), Witness(Unreachable(), "w", "i", "n"))
    [result] = quarantine.run(rows_of("a", "b"))
    assert result["text"].to_pylist() == ["A", "B"]


@pytest.mark.parametrize("pages", [{1}, {4}, {10}, {4, 5}, {1, 10}], ids=str)
def test_the_page_of_a_unit_that_kills_is_found_and_the_others_come_in_their_order(tmp_path, pages):
    numbers = list(range(1, 11))
    machine = Machine(tmp_path, Decode, pages=pages)
    unit = document_unit(0, numbers)
    result = machine.run(units_table([unit])).to_pylist()
    assert [row["page_number"] for row in result] == [n for n in numbers if n not in pages] + sorted(pages)
    assert [row["record_key"] for row in result if row["error"]] == [unit["record_keys"][n - 1] for n in sorted(pages)]
    assert machine.deaths <= 1 + 2 * len(pages)
    assert {row["error"]["stage"] for row in result if row["error"]} == {"render"}


def test_a_unit_with_an_error_or_without_records_is_not_touched(tmp_path):
    machine = Machine(tmp_path, Decode)
    table = units_table([document_unit(0, [1]) | {"error": failure(), "record_keys": [], "page_numbers": []}])
    assert list(machine.quarantine.run(table)) == []


def test_a_part_of_a_unit_has_the_lists_of_its_records():
    unit = document_unit(0, [1, 2, 3]) | {"survived": [None, [failure()], None]}
    [part] = part_of_unit(units_table([unit]), [1, 2]).to_pylist()
    assert part["page_numbers"] == [2, 3]
    assert part["record_keys"] == unit["record_keys"][1:]
    assert part["survived"][0][0]["error_code"] == "damaged"
    assert part["segments"] is None


STRIKES_OF_KEYS = st.dictionaries(st.sampled_from(keys_of(12)), st.integers(0, 4))


@given(STRIKES_OF_KEYS, st.booleans())
def test_every_record_that_is_not_condemned_runs_once_and_suspects_never_with_the_others(strikes, has_died_alone):
    keys = keys_of(12)
    for found in (parts(keys, strikes, has_died_alone=has_died_alone), parts_in_order(keys, strikes)):
        ran = [key for part in found for key in part.keys]
        assert sorted(ran) == sorted(key for key in keys if strikes.get(key, 0) < MOST_DEATHS)
        for part in found:
            counts = {strikes.get(key, 0) for key in part.keys}
            assert len(counts) == 1
            assert counts != {2} or len(part.keys) == 1
            assert part.depth == max(counts) or len(part.keys) == 1
            assert counts != {1} or len(part.keys) <= math.isqrt(11) + 1


def test_the_order_of_a_unit_is_kept():
    found = parts_in_order("abcdef", {"b": 1, "c": 2, "d": 3})
    assert found == [Part(("a",), 0), Part(("b",), 1), Part(("c",), 2), Part(("e", "f"), 0)]


@pytest.mark.parametrize(
    ("count", "sizes"), [(0, []), (1, [1]), (2, [2]), (9, [3, 3, 3]), (64, [8] * 8), (65, [9] * 7 + [2])]
)
def test_suspects_run_in_groups_of_about_the_square_root(count, sizes):
    assert [len(group) for group in grouped(keys_of(count))] == sizes


@settings(deadline=None, max_examples=40)
@given(st.sets(st.integers(0, 15), max_size=5), st.integers(1, 16))
def test_whatever_is_poison_is_found_and_nobody_else(bad, size):
    keys = keys_of(size)
    poison = {f"k{number}" for number in bad} & set(keys)
    machine = Machine(f"memory://{uuid.uuid4().hex}", Upper, poison=poison)
    try:
        result = machine.run(rows_of(*keys)).to_pylist()
    except WorkersBrokenError:
        # Hardly anybody is left whose survival would speak for the worker.
        assert len(poison) >= 3
        return
    assert [row["content_key"] for row in result] == keys
    assert {row["content_key"] for row in result if row["error"]} == poison
    assert machine.deaths <= 3 * len(poison)


def test_who_is_alone_behind_the_doors_meets_nobody():
    doors, inside, met = Doors(), set(), []
    entered = threading.Barrier(4)

    def visit(name, alone, turns):
        entered.wait()
        for _ in range(turns):
            with doors.open(alone=alone):
                inside.add(name)
                met.append((alone, set(inside)))
                inside.discard(name)

    threads = [threading.Thread(target=visit, args=(name, name == "lone", 200)) for name in ("a", "b", "c", "lone")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(met) == 800
    assert all(visitors == {"lone"} for alone, visitors in met if alone)
