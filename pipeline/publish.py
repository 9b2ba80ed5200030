"""Publication: committed rows to plain tables, in page order, each record once.

New files get names of a new generation, then one manifest names them, then the older files are removed. A kill leaves
the old set valid or the new one; the next publication clears what is in neither.
"""

import json
import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from operators.base import rows_to_table
from pipeline.addresses import named_input
from pipeline.commits import Clock, utc_now
from pipeline.committed import CommittedRecords
from pipeline.documents import DocumentTally
from pipeline.key_index import KeySet
from pipeline.ledger import Ledger
from pipeline.parts import PartCache
from pipeline.plan import PlanReader, record_counts, unit_keys
from pipeline.rows import REPRO_TEMPLATE, repro_command
from pipeline.storage import Storage
from pipeline.table_writer import PublishedFile, TableWriter
from schemas.errors import ContractError
from schemas.ids import digest
from schemas.tables import ERRORS, PART_TABLES, RUNS, TABLES
from schemas.vocabulary import SCHEMA_VERSION

logger = logging.getLogger(__name__)

MANIFEST: Final = "_PUBLISHED.json"
RUN_ROWS: Final = "ledger/runs"
RECORDS_AT_ONCE: Final = 2000

_VIDEO_FACTS: Final = {
    "video_duration_seconds": "duration_seconds",
    "video_fps": "fps",
    "video_width_px": "width_px",
    "video_height_px": "height_px",
    "video_codec": "codec",
}


