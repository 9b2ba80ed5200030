"""The plan: which units a run consists of, what it still owes, and which sources need not be probed again.

One part file holds all units of a batch of probed sources. It is written in one step and so is its own commit. Where a
source is planned again (it changed, the settings changed, or its failure may have passed) the newest part wins.
Passwords are never written, nor what of an address may be a secret: both come from the listing again.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from operators.base import require_columns
from pipeline.addresses import stored_error, stored_uri
from pipeline.commits import Clock, conformed, parquet_bytes, utc_now
from pipeline.committed import Again, CommittedRecords
from pipeline.key_index import KeySet, short_key
from pipeline.storage import Storage
from schemas.errors import ContractError
from schemas.ids import digest
from schemas.source import SOURCE, UNIT
from schemas.tables import CREATED_AT

logger = logging.getLogger(__name__)

PLAN: Final = "ledger/plan"
SOURCES_AT_ONCE = 5000
PARTS_KEPT = 4
RETIRED: Final = "retired"
"""In the name of a part that takes sources out; it sorts behind the digests of parts of the same number."""


_LISTED = ("size_bytes", "version_tag")
_NOT_KEPT = ("password", "survived")
PLANNED_UNIT: Final = pa.schema(
    [
        *(item for item in UNIT if item.name not in _NOT_KEPT),
        *(SOURCE.field(name) for name in _LISTED),
        pa.field("source_name", pa.binary(16)),
        pa.field("source_version", pa.binary(16)),
        pa.field("run_id", pa.string()),
        pa.field("planned_at", CREATED_AT),
    ]
)
"""A unit as it is kept: with what its source looked like when it was listed, without its password and without what its
records survived since.

`source_name` stands for uri, archive member, page ranges and time range as listed; `source_version` for size, version
tag and the settings that shaped the units."""


@dataclass
class PlanCounts:
    """What a plan holds; records are distinct, so a page of two equal files counts once."""

    sources: int = 0
    failed_sources: int = 0
    units: int = 0
    records: int = 0
    records_by_kind: Counter[str] = field(default_factory=Counter)


def write_plan_part(
    storage: Storage,
    units: pa.Table,
    sources: pa.Table,
    settings_digest: str,
    run_id: str | None = None,
    clock: Clock = utc_now,
    number: int | None = None,
) -> str:
    """Write all units of a batch of sources, in one step; return the name of the part.

    Args:
        storage: where the run lives.
        units: UNIT rows; every source has at least one, those that cannot be opened have one with an error.
        sources: the SOURCE rows that were probed.
        settings_digest: digest of everything that shaped the units and their record keys.
        run_id: the invocation that probed them.
        clock: the present time, in UTC.
        number: of the call that plans, above those before; None looks for the next one, at the price of a listing.

    Raises:
        ContractError: a column is missing, or a source has no unit.
    """
    require_columns(units, UNIT, "write_plan_part")
    require_columns(sources, SOURCE, "write_plan_part")
    places = {index: place for place, index in enumerate(sources["source_index"].to_pylist())}
    owners = units["source_index"].to_pylist()
    if set(owners) != set(places):
        raise ContractError(f"units belong to sources {sorted(set(owners) ^ set(places))[:5]} that were not probed")
    rows = pa.array([places[index] for index in owners], pa.int64())
    table = _without_secrets(units.drop_columns(list(_NOT_KEPT)))
    listed = sources.to_pylist()
    columns = {
        "source_name": pa.array([planned_name(row) for row in listed], pa.binary(16)).take(rows),
        "source_version": pa.array([planned_version(row, settings_digest) for row in listed], pa.binary(16)).take(rows),
        "run_id": pa.array([run_id] * len(owners), pa.string()),
        "planned_at": pa.array([clock()] * len(owners), CREATED_AT),
    }
    for name in _LISTED:
        columns[name] = sources[name].take(rows)
    for name, column in columns.items():
        table = table.append_column(name, column)
    order = np.lexsort((_first_places(units), np.asarray(owners, dtype=np.int64)))
    table = table.select(PLANNED_UNIT.names).cast(PLANNED_UNIT).take(pa.array(order))
    if number is None:
        number = next_part_number(_part_names(storage))
    data = parquet_bytes(table)
    name = f"{PLAN}/part-{number:06d}-{digest(data)[:12]}.parquet"
    storage.put(name, data)
    return name


def retire_sources(storage: Storage, source_indexes: Iterable[int], number: int) -> None:
    """Take sources out of the plan.

    Args:
        storage: where the run lives.
        source_indexes: of the sources; nothing is written for none.
        number: as `write_plan_part` takes it.
    """
    table = pa.table({"source_index": pa.array(sorted(source_indexes), pa.int64())})
    if table.num_rows:
        data = parquet_bytes(table)
        storage.put(f"{PLAN}/part-{number:06d}-{RETIRED}-{digest(data)[:12]}.parquet", data)


class PlanReader:
    """The current units of a plan, in source order, in bounded memory.

    Holds four bytes a source and a few part files.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.names = _part_names(storage)
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()
        self._newest = self._newest_parts()

    def __iter__(self) -> Iterator[pa.Table]:
        """Yield PLANNED_UNIT tables by ascending `source_index`; all units of a source are in one table."""
        indexes = np.flatnonzero(self._newest >= 0)
        for start in range(0, len(indexes), SOURCES_AT_ONCE):
            yield self._units_of(indexes[start : start + SOURCES_AT_ONCE])

    @property
    def source_count(self) -> int:
        """Number of sources."""
        return int(np.count_nonzero(self._newest >= 0))

    def is_planned(self, source_index: int) -> bool:
        """Return whether there is a source of this index."""
        return source_index < len(self._newest) and bool(self._newest[source_index] >= 0)

    @property
    def next_source_index(self) -> int:
        """The smallest index above all planned ones."""
        return len(self._newest)

    def _newest_parts(self) -> npt.NDArray[np.int32]:
        newest = np.empty(0, dtype=np.int32)
        for number, name in enumerate(self.names):
            with self._storage.open_input(name) as file:
                indexes = pq.read_table(file, columns=["source_index"])["source_index"].to_numpy()
            if len(indexes) and indexes.max() >= len(newest):
                newest = np.pad(newest, (0, int(indexes.max()) + 1 - len(newest)), constant_values=-1)
            newest[indexes] = -1 if _is_retiring(name) else number
        return newest

    def _units_of(self, indexes: npt.NDArray[np.int64]) -> pa.Table:
        found = []
        for number in np.unique(self._newest[indexes]).tolist():
            part = self._part(number)
            owners = part["source_index"].to_numpy()
            current = (self._newest[owners] == number) & (owners >= indexes[0]) & (owners <= indexes[-1])
            found.append(part.filter(pa.array(current)))
        table = pa.concat_tables(found)
        order = np.argsort(table["source_index"].to_numpy(), kind="stable")
        return table.take(pa.array(order))

    def _part(self, number: int) -> pa.Table:
        if number not in self._kept:
            with self._storage.open_input(self.names[number]) as file:
                self._kept[number] = conformed(pq.read_table(file), PLANNED_UNIT)
            if len(self._kept) > PARTS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]


