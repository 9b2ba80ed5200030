"""From a run into a shared ledger: rows, answers, and what its sources are."""

import hashlib
from collections.abc import Iterator, Sequence, Set
from typing import Any, Final

import numpy as np
import pyarrow as pa

from operators.base import rows_to_table
from pipeline.answers import AnswerIndex
from pipeline.committed import Outcome
from pipeline.key_index import KeySet
from pipeline.known_archives import archive_parts, commit_archives, known_versions
from pipeline.known_sources import (
    KNOWN_SOURCE,
    LISTINGS_TABLE,
    SOURCES_TABLE,
    KnownSources,
    Listed,
    as_known,
)
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.parts import ANSWERS, PartCache, rows_of, whole_records
from pipeline.plan import PlanReader, record_counts, unit_keys
from schemas.generation import KEPT_ANSWER
from schemas.tables import PART_TABLES, TABLES

RECORDS_AT_ONCE: Final = 20_000
SOURCES_AT_ONCE: Final = 50_000


class Giver:
    """Gives what a run has and a ledger lacks.

    Args:
        ledger: the shared ledger, whose lease is held.
        run: the run's own ledger.
        run_id: the invocation.
        run_uri: address of the run folder, as it is stored.
    """

    def __init__(self, ledger: Ledger, run: Ledger, run_id: str, run_uri: str) -> None:
        self._ledger = ledger
        self._run = run
        self._run_id = run_id
        self._run_uri = run_uri
        self._parts = PartCache(run.storage)

    def records(self, lease: Lease) -> int:
        """Give the rows of the records that the ledger lacks, or has as failures of its own; return how many."""
        mine, theirs = self._run.committed_records(), self._ledger.committed_records()
        # After the commits were read, so that it lists the parts of all of them.
        self._parts = PartCache(self._run.storage)
        copied = {commit.part_id for commit in self._run.commits() if commit.copied}
        later = theirs.last_pass() + 1
        windows = {0: _Window(), later: _Window()}
        seen = KeySet()
        given = 0
        for units in PlanReader(self._run.storage):
            keys = unit_keys(units)
            there = theirs.outcomes_of(keys)
            fresh = seen.add_all(keys).tolist()
            outcomes = [
                own if new and _worth_giving(own, known, copied) else None
                for own, known, new in zip(mine.outcomes_of(keys), there, fresh, strict=True)
            ]
            for pass_index, window in windows.items():
                window.add(
                    units,
                    [
                        own if own is not None and (known is None) == (pass_index == 0) else None
                        for own, known in zip(outcomes, there, strict=True)
                    ],
                )
                if len(window) >= RECORDS_AT_ONCE:
                    given += self._commit(window, lease, pass_index)
        return given + sum(self._commit(window, lease, pass_index) for pass_index, window in windows.items())

    def answers(self, lease: Lease) -> int:
        """Give the answers that the ledger lacks or has older ones of; return how many."""
        theirs, mine = AnswerIndex(()), AnswerIndex(())
        theirs.read(self._ledger)
        mine.read(self._run)
        held: list[pa.Table] = []
        given = 0
        for commit in self._run.commits():
            table = self._parts.get(ANSWERS, commit.part_id)
            if table is None:
                continue
            fresh = []
            for key in table["content_key"].to_pylist():
                place = mine.place_of(key)
                is_newest = place is not None and place.part_id == commit.part_id
                fresh.append(is_newest and theirs.kept_at(key) < mine.kept_at(key))
            held.append(table.filter(pa.array(fresh, pa.bool_())))
            if sum(part.num_rows for part in held) >= RECORDS_AT_ONCE:
                given += self._commit_table(ANSWERS, held, KEPT_ANSWER, lease)
        return given + self._commit_table(ANSWERS, held, KEPT_ANSWER, lease)

    def sources(self, lease: Lease, probe_digest: str) -> int:
        """Give what was found out about sources that the ledger knows otherwise or not at all; return how many."""
        known = KnownSources(self._ledger, probe_digest)
        held: list[dict[str, Any]] = []
        given, last = 0, None
        for units in PlanReader(self._run.storage):
            for unit in _first_units(units, last):
                row = as_known(unit, probe_digest)
                if row is not None and not known.knows(row):
                    held.append(row | {"run_id": self._run_id})
            last = units["source_index"][-1].as_py() if units.num_rows else last
            if len(held) >= SOURCES_AT_ONCE:
                given += self._commit_table(SOURCES_TABLE, [rows_to_table(held, KNOWN_SOURCE)], KNOWN_SOURCE, lease)
                held = []
        return given + self._commit_table(SOURCES_TABLE, [rows_to_table(held, KNOWN_SOURCE)], KNOWN_SOURCE, lease)

    def archives(self, lease: Lease) -> None:
        """Give what was found in archives that the ledger does not know as they are."""
        known: set[tuple[bytes, bytes]] | None = None
        for _, table in archive_parts(self._run):
            known = known_versions(self._ledger) if known is None else known
            pairs = list(zip(table["source_name"].to_pylist(), table["source_version"].to_pylist(), strict=True))
            fresh = table.filter(pa.array([pair not in known for pair in pairs], pa.bool_()))
            known.update(pairs)
            if fresh.num_rows:
                lease.check()
                commit_archives(self._ledger, fresh, self._run_id, self._run_uri)

    def listing(self, lease: Lease, listed: Listed) -> bool:
        """Give what was listed, unless that is what the ledger has of these inputs; return whether it was given."""
        table = listed.table()
        found = hashlib.sha256()
        for column in table.columns:
            found.update(b"".join(column.to_pylist()))
        last = [commit for commit in self._ledger.commits() if commit.inputs == listed.inputs]
        if not table.num_rows or any(commit.listing_digest == found.hexdigest() for commit in last):
            return False
        lease.check()
        self._ledger.commit(
            self._ledger.begin([LISTINGS_TABLE, self._run_id]),
            {LISTINGS_TABLE: table},
            run_id=self._run_id,
            records={},
            statuses={},
            run_uri=self._run_uri,
            inputs=listed.inputs,
            listing_digest=found.hexdigest(),
            replaces=[commit.part_id for commit in last],
        )
        return True

    def _commit(self, window: "_Window", lease: Lease, pass_index: int) -> int:
        if not len(window):
            return 0
        lease.check()
        tables: dict[str, pa.Table] = {}
        for name in PART_TABLES:
            found = [TABLES[name].empty_table()]
            for part, keys in window.keys_of_part.items():
                table = self._parts.get(name, part)
                if table is not None:
                    found.append(rows_of(table, "record_key", keys))
            tables[name] = pa.concat_tables(found)
        there = whole_records(tables, window.status_of())
        tables = {name: rows_of(table, "record_key", sorted(there)) for name, table in tables.items()}
        # What was compacted away while this went on is given by the next call.
        window.keep(there)
        if there:
            self._ledger.commit(
                self._ledger.begin(sorted(there)),
                tables,
                run_id=self._run_id,
                records=window.records,
                statuses=window.statuses,
                retryable=window.retryable,
                pass_index=pass_index,
                run_uri=self._run_uri,
            )
        window.clear()
        return len(there)

    def _commit_table(self, name: str, held: list[pa.Table], schema: pa.Schema, lease: Lease) -> int:
        table = pa.concat_tables([schema.empty_table(), *held])
        held.clear()
        if not table.num_rows:
            return 0
        lease.check()
        part_id = self._ledger.begin([name, self._run_id])
        tables = {name: table}
        self._ledger.commit(part_id, tables, run_id=self._run_id, records={}, statuses={}, run_uri=self._run_uri)
        return int(table.num_rows)


