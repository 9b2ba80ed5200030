"""Sources that a shared ledger knows, with what their bytes are: an unchanged one is planned without being opened."""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from operators.base import rows_to_table
from operators.probe import SOURCE_COLUMNS, ProbeConfig, cut_units, failed_unit, owed_parts
from pipeline.addresses import stored_uri
from pipeline.commits import conformed, part_path
from pipeline.key_index import KEY_BYTES, SourceIndex, short_key
from pipeline.ledger import Ledger
from schemas.errors import ERROR, RecordError, error_struct
from schemas.source import SOURCE_FACTS, SOURCE_REF, UNIT
from schemas.tables import CREATED_AT

SOURCES_TABLE: Final = "sources"
KNOWN_SOURCE: Final = pa.schema(
    [
        pa.field("source_name", pa.binary(16)),
        pa.field("source_version", pa.binary(16)),
        pa.field("source_uri", pa.string()),
        pa.field("source_ref", SOURCE_REF),
        pa.field("size_bytes", pa.int64()),
        pa.field("version_tag", pa.string()),
        *SOURCE_FACTS,
        pa.field("error", ERROR),
        pa.field("probe_digest", pa.string()),
        pa.field("run_id", pa.string()),
        pa.field("seen_at", CREATED_AT),
    ]
)
"""What a source was when it was probed. `source_name` stands for its address and archive member, `source_version` for
size and version tag, `probe_digest` for what decides how its bytes are understood."""

LISTINGS_TABLE: Final = "listings"
LISTING: Final = pa.schema([KNOWN_SOURCE.field(name) for name in ("source_name", "source_version")])
"""What a run listed, in the end: what another run of the same inputs no longer lists is gone."""

OF_THE_REQUEST: Final = ("page_missing", "no_frames", "too_long")
"""These may say more of the pages or the time that were asked for than of the source."""

PARTS_KEPT: Final = 4
ROW_BITS: Final = 32


def source_name(row: Mapping[str, Any]) -> bytes:
    """Return 16 bytes that stand for the address of a source and its member of an archive."""
    return short_key(repr((stored_uri(row["source_uri"]), (row.get("source_ref") or {}).get("member"))))


def source_version(row: Mapping[str, Any]) -> bytes:
    """Return 16 bytes that stand for the size and version tag of a source."""
    return short_key(repr((row["size_bytes"], row["version_tag"])))


def is_tellable(row: Mapping[str, Any]) -> bool:
    """Return whether a change of a source would show in its listing: without a version tag it would not."""
    return row["size_bytes"] is not None and bool(row["version_tag"])


