"""Part files of a ledger, read once and kept for a while."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.commits import PARTS, conformed, part_path
from pipeline.storage import Storage
from schemas.generation import KEPT_ANSWER
from schemas.tables import PART_TABLES, TABLES
from schemas.vocabulary import QUIET_STATUSES

ANSWERS: Final = "answers"
PART_SCHEMAS: Final = {name: TABLES[name] for name in PART_TABLES} | {ANSWERS: KEPT_ANSWER}
"""What is read of the part files of each table; an older version's missing columns are null."""

RECORD_TABLES: Final = ("pages", "video_segments")
CACHE_BYTES: Final = 64 * 2**20


class PartCache:
    """Part files, the latest used kept in memory up to `CACHE_BYTES`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._names = set(storage.list(PARTS))
        self._kept: OrderedDict[str, pa.Table] = OrderedDict()
        self._bytes = 0

    def get(self, table_name: str, part_id: str) -> pa.Table | None:
        """Return the rows of one table in a part, without the ordering column; None where it has none, or is gone."""
        name = part_path(table_name, part_id)
        if name not in self._names:
            return None
        if name not in self._kept:
            try:
                with self._storage.open_input(name) as file:
                    # Parts are small: threads would cost more than they give.
                    table = conformed(pq.ParquetFile(file).read(use_threads=False), PART_SCHEMAS[table_name])
            except FileNotFoundError:
                self._names.discard(name)
                return None
            self._kept[name] = table
            self._bytes += table.nbytes
            while self._bytes > CACHE_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept.move_to_end(name)
        return self._kept[name]


def whole_records(tables: Mapping[str, pa.Table], statuses: Mapping[str, str]) -> set[str]:
    """Return the record keys that may be committed: those with a row and, where they failed, with an error.

    Args:
        tables: rows by table, as they were read from parts that somebody may have removed meanwhile.
        statuses: of each record.
    """
    rows = {key for name in RECORD_TABLES for key in tables[name]["record_key"].to_pylist()}
    explained = set(tables["errors"]["record_key"].to_pylist())
    return {key for key in rows if statuses[key] in QUIET_STATUSES or key in explained}


def rows_of(table: pa.Table, column: str, keys: Sequence[str]) -> pa.Table:
    """Return the rows of `table` whose `column` is among `keys`."""
    mask = pc.is_in(table[column], value_set=pa.array(keys, pa.string()))
    return table if pc.all(mask).as_py() else table.filter(mask)
