"""The ledger: which records are committed, and where their rows are.

A sink call writes its part files, then one commit record that names them. A part without a commit does not exist; of
several commits of one record the earliest wins, unless a later pass over the run was asked to answer it again. A record
whose commit says that it waits for a second look stays owed until such a pass has answered it.

Layout::

    ledger/parts/<table>/<part_id>.parquet
    ledger/commits/<part_id>.json
    ledger/leases/<generation>.json
"""

import hashlib
import json
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from pipeline.key_index import Entry, KeyIndex
from pipeline.storage import Storage
from schemas.errors import ContractError, TransientError
from schemas.ids import digest
from schemas.vocabulary import QUIET_STATUSES, SCHEMA_VERSION, STATUSES

logger = logging.getLogger(__name__)

PARTS = "ledger/parts"
COMMITS = "ledger/commits"
GARBAGE_AGE_SECONDS = 3600.0
"""A part without a commit that is older than this belongs to a call that died: a call refuses to commit after half."""

TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"
RETRYABLE_BIT = 1 << 8
SECOND_LOOK_BIT = 1 << 9
_STATUS_BITS = RETRYABLE_BIT - 1

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
        records: record keys of each unit.
        statuses: their statuses, in the same order.
        retryable: record keys whose failure may pass by itself.
        second_look: record keys whose rows do not count yet: they failed, and a later pass looks at them once more.
        pass_index: 0, or the number of the later pass that answered these records again.
        tokens: sums over the part: `prompt_tokens`, `image_tokens`, `output_tokens`, `tokens_saved`, `tokens_wasted`.
    """

    model_config = ConfigDict(frozen=True)

    part_id: str
    created_at: str
    run_id: str
    schema_version: str
    pass_index: int = 0
    parts: tuple[PartFile, ...]
    records: dict[str, list[str]]
    statuses: dict[str, list[str]]
    retryable: tuple[str, ...] = ()
    second_look: tuple[str, ...] = ()
    tokens: dict[str, int] = {}
    error_rows: int = 0
    ledger_hits: int = 0

    @property
    def rank(self) -> tuple[int, str, str]:
        """The lower of two wins: latest pass, then earliest commit, then part id."""
        return (-self.pass_index, self.created_at, self.part_id)


class Ledger:
    """The committed records of a run.

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
        self.broken: list[str] = []
        self.totals: Counter[str] = Counter()

    def begin(self, record_keys: Sequence[str]) -> str:
        """Return a new part id: time, what it holds, and a random end, so that no two attempts share a name."""
        now = self._clock().strftime("%Y%m%dT%H%M%S%fZ")
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
            ledger_hits: rows that were copied from another ledger.

        Raises:
            TransientError: a write failed, or took so long that a sweep may have removed the parts.
            ContractError: a status is outside the vocabulary.
        """
        for word in {status for values in statuses.values() for status in values}:
            _state(word)
        files = tuple(self._write_part(part_id, name, table) for name, table in tables.items() if table.num_rows)
        now = self._clock()
        if (now - part_time(part_id)).total_seconds() > GARBAGE_AGE_SECONDS / 2:
            raise TransientError(f"part {part_id} took too long to write; it is given up, not committed")
        record = CommitRecord(
            part_id=part_id,
            created_at=now.strftime(TIME_FORMAT),
            run_id=run_id,
            schema_version=SCHEMA_VERSION,
            pass_index=pass_index,
            parts=files,
            records=dict(records),
            statuses=dict(statuses),
            retryable=tuple(retryable),
            second_look=tuple(second_look),
            tokens=dict(tokens or {}),
            error_rows=sum(file.rows for file in files if file.table == "errors"),
            ledger_hits=ledger_hits,
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
        for name, data in zip(names, self.storage.get_many(names), strict=True):
            if data is None:
                continue
            self._known.add(name)
            commit = parse_commit(name, data)
            if not first or all(file.path in parts for file in commit.parts):
                self._take(commit)
            else:
                logger.warning("commit %s names a part that is not there; its records are owed again", name)
                self.broken.append(commit.part_id)
        return len(names)

    def commits(self) -> Iterable[CommitRecord]:
        """Yield every valid commit record, earliest first; reads the store again, keeps nothing."""
        self.refresh()
        names = [f"{COMMITS}/{part_id}.json" for _, _, part_id in sorted(self._ranks, key=lambda rank: rank[1:])]
        for start in range(0, len(names), 500):
            chunk = names[start : start + 500]
            for name, data in zip(chunk, self.storage.get_many(chunk), strict=True):
                if data is None:
                    raise ContractError(f"commit {name} disappeared")
                yield parse_commit(name, data)

    def part_ids(self) -> list[str]:
        """Return the ids of all valid parts known so far, sorted."""
        return sorted(part_id for _, _, part_id in self._ranks)

    def committed_records(self) -> "CommittedRecords":
        """Return the committed records, as of now."""
        self.refresh()
        return CommittedRecords(self._index, self._ranks)

    def sweep(self, grace_seconds: float = GARBAGE_AGE_SECONDS) -> int:
        """Remove parts without a commit that are older than `grace_seconds`; return how many files.

        Call it with the lease held. Writers that a killed driver left behind may still be at work for seconds.
        """
        self.refresh()
        live = {part_id for _, _, part_id in self._ranks}
        oldest = self._clock() - timedelta(seconds=grace_seconds)
        removed = self.storage.delete_temporaries() if grace_seconds == 0 else 0
        for name in self.storage.list(PARTS):
            part_id = name.rsplit("/", 1)[-1].removesuffix(".parquet")
            if part_id not in live and part_time(part_id) <= oldest:
                self.storage.delete(name)
                removed += 1
        for part_id in self.broken:
            self.storage.delete(f"{COMMITS}/{part_id}.json")
        self.broken.clear()
        return removed

    def _write_part(self, part_id: str, table_name: str, table: pa.Table) -> PartFile:
        data = parquet_bytes(table)
        path = f"{PARTS}/{table_name}/{part_id}.parquet"
        self.storage.put(path, data)
        return PartFile(
            table=table_name, path=path, rows=table.num_rows, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
        )

    def _take(self, commit: CommitRecord) -> None:
        number = len(self._ranks)
        self._ranks.append(commit.rank)
        retryable, second_look = set(commit.retryable), set(commit.second_look)
        for unit_id, keys in commit.records.items():
            for key, status in zip(keys, commit.statuses[unit_id], strict=True):
                state = _state(status, retryable=key in retryable, second_look=key in second_look)
                self._index.add(key, number, state)
        self.totals.update(commit.tokens)
        self.totals.update(commits=1, error_rows=commit.error_rows, ledger_hits=commit.ledger_hits)


class CommittedRecords:
    """Which records are done, and in which part; a view that grows with its ledger's `refresh`.

    A record that waits for a second look is not done: it is owed, has no status and no part, until that is committed.
    """

    def __init__(self, index: KeyIndex, ranks: Sequence[tuple[int, str, str]]) -> None:
        self._index = index
        self._ranks = ranks

    def __len__(self) -> int:
        return sum(self.status_counts().values())

    def __contains__(self, record_key: object) -> bool:
        return isinstance(record_key, str) and self._done(record_key) is not None

    def part_of(self, record_key: str) -> str | None:
        """Return the part that holds the row of `record_key`."""
        entry = self._done(record_key)
        return None if entry is None else self._ranks[entry.commit][2]

    def status_of(self, record_key: str) -> str | None:
        """Return the status of `record_key`, None where it is owed."""
        entry = self._done(record_key)
        return None if entry is None else STATUSES[entry.state & _STATUS_BITS]

    def parts_of(self, record_keys: Sequence[str]) -> list[str | None]:
        """Return `part_of` each key."""
        commits, states = self._index.lookup(record_keys)
        return self._part_ids(commits, (commits >= 0) & (states & SECOND_LOOK_BIT == 0))

    def first_look_parts_of(self, record_keys: Sequence[str]) -> list[str | None]:
        """Return the part that holds the failure of each key that waits for a second look, None for the others."""
        commits, _ = self._index.lookup(record_keys)
        return self._part_ids(commits, self.wait_for_second_look(record_keys))

    def status_counts(self) -> dict[str, int]:
        """Return how many committed records have each status."""
        counts: Counter[str] = Counter()
        for state, count in self._index.state_counts().items():
            if not state & SECOND_LOOK_BIT:
                counts[STATUSES[state & _STATUS_BITS]] += count
        return dict(counts)

    def owed(self, record_keys: Sequence[str], again: "Again | None" = None) -> npt.NDArray[np.bool_]:
        """Return for each key whether it is owed: not committed, waiting for a second look, or wanted `again`."""
        commits, states = self._index.lookup(record_keys)
        owed: npt.NDArray[np.bool_] = (commits < 0) | (states & SECOND_LOOK_BIT != 0)
        if again is None:
            return owed
        for place in np.flatnonzero(~owed).tolist():
            state = int(states[place])
            owed[place] = again.wants(
                STATUSES[state & _STATUS_BITS], bool(state & RETRYABLE_BIT), -self._ranks[int(commits[place])][0]
            )
        return owed

    def wait_for_second_look(self, record_keys: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return for each key whether its first look is committed and its second is owed."""
        commits, states = self._index.lookup(record_keys)
        waiting: npt.NDArray[np.bool_] = (commits >= 0) & (states & SECOND_LOOK_BIT != 0)
        return waiting

    def second_look_count(self) -> int:
        """Return how many records wait for a second look."""
        return sum(count for state, count in self._index.state_counts().items() if state & SECOND_LOOK_BIT)

    def retryable_count(self) -> int:
        """Return how many committed records failed for a reason that may pass by itself."""
        bits = RETRYABLE_BIT | SECOND_LOOK_BIT
        return sum(count for state, count in self._index.state_counts().items() if state & bits == RETRYABLE_BIT)

    def last_pass(self) -> int:
        """Return the highest pass index that was committed."""
        return max((-rank[0] for rank in self._ranks), default=0)

    def _done(self, record_key: str) -> Entry | None:
        entry = self._index.get(record_key)
        return None if entry is None or entry.state & SECOND_LOOK_BIT else entry

    def _part_ids(self, commits: npt.NDArray[np.int32], wanted: npt.NDArray[np.bool_]) -> list[str | None]:
        pairs = zip(commits.tolist(), wanted.tolist(), strict=True)
        return [self._ranks[commit][2] if is_wanted else None for commit, is_wanted in pairs]


class Again(BaseModel):
    """Which committed records a later pass answers again.

    Attributes:
        statuses: those that are owed again.
        only_retryable: True takes only those whose error said that it may pass by itself.
        pass_index: the pass that is about to run; what it has answered itself stays done.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    statuses: frozenset[str] = frozenset(STATUSES) - frozenset(QUIET_STATUSES)
    only_retryable: bool = False
    pass_index: int = 1

    def wants(self, status: str, retryable: bool, answered_in_pass: int) -> bool:
        """Return whether a record with this outcome is owed again."""
        if answered_in_pass >= self.pass_index or status not in self.statuses:
            return False
        return retryable or not self.only_retryable


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
    return datetime.strptime(part_id.split("-", 1)[0], "%Y%m%dT%H%M%S%fZ").replace(tzinfo=UTC)


def utc_now() -> datetime:
    """Return the present time, in UTC."""
    return datetime.now(UTC)


def _state(status: str, *, retryable: bool = False, second_look: bool = False) -> int:
    if status not in STATUSES:
        raise ContractError(f"status {status!r} is not in the closed vocabulary {list(STATUSES)}")
    return STATUSES.index(status) | RETRYABLE_BIT * retryable | SECOND_LOOK_BIT * second_look