class Manifest(BaseModel):
    """What is published.

    Attributes:
        generation: grows with each publication.
        fingerprint: digest of the plan parts, commits and run rows that it was made from.
        tables: files of each table, in row order.
        owed_records: planned records without a row at that time.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: str
    generation: int
    fingerprint: str
    created_at: str
    tables: dict[str, list[PublishedFile]]
    owed_records: int

    def paths(self) -> set[str]:
        """Return the names of all published files."""
        return {file.path for files in self.tables.values() for file in files}


def read_manifest(storage: Storage) -> Manifest | None:
    """Return what is published, None before the first publication.

    Raises:
        ContractError: the manifest cannot be read.
    """
    try:
        return Manifest.model_validate(json.loads(storage.get(MANIFEST)))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ContractError(f"{MANIFEST} of {storage.uri} is not a manifest") from error


def write_run_row(storage: Storage, row: dict[str, Any]) -> None:
    """Keep the row of `runs` of one invocation; the same `run_id` replaces it.

    Raises:
        ContractError: a key is no column of RUNS.
    """
    table = rows_to_table([row], RUNS)
    [checked] = table.to_pylist()
    storage.put(f"{RUN_ROWS}/{checked['run_id']}.json", json.dumps(checked, default=str).encode())


def read_run_rows(storage: Storage) -> pa.Table:
    """Return the rows of `runs`, by start time."""
    names = storage.list(RUN_ROWS)
    rows = [json.loads(data) for data in storage.get_many(names) if data is not None]
    for row in rows:
        for name in ("started_at", "ended_at"):
            row[name] = None if row[name] is None else np.datetime64(row[name].replace("+00:00", ""), "us").item()
    return rows_to_table(sorted(rows, key=lambda row: (str(row["started_at"]), row["run_id"])), RUNS)


def fingerprint_of(
    plan: PlanReader, ledger: Ledger, assemble_text: bool = False, schema_version: str = SCHEMA_VERSION
) -> str:
    """Return a digest of everything that the tables of a version are made from, `runs` left out."""
    return digest(schema_version, str(assemble_text), *plan.names, *ledger.part_ids())


def publish(
    storage: Storage,
    run_id: str,
    *,
    repro_template: str = REPRO_TEMPLATE,
    assemble_text: bool = False,
    clock: Clock = utc_now,
    confirm: Callable[[], None] = lambda: None,
) -> Manifest:
    """Write the published tables from what is committed now, and return their manifest.

    Nothing is written when nothing changed since the last time, and only `runs` when only that did.
    Call it with the lease held and no flow running.

    Args:
        storage: where the run lives.
        run_id: the invocation; goes into `documents`.
        repro_template: see `WriteRecordsConfig`.
        assemble_text: True fills `documents.text` and `page_spans`.
        clock: the present time, in UTC.
        confirm: called right before files that others may count on are replaced; raises when the run is another's.
    """
    ledger = Ledger(storage, clock)
    ledger.refresh()
    plan = PlanReader(storage)
    manifest = read_manifest(storage)
    fingerprint = fingerprint_of(plan, ledger, assemble_text)
    confirm()
    is_whole = _remove_unpublished(storage, manifest)
    generation = manifest.generation + 1 if manifest else 1
    token = uuid.uuid4().hex[:8]
    if manifest is not None and manifest.fingerprint == fingerprint and is_whole:
        if _runs_are_published(storage, manifest):
            return manifest
        runs = TableWriter(storage, "runs", generation, token)
        runs.append(read_run_rows(storage))
        tables, owed = manifest.tables | {"runs": runs.close()}, manifest.owed_records
    else:
        publication = _Publication(storage, (generation, token), run_id, repro_template, assemble_text)
        owed = publication.write(plan, ledger.committed_records())
        tables = publication.close()
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        generation=generation,
        fingerprint=fingerprint,
        created_at=clock().isoformat(),
        tables=tables,
        owed_records=owed,
    )
    confirm()
    storage.put(MANIFEST, manifest.model_dump_json(indent=1).encode())
    _remove_unpublished(storage, manifest)
    ledger.sweep()
    return manifest


def published_tables(storage: Storage, manifest: Manifest, table_name: str, columns: list[str]) -> Iterator[pa.Table]:
    """Yield `columns` of a published table, one row group at a time."""
    for file in manifest.tables[table_name]:
        with storage.open_input(file.path, ranges=True) as source:
            parquet = pq.ParquetFile(source)
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group, columns=columns)


class _Publication:
    """One generation of the published tables, while it is being written."""

    def __init__(
        self, storage: Storage, generation: tuple[int, str], run_id: str, repro_template: str, assemble_text: bool
    ) -> None:
        self._storage = storage
        self._repro_template = repro_template
        self._writers = {name: TableWriter(storage, name, *generation) for name in TABLES}
        self._parts = PartCache(storage)
        self._seen = KeySet()
        self._tally = DocumentTally(run_id, assemble_text)
        self._owed = 0

    def write(self, plan: PlanReader, committed: CommittedRecords) -> int:
        """Write every committed record of the plan; return how many records are owed."""
        for table in plan:
            for units in _groups(table):
                self._write_group(units, committed)
        self._writers["documents"].append(self._tally.finish())
        self._writers["runs"].append(read_run_rows(self._storage))
        return self._owed

    def close(self) -> dict[str, list[PublishedFile]]:
        """Finish all files and return them."""
        return {name: writer.close() for name, writer in self._writers.items()}

    def _write_group(self, units: pa.Table, committed: CommittedRecords) -> None:
        keys = unit_keys(units)
        parts = committed.parts_of(keys)
        fresh = self._seen.add_all(keys)
        self._owed += sum(part is None and new for part, new in zip(parts, fresh.tolist(), strict=True))
        owners = np.repeat(np.arange(units.num_rows), record_counts(units))
        # Rows are asked for by distinct key; a key that two units of the group share keeps its first owner.
        first_place = {key: place for place, key in reversed(list(enumerate(keys)))}
        rows = {name: self._rows(name, first_place, parts) for name in PART_TABLES}
        self._tally.add(units, keys, rows["pages"][0], rows["video_segments"][0])
        for name, (table, places) in rows.items():
            new = fresh[places]
            if not new.all():
                table, places = table.filter(pa.array(new)), places[new]
            if name == "video_segments":
                table = _with_video_facts(table, units, owners[places])
            if name == "errors":
                table = self._with_plan_errors(table, owners[places], units)
            self._writers[name].append(table)
        self._writers["documents"].append(self._tally.done())

    def _rows(
        self, table_name: str, first_place: dict[str, int], parts: list[str | None]
    ) -> tuple[pa.Table, npt.NDArray[np.int64]]:
        """Return the winning rows of some records in plan order, and the place of each row's record."""
        wanted: OrderedDict[str, list[str]] = OrderedDict()
        for key, place in first_place.items():
            part = parts[place]
            if part is not None:
                wanted.setdefault(part, []).append(key)
        found = [TABLES[table_name].empty_table()]
        for part, keys in wanted.items():
            table = self._parts.get(table_name, part)
            if table is not None:
                wanted_rows = pc.is_in(table["record_key"], value_set=pa.array(keys, pa.string()))
                found.append(table if pc.all(wanted_rows).as_py() else table.filter(wanted_rows))
        rows = pa.concat_tables(found)
        places = np.array([first_place[key] for key in rows["record_key"].to_pylist()], dtype=np.int64)
        if (places[1:] >= places[:-1]).all():
            return rows, places
        order = np.argsort(places, kind="stable")
        return rows.take(pa.array(order)), places[order]

    def _with_plan_errors(self, table: pa.Table, owners: npt.NDArray[np.int64], units: pa.Table) -> pa.Table:
        failed = np.flatnonzero(pc.is_valid(units["error"]).to_numpy(zero_copy_only=False))
        if not len(failed):
            return table
        rows = [_plan_error_row(row, self._repro_template) for row in units.take(pa.array(failed)).to_pylist()]
        together = pa.concat_tables([table, rows_to_table(rows, ERRORS)])
        order = np.argsort(np.concatenate([owners, failed]), kind="stable")
        return together.take(pa.array(order))


