"""The ledger: which records are committed, and where their rows are.

A sink call writes its part files, then one commit record that names them. A part without a commit does not exist; of
several commits of one record the earliest wins, unless a later pass over the run was asked to answer it again. A record
whose commit says that it waits for a second look stays owed until such a pass has answered it. A commit may replace
others, whose rows it holds (see `pipeline.compact`); they count for nothing beside it.

A run has a ledger of its own; a ledger that several runs share has the same layout (see `pipeline.shared_ledger`)::

    ledger/parts/<table>/<part_id>.parquet
    ledger/commits/<part_id>.json
    ledger/leases/<generation>.json
"""

import hashlib
import logging
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta

import pyarrow as pa
import pyarrow.parquet as pq

from operators.base import rows_to_table
from pipeline.commits import (
    COMMITS,
    PART_TIME_FORMAT,
    PARTS,
    RECORD_STATES,
    RECORDS_TABLE,
    TIME_FORMAT,
    Clock,
    CommitRecord,
    PartFile,
    conformed,
    parquet_bytes,
    parse_commit,
    part_path,
    part_time,
    utc_now,
)
from pipeline.committed import CommittedRecords, state_of
from pipeline.key_index import KeyIndex
from pipeline.storage import Storage
from schemas.errors import ContractError, TransientError
from schemas.ids import digest
from schemas.vocabulary import SCHEMA_VERSION

logger = logging.getLogger(__name__)

GARBAGE_AGE_SECONDS = 3600.0
"""A part without a commit that is older than this belongs to a call that died: a call refuses to commit after half."""

MOST_LISTED_RECORDS = 2000
"""A commit of more records keeps them in a part file: as JSON, a hundred thousand take ten megabytes and a second."""

COMMITS_AT_ONCE = 500