class Listed:
    """The sources that a call lists: 32 bytes each.

    Args:
        inputs: what was named, as it is stored; with what else decides what is listed.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        self.inputs = tuple(inputs)
        self._pairs = bytearray()

    def add(self, listed: pa.Table) -> None:
        """Take in SOURCE rows."""
        for row in listed.select(["source_uri", "source_ref", "size_bytes", "version_tag"]).to_pylist():
            self._pairs += source_name(row) + source_version(row)

    def table(self) -> pa.Table:
        """Return the LISTING rows, each source once, sorted."""
        pairs = np.unique(np.frombuffer(bytes(self._pairs), dtype=np.uint8).reshape(-1, 2 * KEY_BYTES), axis=0)
        first = np.ones(len(pairs), dtype=bool)
        first[1:] = (pairs[1:, :KEY_BYTES] != pairs[:-1, :KEY_BYTES]).any(axis=1)
        halves = (pairs[first, :KEY_BYTES], pairs[first, KEY_BYTES:])
        arrays = [
            pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), int(first.sum()), [None, _buffer(half)])
            for half in halves
        ]
        return pa.table(arrays, schema=LISTING)


def _buffer(rows: npt.NDArray[np.uint8]) -> pa.Buffer:
    return pa.py_buffer(np.ascontiguousarray(rows))


@dataclasses.dataclass
class Split:
    """Listed sources, told apart.

    Attributes:
        known: SOURCE rows of sources that are as they were.
        units: their UNIT rows.
        unknown: SOURCE rows of the others, which must be opened.
    """

    known: pa.Table
    units: pa.Table
    unknown: pa.Table


class KnownSources:
    """The newest that a ledger knows of each source; about 40 bytes a source in memory.

    Args:
        ledger: the shared ledger.
        probe_digest: of what decides how bytes are understood; what was found under another is not taken.
        retry_failed: True opens every source again that could not be opened.
    """

    def __init__(self, ledger: Ledger, probe_digest: str, *, retry_failed: bool = False) -> None:
        self._ledger = ledger
        self._retry_failed = retry_failed
        self._index = SourceIndex()
        self._part_ids: list[str] = []
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()
        for part_id, table in source_parts(ledger, ["source_name", "source_version", "probe_digest", "error"]):
            number = len(self._part_ids)
            self._part_ids.append(part_id)
            good = table["error"].is_null().to_pylist()
            columns = (table[name].to_pylist() for name in ("source_name", "source_version", "probe_digest"))
            for row, (name, version, found_by, is_good) in enumerate(zip(*columns, good, strict=True)):
                if found_by == probe_digest:
                    self._index.put(name, (number << ROW_BITS | row) << 1 | (not is_good), version)

    def __len__(self) -> int:
        return len(self._index)

    def knows(self, row: Mapping[str, Any]) -> bool:
        """Return whether a source was seen with this size and version tag; as a failure only where it is one now."""
        entry = self._index.get(source_name(row))
        if entry is None or entry[1] != source_version(row):
            return False
        return not entry[0] & 1 or row["error"] is not None

    def split(self, listed: pa.Table, config: ProbeConfig) -> Split:
        """Return which of the listed sources are known, with their units, and which are not.

        Args:
            listed: SOURCE rows.
            config: what is owed of each source.
        """
        known: list[int] = []
        units: list[dict[str, Any]] = []
        for place, row in enumerate(listed.to_pylist()):
            facts = self._facts(row)
            if facts is not None:
                known.append(place)
                units += known_units(row, facts, config)
        mask = np.zeros(listed.num_rows, dtype=bool)
        mask[known] = True
        return Split(listed.filter(pa.array(mask)), rows_to_table(units, UNIT), listed.filter(pa.array(~mask)))

    def _facts(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the KNOWN_SOURCE row of an unchanged source, None for one that must be opened."""
        if row["error"] is not None or not is_tellable(row):
            return None
        entry = self._index.get(source_name(row))
        if entry is None or entry[1] != source_version(row):
            return None
        number = entry[0] >> 1
        part, place = number >> ROW_BITS, number & ((1 << ROW_BITS) - 1)
        try:
            facts: dict[str, Any] = self._part(part).slice(place, 1).to_pylist()[0]
        except FileNotFoundError:
            # Compacted away or purged since the ledger was read.
            return None
        error = facts["error"]
        if error is not None and self._retry_failed:
            return None
        if error is not None and error["error_code"] == "encrypted":
            # A password may open what was closed.
            return None if row["password"] else facts
        # Without a password nobody is shown what another's may have opened.
        return None if facts["is_encrypted"] else facts

    def _part(self, number: int) -> pa.Table:
        if number not in self._kept:
            self._kept[number] = self._ledger.read_part(SOURCES_TABLE, self._part_ids[number], KNOWN_SOURCE)
            if len(self._kept) > PARTS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]


def known_units(source: Mapping[str, Any], facts: Mapping[str, Any], config: ProbeConfig) -> list[dict[str, Any]]:
    """Return the UNIT rows of a source whose bytes are known; one with an error where it owes nothing that exists."""
    row = dict(source)
    unit = {name: row[name] for name in SOURCE_COLUMNS} | {"task": config.task}
    unit |= {name: facts[name] for name in SOURCE_FACTS.names}
    if facts["error"] is not None:
        return [failed_unit(unit, row, facts["error"])]
    try:
        return cut_units(unit, owed_parts(unit, row, config), config)
    except RecordError as error:
        return [failed_unit(unit, row, error_struct(error, "ProbeSources"))]


def source_parts(ledger: Ledger, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    """Yield the id of each committed part with sources and some of its columns, earliest first."""
    for commit in ledger.commits():
        if any(file.table == SOURCES_TABLE for file in commit.parts):
            with ledger.storage.open_input(part_path(SOURCES_TABLE, commit.part_id), ranges=True) as file:
                found = pq.ParquetFile(file).read(columns=columns, use_threads=False)
            yield commit.part_id, conformed(found, pa.schema([KNOWN_SOURCE.field(name) for name in columns]))


def as_known(unit: Mapping[str, Any], probe_digest: str) -> dict[str, Any] | None:
    """Return the KNOWN_SOURCE row that a PLANNED_UNIT row gives; None where a change of its source would not show."""
    error = unit["error"]
    if not is_tellable(unit) or (error is not None and (error["retryable"] or error["stage"] == "list")):
        return None
    if error is not None and error["error_code"] in OF_THE_REQUEST:
        return None
    kept = {name: unit[name] for name in KNOWN_SOURCE.names if name in unit}
    return kept | {
        "source_name": source_name(unit),
        "source_version": source_version(unit),
        "probe_digest": probe_digest,
        "seen_at": unit["planned_at"],
    }