def _groups(units: pa.Table) -> Iterator[pa.Table]:
    """Yield slices of whole units with about `RECORDS_AT_ONCE` records each."""
    ends = np.cumsum(record_counts(units))
    start = 0
    while start < units.num_rows:
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + RECORDS_AT_ONCE, side="right")))
        yield units.slice(start, stop - start)
        start = stop


def _with_video_facts(segments: pa.Table, units: pa.Table, owners: npt.NDArray[np.int64]) -> pa.Table:
    for column, fact in _VIDEO_FACTS.items():
        values = units[fact].take(pa.array(owners))
        segments = segments.set_column(segments.schema.get_field_index(column), column, values)
    return segments


def _plan_error_row(unit: dict[str, Any], repro_template: str) -> dict[str, Any]:
    owner = "video_id" if unit["kind"] == "video" else "doc_id"
    return {
        **unit["error"],
        owner: unit["doc_id"],
        "run_id": unit["run_id"],
        "created_at": unit["planned_at"],
        "error_id": digest(unit["unit_id"], "plan")[:32],
        "source_uri": unit["source_uri"],
        "source_ref": unit["source_ref"],
        "task": unit["task"],
        "recovered": False,
        "quarantined": False,
        "repro_command": repro_command(repro_template, named_input(unit["source_uri"], unit["source_ref"]), None),
    }


def _runs_are_published(storage: Storage, manifest: Manifest) -> bool:
    published = pa.concat_tables([RUNS.empty_table(), *published_tables(storage, manifest, "runs", RUNS.names)])
    return bool(published.equals(read_run_rows(storage)))


def _remove_unpublished(storage: Storage, manifest: Manifest | None) -> bool:
    """Remove files of the table folders that the manifest does not name; return whether all that it names are there."""
    missing = manifest.paths() if manifest else set()
    valid = set(missing)
    for table_name in TABLES:
        for name in storage.list(table_name):
            missing.discard(name)
            if name not in valid:
                storage.delete(name)
    return not missing