class Ledger:
    """The committed records of a run, or of several that share it.

    Args:
        storage: where the run lives.
        clock: the present time, in UTC.
    """

    def __init__(self, storage: Storage, clock: Clock | None = None) -> None:
        self.storage = storage
        self._clock = clock or utc_now
        self._known: set[str] = set()
        self._ranks: list[tuple[int, str, str]] = []
        self._index = KeyIndex(self._ranks)
        self._replaced: dict[str, str] = {}
        self.broken: list[str] = []
        self.totals: Counter[str] = Counter()

    def begin(self, record_keys: Sequence[str]) -> str:
        """Return a new part id: time, what it holds, and a random end, so that no two attempts share a name."""
        now = self._clock().strftime(PART_TIME_FORMAT)
        return f"{now}-{digest(*sorted(record_keys))[:12]}-{uuid.uuid4().hex[:8]}"

    def commit(
        self,
        part_id: str,
        tables: Mapping[str, pa.Table],
        *,
        run_id: str,
        records: Mapping[str, list[str]],
        statuses: Mapping[str, list[str]],
        retryable: Iterable[str] = (),
        second_look: Iterable[str] = (),
        tokens: Mapping[str, int] | None = None,
        pass_index: int = 0,
        ledger_hits: int = 0,
        replaces: Sequence[str] = (),
        replaces_since: str | None = None,
        copied: bool = False,
        run_uri: str | None = None,
        inputs: Sequence[str] = (),
        listing_digest: str | None = None,
    ) -> CommitRecord:
        """Write the part files of `tables`, then the commit record that makes them count.

        Args:
            part_id: from `begin`.
            tables: rows of each table; empty ones are left out.
            run_id: the invocation that did the work.
            records: record keys of each unit.
            statuses: their statuses, in the same order.
            retryable: record keys whose failure may pass by itself.
            second_look: record keys that stay owed until a later pass has looked at them once more.
            tokens: token sums for the display.
            pass_index: above 0, these records replace those of earlier passes.
            ledger_hits: rows that were taken over from another ledger, or whose answer was.
            replaces: part ids whose rows these are.
            replaces_since: when the earliest of those was committed, which stays the time of their records.
            copied: True for rows that were taken over from a shared ledger.
            run_uri: the run folder that gives the rows, where this is a shared ledger.
            inputs: what a run listed, where a listing is among the tables.
            listing_digest: of what was found there.

        Raises:
            TransientError: a write failed, or took so long that a sweep may have removed the parts.
            ContractError: a status is outside the vocabulary.
        """
        for word in {status for values in statuses.values() for status in values}:
            state_of(word)
        files = [self._write_part(part_id, name, table) for name, table in tables.items() if table.num_rows]
        retryable, second_look = tuple(retryable), tuple(second_look)
        listed = sum(map(len, records.values())) <= MOST_LISTED_RECORDS
        if not listed:
            states = _record_states(records, statuses, set(retryable), set(second_look))
            files.append(self._write_part(part_id, RECORDS_TABLE, states))
        now = self._clock()
        if (now - part_time(part_id)).total_seconds() > GARBAGE_AGE_SECONDS / 2:
            raise TransientError(f"part {part_id} took too long to write; it is given up, not committed")
        record = CommitRecord(
            part_id=part_id,
            created_at=replaces_since or now.strftime(TIME_FORMAT),
            run_id=run_id,
            schema_version=SCHEMA_VERSION,
            pass_index=pass_index,
            parts=tuple(files),
            records=dict(records) if listed else {},
            statuses=dict(statuses) if listed else {},
            retryable=retryable if listed else (),
            second_look=second_look if listed else (),
            tokens=dict(tokens or {}),
            error_rows=sum(file.rows for file in files if file.table == "errors"),
            ledger_hits=ledger_hits,
            replaces=tuple(replaces),
            copied=copied,
            run_uri=run_uri,
            inputs=tuple(inputs),
            listing_digest=listing_digest,
        )
        self.storage.put(f"{COMMITS}/{part_id}.json", record.model_dump_json().encode())
        return record

    def refresh(self) -> int:
        """Read the commits that appeared since the last call; return how many.

        At the first call a commit whose part is missing (removed by a sweep while its writer hung) counts for nothing
        and is listed in `broken`: its records are owed again. Later calls trust the commits, because nobody sweeps
        while this ledger's driver holds the lease, and to list the parts each time would cost more than to read.
        """
        first = not self._known
        names = [name for name in self.storage.list(COMMITS) if name.endswith(".json") and name not in self._known]
        if not names:
            return 0
        parts = set(self.storage.list(PARTS)) if first else set()
        # The newest first: what replaces others is known before they come.
        for commit in self._read(sorted(names, reverse=True)):
            if commit.part_id in self._replaced:
                # What it has replaced itself is replaced for good.
                self._replaced.update(dict.fromkeys(commit.replaces, self._replaced[commit.part_id]))
                continue
            if not first or all(file.path in parts for file in commit.parts):
                self._take(commit)
            else:
                logger.warning("commit %s names a part that is not there; its records are owed again", commit.part_id)
                self.broken.append(commit.part_id)
        return len(names)

    def commits(self) -> Iterable[CommitRecord]:
        """Yield every valid commit record, earliest first; reads the store again, keeps nothing."""
        self.refresh()
        names = [f"{COMMITS}/{part_id}.json" for _, _, part_id in sorted(self._ranks, key=lambda rank: rank[1:])]
        for start in range(0, len(names), COMMITS_AT_ONCE):
            chunk = names[start : start + COMMITS_AT_ONCE]
            for name, data in zip(chunk, self.storage.get_many(chunk), strict=True):
                if data is None:
                    raise ContractError(f"commit {name} disappeared")
                yield parse_commit(name, data)

    def part_ids(self) -> list[str]:
        """Return the ids of all valid parts known so far, sorted."""
        return sorted(part_id for _, _, part_id in self._ranks)

    def committed_records(self) -> CommittedRecords:
        """Return the committed records, as of now."""
        self.refresh()
        return CommittedRecords(self._index, self._ranks)

    def states(self, commit: CommitRecord) -> pa.Table:
        """Return RECORD_STATES rows of a commit."""
        if any(file.table == RECORDS_TABLE for file in commit.parts):
            return self.read_part(RECORDS_TABLE, commit.part_id, RECORD_STATES)
        return _record_states(commit.records, commit.statuses, set(commit.retryable), set(commit.second_look))

    def read_part(self, table_name: str, part_id: str, schema: pa.Schema | None = None) -> pa.Table:
        """Return the rows of one part file, in the columns of `schema` where one is given.

        Raises:
            FileNotFoundError: there is none.
            TransientError: the store did not answer.
        """
        with self.storage.open_input(part_path(table_name, part_id)) as file:
            table = pq.ParquetFile(file).read(use_threads=False)
        return table if schema is None else conformed(table, schema)

    def sweep(self, grace_seconds: float = GARBAGE_AGE_SECONDS, replaced_grace_seconds: float = 0.0) -> int:
        """Remove what counts for nothing; return how many files.

        Call it with the lease held. Writers that a killed driver left behind may still be at work for seconds.

        Args:
            grace_seconds: parts without a commit that are younger stay.
            replaced_grace_seconds: commits stay, with their parts, that were replaced so lately; others may read them.
        """
        self.refresh()
        live = {part_id for _, _, part_id in self._ranks}
        now = self._clock()
        oldest, replaced_before = (
            now - timedelta(seconds=grace_seconds),
            now - timedelta(seconds=replaced_grace_seconds),
        )
        removed = self.storage.delete_temporaries(grace_seconds)
        for part_id in self.broken:
            self.storage.delete(f"{COMMITS}/{part_id}.json")
        self.broken.clear()
        kept = {old for old, new in self._replaced.items() if part_time(new) > replaced_before}
        # The oldest first: as long as one is there, so is what says that it counts for nothing.
        for part_id in sorted(self._replaced.keys() - kept):
            if f"{COMMITS}/{part_id}.json" in self._known:
                self.storage.delete(f"{COMMITS}/{part_id}.json")
        for name in self.storage.list(PARTS):
            part_id = name.rsplit("/", 1)[-1].removesuffix(".parquet")
            if part_id in live or part_id in kept:
                continue
            if part_id in self._replaced or part_time(part_id) <= oldest:
                self.storage.delete(name)
                removed += 1
        return removed

    def _read(self, names: Sequence[str]) -> Iterator[CommitRecord]:
        for start in range(0, len(names), COMMITS_AT_ONCE):
            chunk = names[start : start + COMMITS_AT_ONCE]
            for name, data in zip(chunk, self.storage.get_many(chunk), strict=True):
                if data is not None:
                    self._known.add(name)
                    yield parse_commit(name, data)

    def _write_part(self, part_id: str, table_name: str, table: pa.Table) -> PartFile:
        data = parquet_bytes(table)
        path = part_path(table_name, part_id)
        self.storage.put(path, data)
        return PartFile(
            table=table_name, path=path, rows=table.num_rows, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
        )

    def _take(self, commit: CommitRecord) -> None:
        number = len(self._ranks)
        self._ranks.append(commit.rank)
        self._replaced.update(dict.fromkeys(commit.replaces, commit.part_id))
        columns = self.states(commit).to_pydict()
        names = ("record_key", "status", "retryable", "second_look")
        for key, status, retryable, second_look in zip(*(columns[name] for name in names), strict=True):
            self._index.add(key, number, state_of(status, retryable=retryable, second_look=second_look))
        self.totals.update(commit.tokens)
        self.totals.update(commits=1, error_rows=commit.error_rows, ledger_hits=commit.ledger_hits)


def _record_states(
    records: Mapping[str, list[str]], statuses: Mapping[str, list[str]], retryable: set[str], second_look: set[str]
) -> pa.Table:
    rows = [
        {
            "unit_id": unit_id,
            "record_key": key,
            "status": status,
            "retryable": key in retryable,
            "second_look": key in second_look,
        }
        for unit_id, keys in records.items()
        for key, status in zip(keys, statuses[unit_id], strict=True)
    ]
    return rows_to_table(rows, RECORD_STATES)