def read_plan(storage: Storage) -> Iterator[pa.Table]:
    """Yield the current units as UNIT tables (passwords null), by ascending `source_index`."""
    for table in PlanReader(storage):
        yield as_units(table)


def as_units(
    planned: pa.Table,
    passwords: Mapping[int, str] | None = None,
    addresses: Mapping[int, str] | None = None,
    survived: Mapping[str, list[dict[str, Any]]] | None = None,
) -> pa.Table:
    """Return PLANNED_UNIT rows as UNIT rows.

    Args:
        planned: rows of the plan.
        passwords: password of each source that has one, by `source_index`; they come from the listing.
        addresses: full address of each source whose stored one is shorter, in the same way.
        survived: failures that records have survived, values of the `ERROR` struct, by record key.
    """
    known, full = passwords or {}, addresses or {}
    indexes = planned["source_index"].to_pylist()
    column = pa.array([known.get(index) for index in indexes], pa.string())
    uris = [full.get(index, uri) for index, uri in zip(indexes, planned["source_uri"].to_pylist(), strict=True)]
    planned = _with_values(planned, "source_uri", uris)
    lists = [survived and [survived.get(key) for key in keys or ()] for keys in planned["record_keys"].to_pylist()]
    planned = planned.append_column("survived", pa.array(lists, UNIT.field("survived").type))
    return planned.append_column("password", column).select(UNIT.names).cast(UNIT)


def owed_units(
    plan: Iterable[pa.Table],
    committed: CommittedRecords,
    again: Again | None = None,
    *,
    second_look: bool = False,
) -> Iterator[pa.Table]:
    """Yield what is still to be looked at, in the columns that came in.

    Units with an error or without owed records are left out; in the others only the owed records stay. A record key
    that several sources share (equal files) is owed by the first of them only.

    Args:
        plan: tables of units.
        committed: what is done.
        again: committed records that a later pass answers again.
        second_look: True yields the records that wait for one, False all others that are owed.
    """
    seen = KeySet()
    for table in plan:
        healthy = table.filter(pc.is_null(table["error"]))
        counts = _list_lengths(healthy["record_keys"])
        keys = _flat(healthy["record_keys"]).to_pylist()
        waiting = committed.wait_for_second_look(keys)
        keep = waiting if second_look else committed.owed(keys, again) & ~waiting
        places = np.flatnonzero(keep)
        keep[places] = seen.add_all([keys[place] for place in places.tolist()])
        owed = _keep_items(healthy, counts, keep)
        if owed.num_rows:
            yield owed


def count_owed(plan: Iterable[pa.Table], committed: CommittedRecords, again: Again | None = None) -> int:
    """Return how many distinct records are owed a look, first or second."""
    seen = KeySet()
    count = 0
    for table in plan:
        keys = unit_keys(table)
        count += int((seen.add_all(keys) & committed.owed(keys, again)).sum())
    return count


