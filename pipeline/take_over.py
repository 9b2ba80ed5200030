"""From a shared ledger into a run: units of sources that it knows, and rows that it holds."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from operators.probe import ProbeConfig
from pipeline.addresses import named_input
from pipeline.committed import Outcome
from pipeline.known_sources import KnownSources
from pipeline.ledger import Ledger
from pipeline.parts import PartCache, rows_of, whole_records
from pipeline.plan import record_counts, unit_keys, write_plan_part
from pipeline.progress import Progress
from pipeline.rows import repro_command
from pipeline.sink import part_schema
from pipeline.storage import Storage
from schemas.tables import PART_TABLES, TABLES

RECORDS_AT_ONCE: Final = 20_000
"""Records of one commit: a part of a few tens of megabytes."""

SOURCES_AT_ONCE: Final = 5_000


class KnownPlanner:
    """Plans the sources that a ledger knows, without opening them.

    Args:
        known: what the ledger knows.
        run: the run folder, whose plan grows.
        config: what is owed of each source.
        settings_digest, part_number: as `write_plan_part` takes them.
        progress: is told what was planned.
    """

    def __init__(
        self,
        known: KnownSources,
        run: Storage,
        config: ProbeConfig,
        settings_digest: str,
        part_number: int,
        progress: Progress,
    ) -> None:
        self._known = known
        self._run = run
        self._config = config
        self._settings_digest = settings_digest
        self._part_number = part_number
        self._progress = progress
        self._sources: list[pa.Table] = []
        self._units: list[pa.Table] = []
        self.count = 0

    def plan(self, listed: pa.Table) -> pa.Table:
        """Return the SOURCE rows of `listed` that must be opened; the others are planned."""
        split = self._known.split(listed, self._config)
        if split.known.num_rows:
            self._sources.append(split.known)
            self._units.append(split.units)
            self.count += split.known.num_rows
            self._progress.planned += int(record_counts(split.units).sum())
            self._progress.failed_sources += split.units.num_rows - split.units["error"].null_count
        if sum(table.num_rows for table in self._sources) >= SOURCES_AT_ONCE:
            self.flush()
        return split.unknown

    def flush(self) -> None:
        """Write what was planned."""
        if self._sources:
            sources, units = pa.concat_tables(self._sources), pa.concat_tables(self._units)
            write_plan_part(self._run, units, sources, self._settings_digest, number=self._part_number)
        self._sources, self._units = [], []


class Copier:
    """Copies rows of the ledger into a run.

    Args:
        source: where the ledger lives.
        run: the run's own ledger.
        run_id: the invocation; goes into every row.
        repro_template: as `WriteRecordsConfig` takes it.
        pass_index: as `WriteRecordsConfig` takes it.

    Attributes:
        count: records copied so far.
    """

    def __init__(self, source: Storage, run: Ledger, run_id: str, repro_template: str, pass_index: int) -> None:
        self._parts = PartCache(source)
        self._run = run
        self._run_id = run_id
        self._repro_template = repro_template
        self._pass_index = pass_index
        self._wanted: dict[str, list[str]] = {}
        self._places: dict[str, dict[str, Any]] = {}
        self._statuses: dict[str, str] = {}
        self.count = 0

    def add(self, units: pa.Table, outcomes: Sequence[Outcome | None]) -> None:
        """Note the records of some units that have an outcome; they are copied when there are enough of them."""
        owners = np.repeat(np.arange(units.num_rows), record_counts(units))
        facts = units.select(["unit_id", "source_index", "source_uri", "source_ref"]).to_pylist()
        for key, owner, outcome in zip(unit_keys(units), owners.tolist(), outcomes, strict=True):
            if outcome is not None:
                self._wanted.setdefault(outcome.part_id, []).append(key)
                self._places[key] = facts[owner]
                self._statuses[key] = outcome.status
        if len(self._places) >= RECORDS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Copy what was noted, as one commit."""
        if not self._places:
            return
        tables = {name: self._table(name) for name in PART_TABLES}
        there = whole_records(tables, self._statuses)
        tables = {name: rows_of(table, "record_key", sorted(there)) for name, table in tables.items()}
        units: dict[str, list[str]] = {}
        statuses: dict[str, list[str]] = {}
        for key, place in self._places.items():
            if key not in there:
                # Its part was compacted away, or purged, since the ledger was read: it stays owed.
                continue
            units.setdefault(place["unit_id"], []).append(key)
            statuses.setdefault(place["unit_id"], []).append(self._statuses[key])
        if there:
            self._run.commit(
                self._run.begin(sorted(there)),
                tables,
                run_id=self._run_id,
                records=units,
                statuses=statuses,
                pass_index=self._pass_index,
                ledger_hits=len(there),
                copied=True,
            )
        self.count += len(there)
        self._wanted, self._places, self._statuses = {}, {}, {}

    def _table(self, name: str) -> pa.Table:
        found = [TABLES[name].empty_table()]
        for part, keys in self._wanted.items():
            table = self._parts.get(name, part)
            if table is not None:
                found.append(rows_of(table, "record_key", keys))
        table = pa.concat_tables(found)
        places = [self._places[key] for key in table["record_key"].to_pylist()]
        changes: dict[str, list[Any]] = {"run_id": [self._run_id] * len(places)}
        for column in ("source_uri", "source_ref"):
            changes[column] = [place[column] for place in places]
        changes["ledger_hit"] = [True] * len(places)
        if name == "errors":
            changes["repro_command"] = [
                repro_command(self._repro_template, named_input(place["source_uri"], place["source_ref"]), number)
                for place, number in zip(places, table["page_number"].to_pylist(), strict=True)
            ]
        for column, values in changes.items():
            index = table.schema.get_field_index(column)
            if index >= 0:
                field = table.schema.field(index)
                table = table.set_column(index, field, pa.array(values, field.type))
        orders = pa.array([place["source_index"] for place in places], pa.int64())
        return table.add_column(0, "source_index", orders).cast(part_schema(name))


def is_usable(outcome: Outcome | None, *, retry_failed: bool) -> bool:
    """Return whether a row of the ledger would be written again as it is."""
    if outcome is None:
        return False
    return not outcome.failed or not (retry_failed or outcome.retryable)
