"""A record that ends its worker at every touch is found, and pays alone.

A batch without strikes runs whole. After a death (`pipeline/strikes.py`) those who were there are suspects: they run in
groups of about the square root of their number, then alone, while nobody else is inside the same operator, so that
bystanders collect no strikes. The record that has died three times, at last alone, is not run again: it goes on as a
row with an error. Everybody else comes out as if it had not been there.
"""

import itertools
import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from operators.base import Operator
from pipeline.guard import Guard, error_rows, guarded
from pipeline.strikes import MOST_DEATHS, LastWords, Touch, Verdict
from pipeline.witness import Doors, Witness
from schemas.errors import RecordError, WorkerLostError, error_struct
from schemas.ids import digest

_UNIT_LISTS: Final = ("page_numbers", "segments", "record_keys", "survived")
"""Columns of a unit that lie parallel, one item a record."""


@dataclass(frozen=True)
class Part:
    """Records of a batch that run together.

    Attributes:
        keys: which.
        depth: 0 all without a strike, 1 a group of suspects, 2 one alone.
    """

    keys: tuple[str, ...]
    depth: int


class Quarantine:
    """Runs an operator on batches, and keeps what ends its process from everybody else.

    Args:
        operator: what is run.
        witness: of the worker that it runs in.
    """

    def __init__(self, operator: Operator[Any], witness: Witness) -> None:
        self.operator = operator
        self._inner: Guard | Operator[Any] = guarded(operator)
        self._witness = witness
        self._doors = Doors()
        self._name = type(operator).__name__

    def run(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield the operator's tables for `table`, with error rows for the records that end its process.

        Raises:
            WorkersBrokenError: workers die whatever they are given.
            PagereelError: raised by the operator on purpose.
        """
        if self.operator.expands:
            for position in range(table.num_rows):
                yield from self._run_unit(table.slice(position, 1))
            if not table.num_rows:
                yield from self._inner.run(table)
        else:
            yield from self._run_rows(table)

    def _run_rows(self, table: pa.Table) -> Iterator[pa.Table]:
        """Run rows; where some are suspected, the others run last, so that a further death costs little."""
        keys = self._row_keys(table)
        batch = _Batch(self._name, tuple(dict.fromkeys(key for key in keys if key)))
        if not batch.keys:
            yield from self._inner.run(table)
            return
        with self._doors.open(alone=False), self._witness.touching(batch.touch(), only_clean=True) as standing:
            whole = None if standing.strikes else list(self._inner.run(table))
        if whole is not None:
            yield from whole
            return
        yield self._run_suspects(table, keys, batch)

    def _run_suspects(self, table: pa.Table, keys: list[str | None], batch: "_Batch") -> pa.Table:
        standing = self._witness.standing(batch.keys)
        places: list[int] = []
        made: list[pa.Table] = []
        for part in parts(batch.keys, standing.strikes, has_died_alone=standing.lone_records > 0):
            chosen = [place for place, key in enumerate(keys) if key in part.keys]
            places += chosen
            made += self._run_part(table.take(chosen), part, batch)
        untouched = [place for place, key in enumerate(keys) if key is None]
        if untouched:
            places += untouched
            made += self._inner.run(table.take(untouched))
        condemned = [place for place, key in enumerate(keys) if standing.strikes.get(key or "", 0) >= MOST_DEATHS]
        if condemned:
            verdicts = self._witness.verdicts([str(keys[place]) for place in condemned])
            errors = [self._error(verdicts.get(str(keys[place]))) for place in condemned]
            places += condemned
            made.append(error_rows(self.operator, table.take(condemned), 0, errors))
        order = sorted(range(len(places)), key=places.__getitem__)
        return pa.concat_tables(made).take(order)

    def _run_unit(self, unit: pa.Table) -> Iterator[pa.Table]:
        """Run one unit, whole or in parts; rows come in the order of its records, the condemned last.

        The order is kept because Ray may have handed on what came out before a death, and will take from the next run
        only what follows.
        """
        [row] = unit.select([name for name in _UNIT_LISTS if name in unit.schema.names]).to_pylist()
        names = row["record_keys"] or []
        if not names or not self.operator.at_risk(unit)[0]:
            yield from self._inner.run(unit)
            return
        keys = [f"{self._name}/{name}" for name in names]
        batch = _Batch(self._name, tuple(keys))
        with self._doors.open(alone=False), self._witness.touching(batch.touch(), only_clean=True) as standing:
            if not standing.strikes:
                yield from self._inner.run(unit)
                return
        strikes = self._witness.standing(keys).strikes
        for part in parts_in_order(keys, strikes):
            places = [place for place, key in enumerate(keys) if key in part.keys]
            with self._doors.open(alone=True), self._witness.touching(batch.touch(part)):
                yield from self._inner.run(part_of_unit(unit, places))
        condemned = [place for place, key in enumerate(keys) if strikes.get(key, 0) >= MOST_DEATHS]
        verdicts = self._witness.verdicts([keys[place] for place in condemned])
        for place in condemned:
            yield error_rows(self.operator, part_of_unit(unit, [place]), 0, [self._error(verdicts.get(keys[place]))])

    def _run_part(self, table: pa.Table, part: Part, batch: "_Batch") -> list[pa.Table]:
        with self._doors.open(alone=part.depth > 0), self._witness.touching(batch.touch(part)):
            return list(self._inner.run(table))

    def _row_keys(self, table: pa.Table) -> list[str | None]:
        """Return what tells the rows at risk apart: what they show where that is known, so that equal pages are one."""
        names = [name for name in ("content_key", "record_key") if name in table.schema.names]
        rows = table.select(names).to_pylist()
        return [
            f"{self._name}/{row.get('content_key') or row['record_key']}" if at_risk else None
            for row, at_risk in zip(rows, self.operator.at_risk(table), strict=True)
        ]

    def _error(self, verdict: Verdict | None) -> dict[str, Any]:
        if verdict is None:
            lost = RecordError("it ended its workers; how is not known any more", code="worker_died", retryable=True)
            return error_struct(lost, self._name)
        last = verdict.deaths[-1]
        words = last.last_words or LastWords()
        error = RecordError(
            told(verdict),
            code="worker_died",
            stage=self.operator.stage,
            exit_signal=words.exit_signal,
            exception_type=WorkerLostError.__name__ if words.exit_signal is None else signal_name(words.exit_signal),
            retryable=verdict.may_pass,
        )
        first = verdict.deaths[0].touch
        return error_struct(error, self._name, words.message, len(verdict.deaths)) | {
            "batch_id": first.batch_id,
            "batch_size": first.batch_size,
            "bisect_depth": last.touch.depth,
            "node_id": last.node,
            "actor_id": last.worker,
        }


@dataclass(frozen=True)
class _Batch:
    """Records that came together."""

    step: str
    keys: tuple[str, ...]

    def touch(self, part: Part | None = None) -> Touch:
        """Return the touch of a part of it, of all where none is given."""
        keys, depth = (part.keys, part.depth) if part else (self.keys, 0)
        name = digest(*sorted(self.keys))[:16]
        return Touch(step=self.step, keys=keys, batch_id=name, batch_size=len(self.keys), depth=depth)


def parts(keys: Sequence[str], strikes: Mapping[str, int], *, has_died_alone: bool = False) -> list[Part]:
    """Return in which company records run, and in which order; those with three strikes do not.

    The most suspected come first: what dies then has cost the least. But where the worker has just died with one record
    alone, the least suspected comes before it, alone as well: three records in a row that die alone are held to be the
    worker's fault, and a batch with several culprits must not look like that.

    Args:
        keys: of a batch.
        strikes: of the suspects among them.
        has_died_alone: whether this worker has survived nothing since one record ended it alone.
    """
    by_count: dict[int, list[str]] = {count: [] for count in range(MOST_DEATHS + 1)}
    for key in keys:
        by_count[min(MOST_DEATHS, strikes.get(key, 0))].append(key)
    control: list[Part] = []
    if has_died_alone:
        for count in range(MOST_DEATHS - 1):
            if by_count[count]:
                control = [Part((by_count[count].pop(),), 2)]
                break
    alone = [Part((key,), 2) for key in by_count[2]]
    groups = [Part(tuple(group), 1) for group in grouped(by_count[1])]
    clean = [Part(tuple(by_count[0]), 0)] if by_count[0] else []
    return [*control, *alone, *groups, *clean]


def parts_in_order(keys: Sequence[str], strikes: Mapping[str, int]) -> list[Part]:
    """Return in which company neighbours run, in their order; those with three strikes do not."""
    found: list[Part] = []
    counts = {key: min(MOST_DEATHS, strikes.get(key, 0)) for key in keys}
    for count, run in itertools.groupby(keys, key=counts.__getitem__):
        together = list(run)
        if count == 0:
            found.append(Part(tuple(together), 0))
        elif count == 1:
            size = math.isqrt(sum(1 for value in counts.values() if value == 1) - 1) + 1
            found += [Part(tuple(together[at : at + size]), 1) for at in range(0, len(together), size)]
        elif count < MOST_DEATHS:
            found += [Part((key,), 2) for key in together]
    return found


def grouped(keys: Sequence[str]) -> list[Sequence[str]]:
    """Return `keys` in groups of about the square root of their number."""
    size = max(1, math.isqrt(max(0, len(keys) - 1)) + 1)
    return [keys[at : at + size] for at in range(0, len(keys), size)]


def part_of_unit(unit: pa.Table, places: Sequence[int]) -> pa.Table:
    """Return a unit with the records at `places` alone."""
    [row] = unit.to_pylist()
    for name in _UNIT_LISTS:
        if row.get(name) is not None:
            row[name] = [row[name][place] for place in places]
    return pa.Table.from_pylist([row], schema=unit.schema)


def told(verdict: Verdict) -> str:
    """Return in words what a record did."""
    company = [len(death.touch.keys) - 1 for death in verdict.deaths]
    with_whom = ", ".join(f"with {count} others" if count else "alone" for count in company)
    words = verdict.deaths[-1].last_words
    if words is None:
        end = "in silence, as by SIGKILL or for lack of memory"
    elif words.exit_signal is not None:
        end = f"by {signal_name(words.exit_signal)}"
    else:
        end = f"by {(words.message or 'itself').strip().splitlines()[0]}"
    return f"its worker died {len(verdict.deaths)} times over it ({with_whom}), the last time {end}"


def signal_name(number: int) -> str:
    """Return the name of a signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def watched(operator: Operator[Any], witness: Witness | None) -> Quarantine | Guard | Operator[Any]:
    """Return `operator` behind a guard, and in quarantine where native code works on its rows and someone counts."""
    if witness is None or type(operator).at_risk is Operator.at_risk:
        return guarded(operator)
    return Quarantine(operator, witness)