def count_plan(plan: Iterable[pa.Table]) -> PlanCounts:
    """Return what the plan holds."""
    counts = PlanCounts()
    seen = KeySet()
    last_source = None
    for table in plan:
        columns = table.select(["source_index", "kind", "record_keys", "error"]).to_pydict()
        for source, kind, keys, error in zip(*columns.values(), strict=True):
            counts.sources += source != last_source
            last_source = source
            counts.units += 1
            counts.failed_sources += error is not None
            fresh = int(seen.add_all(keys or ()).sum())
            counts.records += fresh
            if fresh:
                counts.records_by_kind[kind] += fresh
    return counts


def planned_name(row: Mapping[str, Any]) -> bytes:
    """Return 16 bytes that stand for what was asked of a source: uri, archive member, page ranges and time range."""
    member = (row["source_ref"] or {}).get("member")
    parts = (stored_uri(row["source_uri"]), member, row["page_ranges"], row["start_seconds"], row["stop_seconds"])
    return short_key(repr(parts))


def _without_secrets(units: pa.Table) -> pa.Table:
    addresses = units["source_uri"].to_pylist()
    stored = [stored_uri(address) for address in addresses]
    if stored == addresses:
        return units
    errors = [
        stored_error(error, address) for error, address in zip(units["error"].to_pylist(), addresses, strict=True)
    ]
    return _with_values(_with_values(units, "source_uri", stored), "error", errors)


def _with_values(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    place = table.schema.get_field_index(name)
    field = table.schema.field(place)
    return table.set_column(place, field, pa.array(values, field.type))


def planned_version(row: Mapping[str, Any], settings_digest: str) -> bytes:
    """Return 16 bytes that stand for size and version tag of a source, and the settings that shaped its units."""
    return short_key(repr((row["size_bytes"], row["version_tag"], settings_digest)))


def _first_places(units: pa.Table) -> npt.NDArray[np.int64]:
    """Return the first page number or segment index of each unit, 0 where it has none."""
    columns = units.select(["page_numbers", "segments"]).to_pydict()
    firsts = [
        min(pages) if pages else min(segment["segment_index"] for segment in segments) if segments else 0
        for pages, segments in zip(*columns.values(), strict=True)
    ]
    return np.asarray(firsts, dtype=np.int64)


def _keep_items(units: pa.Table, counts: npt.NDArray[np.int64], keep: npt.NDArray[np.bool_]) -> pa.Table:
    """Return `units` with only the kept items in their parallel lists, and without those that keep none."""
    owners = np.repeat(np.arange(len(counts)), counts)
    kept_counts = np.bincount(owners[keep], minlength=len(counts))
    mask = pa.array(keep)
    for name in ("record_keys", "page_numbers", "segments"):
        column = units[name].combine_chunks()
        item_counts = _list_lengths(column)
        if not item_counts.any():
            continue
        present = pc.is_valid(column).to_numpy(zero_copy_only=False)
        if not np.array_equal(item_counts[present], counts[present]):
            raise ContractError(f"{name} of a unit is not parallel to its record_keys")
        lengths = np.where(present, kept_counts, 0)
        items = _flat(column).filter(mask.filter(pa.array(np.repeat(present, counts))))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        lists = pa.ListArray.from_arrays(
            pa.array(offsets), items.cast(column.type.value_type), type=column.type, mask=pa.array(~present)
        )
        units = units.set_column(units.schema.get_field_index(name), units.schema.field(name), lists)
    return units.filter(pa.array(kept_counts > 0))


def _list_lengths(column: Any) -> npt.NDArray[np.int64]:
    lengths: npt.NDArray[np.int64] = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    return lengths


def _flat(column: Any) -> Any:
    flat = pc.list_flatten(column)
    return flat.combine_chunks() if isinstance(flat, pa.ChunkedArray) else flat


def _part_names(storage: Storage) -> list[str]:
    return sorted((name for name in storage.list(PLAN) if name.endswith(".parquet")), key=_part_order)


def _is_retiring(name: str) -> bool:
    return f"-{RETIRED}-" in name


def _part_order(name: str) -> tuple[int, str]:
    return _part_number(name), name


def next_part_number(names: list[str]) -> int:
    """Return the number of plan parts that is above those of `names`, which are in order."""
    return _part_number(names[-1]) + 1 if names else 0


def _part_number(name: str) -> int:
    return int(name.rsplit("/", 1)[-1].split("-")[1])


def unit_keys(units: pa.Table) -> list[str]:
    """Return all record keys of `units`, in order."""
    keys: list[str] = _flat(units["record_keys"]).to_pylist()
    return keys


def unit_blocks(units: pa.Table, least_units: int, least_records: int) -> Iterator[pa.Table]:
    """Yield slices of whole units, each with at least so many units and records; the last may have fewer."""
    start = held = 0
    for place, count in enumerate(record_counts(units).tolist(), 1):
        held += count
        if place - start >= least_units and held >= least_records:
            yield units.slice(start, place - start)
            start, held = place, 0
    if start < units.num_rows:
        yield units.slice(start)


def record_counts(units: pa.Table) -> npt.NDArray[np.int64]:
    """Return the number of records of each unit."""
    return _list_lengths(units["record_keys"])