class _Window:
    """Records that are given together."""

    def __init__(self) -> None:
        self.clear()

    def __len__(self) -> int:
        return self._count

    def clear(self) -> None:
        """Begin anew."""
        self.keys_of_part: dict[str, list[str]] = {}
        self.records: dict[str, list[str]] = {}
        self.statuses: dict[str, list[str]] = {}
        self.retryable: list[str] = []
        self._count = 0

    def status_of(self) -> dict[str, str]:
        """Return the status of each record."""
        pairs = ((self.records[unit], self.statuses[unit]) for unit in self.records)
        return {key: status for keys, statuses in pairs for key, status in zip(keys, statuses, strict=True)}

    def keep(self, keys: Set[str]) -> None:
        """Forget the records that are not among `keys`."""
        for unit, records in list(self.records.items()):
            kept = [place for place, key in enumerate(records) if key in keys]
            if len(kept) == len(records):
                continue
            statuses = self.statuses.pop(unit)
            del self.records[unit]
            if kept:
                self.records[unit] = [records[place] for place in kept]
                self.statuses[unit] = [statuses[place] for place in kept]
        self.retryable = [key for key in self.retryable if key in keys]

    def add(self, units: pa.Table, outcomes: Sequence[Outcome | None]) -> None:
        """Note the records of some units that have an outcome."""
        owners = np.repeat(np.array(units["unit_id"].to_pylist(), dtype=object), record_counts(units))
        for key, owner, outcome in zip(unit_keys(units), owners, outcomes, strict=True):
            if outcome is None:
                continue
            self.keys_of_part.setdefault(outcome.part_id, []).append(key)
            self.records.setdefault(owner, []).append(key)
            self.statuses.setdefault(owner, []).append(outcome.status)
            if outcome.retryable:
                self.retryable.append(key)
            self._count += 1


def _worth_giving(mine: Outcome | None, theirs: Outcome | None, copied: set[str]) -> bool:
    """Return whether the row of a run goes into the ledger.

    Args:
        mine: what became of the record in the run.
        theirs: in the ledger.
        copied: parts of the run whose rows came from the ledger.
    """
    if mine is None or mine.part_id in copied:
        return False
    if theirs is None or not theirs.failed:
        return theirs is None
    # A ledger knows when a failure was given, which may be long after it was met: a success needs no dates.
    return not mine.failed or mine.committed_at > theirs.committed_at


def _first_units(units: pa.Table, last: int | None) -> Iterator[dict[str, Any]]:
    """Yield the first unit of each source, those of the source `last` left out."""
    indexes = units["source_index"].to_numpy()
    first = np.ones(len(indexes), dtype=bool)
    first[1:] = indexes[1:] != indexes[:-1]
    if last is not None:
        first &= indexes != last
    names = [name for name in units.column_names if name not in ("page_numbers", "segments", "record_keys")]
    yield from units.select(names).filter(pa.array(first)).to_pylist()
