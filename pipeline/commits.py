"""Commit records: small, immutable, the only truth about the part files that they name."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from schemas.errors import ContractError

PARTS: Final = "ledger/parts"
COMMITS: Final = "ledger/commits"
PART_TIME_FORMAT: Final = "%Y%m%dT%H%M%S%fZ"
"""Part ids begin with it, so that they sort by time."""
TIME_FORMAT: Final = "%Y-%m-%dT%H:%M:%S.%fZ"

RECORDS_TABLE: Final = "records"
RECORD_STATES: Final = pa.schema(
    [
        pa.field("unit_id", pa.string()),
        pa.field("record_key", pa.string()),
        pa.field("status", pa.string()),
        pa.field("retryable", pa.bool_()),
        pa.field("second_look", pa.bool_()),
    ]
)
"""What a commit of many records keeps in a part file of its own, in the place of its lists."""

Clock = Callable[[], datetime]


class PartFile(BaseModel):
    """One Parquet file of a part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str
    path: str
    rows: int
    bytes: int
    sha256: str


class CommitRecord(BaseModel):
    """One commit: small, immutable, the only truth about its parts.

    Attributes:
        records: record keys of each unit; empty where a part of table `records` holds them.
        statuses: their statuses, in the same order.
        retryable: record keys whose failure may pass by itself.
        second_look: record keys whose rows do not count yet: they failed, and a later pass looks at them once more.
        pass_index: 0, or the number of the later pass that answered these records again.
        tokens: sums over the part: `prompt_tokens`, `image_tokens`, `output_tokens`, `tokens_saved`, `tokens_wasted`.
        replaces: part ids of the commits that this one holds the rows of, and that count for nothing beside it.
        copied: True for rows that were taken over from a shared ledger.
        run_uri: the run folder that gave the rows, where this is a shared ledger.
        inputs: what a run listed, where this commit holds a listing.
        listing_digest: of what was found there.
    """

    model_config = ConfigDict(frozen=True)

    part_id: str
    created_at: str
    run_id: str
    schema_version: str
    pass_index: int = 0
    parts: tuple[PartFile, ...]
    records: dict[str, list[str]] = {}
    statuses: dict[str, list[str]] = {}
    retryable: tuple[str, ...] = ()
    second_look: tuple[str, ...] = ()
    tokens: dict[str, int] = {}
    error_rows: int = 0
    ledger_hits: int = 0
    replaces: tuple[str, ...] = ()
    copied: bool = False
    run_uri: str | None = None
    inputs: tuple[str, ...] = ()
    listing_digest: str | None = None

    @property
    def rank(self) -> tuple[int, str, str]:
        """The lower of two wins: latest pass, then earliest commit, then part id."""
        return (-self.pass_index, self.created_at, self.part_id)


def parse_commit(name: str, data: bytes) -> CommitRecord:
    """Return the commit record in `data`.

    Raises:
        ContractError: it is not one.
    """
    try:
        return CommitRecord.model_validate(json.loads(data))
    except ValueError as error:
        raise ContractError(f"{name} is not a commit record ({len(data)} bytes)") from error


def parquet_bytes(table: pa.Table) -> bytes:
    """Return `table` as one Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def part_time(part_id: str) -> datetime:
    """Return when the call that writes `part_id` began."""
    return datetime.strptime(part_id.split("-", 1)[0], PART_TIME_FORMAT).replace(tzinfo=UTC)


def utc_now() -> datetime:
    """Return the present time, in UTC."""
    return datetime.now(UTC)


def part_path(table_name: str, part_id: str) -> str:
    """Return the name of the part file of one table."""
    return f"{PARTS}/{table_name}/{part_id}.parquet"


def conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the columns of `schema`, null where an older version of the table did not have them."""
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
