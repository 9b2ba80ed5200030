"""Published Parquet files of sane size: rows in order, row groups for readers that seek, statistics to skip by."""

import hashlib
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from pipeline.storage import Storage
from schemas.tables import TABLES, check_vocabulary

ROW_GROUP_BYTES: Final = 32 * 2**20
ROW_GROUP_ROWS: Final = 20_000
FILE_BYTES: Final = 256 * 2**20
FILE_ROWS: Final = 100_000


class PublishedFile(BaseModel):
    """One published file."""

    model_config = ConfigDict(frozen=True)

    path: str
    rows: int
    bytes: int
    sha256: str


class TableWriter:
    """Writes the rows of one table to files of one generation.

    Holds at most one file, compressed, and one row group. A table without rows gets one empty file, so that a reader
    finds its columns.

    Args:
        storage: where the run lives.
        table_name: a key of `TABLES`.
        generation: of the publication.
        token: in the names of its files, so that two drivers at once never write one file.
    """

    def __init__(self, storage: Storage, table_name: str, generation: int, token: str) -> None:
        self._storage = storage
        self._name = table_name
        self._generation = generation
        self._token = token
        self._schema = TABLES[table_name]
        self._files: list[PublishedFile] = []
        self._held: list[pa.Table] = []
        self._held_rows = 0
        self._held_bytes = 0
        self._sink: pa.BufferOutputStream | None = None
        self._writer: pq.ParquetWriter | None = None
        self._file_rows = 0
        self._file_bytes = 0

    def append(self, table: pa.Table) -> None:
        """Add rows after those that came before.

        Raises:
            ContractError: a closed column holds another word.
        """
        if not table.num_rows:
            return
        table = table.cast(self._schema)
        check_vocabulary(self._name, table)
        row_bytes = max(1, table.nbytes // table.num_rows)
        step = max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // row_bytes))
        for start in range(0, table.num_rows, step):
            self._hold(table.slice(start, step))

    def close(self) -> list[PublishedFile]:
        """Write what is held and return all files."""
        self._write_row_group()
        if self._writer is not None or not self._files:
            self._finish_file()
        return self._files

    def _hold(self, rows: pa.Table) -> None:
        self._held.append(rows)
        self._held_rows += rows.num_rows
        self._held_bytes += rows.nbytes
        if self._held_rows >= ROW_GROUP_ROWS or self._held_bytes >= ROW_GROUP_BYTES:
            self._write_row_group()
        if self._file_rows >= FILE_ROWS or self._file_bytes >= FILE_BYTES:
            self._finish_file()

    def _write_row_group(self) -> None:
        if not self._held:
            return
        self._open_writer().write_table(pa.concat_tables(self._held), row_group_size=2**31 - 1)
        self._file_rows += self._held_rows
        self._file_bytes += self._held_bytes
        self._held, self._held_rows, self._held_bytes = [], 0, 0

    def _open_writer(self) -> pq.ParquetWriter:
        if self._writer is None:
            self._sink = pa.BufferOutputStream()
            self._writer = pq.ParquetWriter(
                self._sink, self._schema, compression="zstd", write_statistics=True, write_page_index=True
            )
        return self._writer

    def _finish_file(self) -> None:
        self._open_writer().close()
        assert self._sink is not None
        data = bytes(self._sink.getvalue())
        path = f"{self._name}/{self._name}-g{self._generation:04d}-{len(self._files):05d}-{self._token}.parquet"
        self._storage.put(path, data)
        digest = hashlib.sha256(data).hexdigest()
        self._files.append(PublishedFile(path=path, rows=self._file_rows, bytes=len(data), sha256=digest))
        self._writer, self._sink, self._file_rows, self._file_bytes = None, None, 0, 0
