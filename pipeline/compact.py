"""Compaction: many small commits become few large ones, and what a source gave can be taken out.

The new part files are written first, then one commit that names them and the commits that it replaces: from then on
those count for nothing, and a sweep removes them. A kill before that commit leaves garbage, a kill after it leaves
leftovers; both are swept. Each record keeps the time of its own commit, within the commit that holds it now.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.answers import AnswerIndex
from pipeline.commits import RECORDS_TABLE, CommitRecord
from pipeline.committed import CommittedRecords
from pipeline.known_archives import ARCHIVES_TABLE, KNOWN_ARCHIVE
from pipeline.known_sources import KNOWN_SOURCE, LISTINGS_TABLE, SOURCES_TABLE
from pipeline.ledger import Ledger
from pipeline.parts import ANSWERS
from pipeline.sink import part_schema
from schemas.generation import KEPT_ANSWER
from schemas.tables import PART_TABLES

LARGE_RECORDS: Final = 10_000
LARGE_BYTES: Final = 64 * 2**20
"""A commit of so many rows, or bytes on disk, stays as it is; together small ones grow to twice as many."""

MOST_SMALL_COMMITS: Final = 256
MOST_SMALL_GIFTS: Final = 64
"""More small commits, of a run or of a shared ledger, are worth the reading and writing."""

DOCUMENT_COLUMNS: Final = ("doc_id", "video_id")


@dataclass(frozen=True)
class Purge:
    """What is taken out.

    Attributes:
        doc_ids: hashes of the bytes of documents and videos.
        source_names: as `pipeline.known_sources.source_name` gives them.
    """

    doc_ids: frozenset[str] = frozenset()
    source_names: frozenset[bytes] = frozenset()


@dataclass
class Compacted:
    """What a compaction did."""

    commits_before: int = 0
    commits_after: int = 0
    rows_removed: int = 0


@dataclass
class _Batch:
    """Commits that are written as one."""

    commits: list[CommitRecord] = field(default_factory=list)
    tables: dict[str, list[pa.Table]] = field(default_factory=dict)
    states: list[pa.Table] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0


def compact_if_needed(ledger: Ledger, run_id: str, most_small: int = MOST_SMALL_COMMITS) -> bool:
    """Compact a ledger that has more than `most_small` small commits; return whether it was."""
    ledger.refresh()
    if ledger.totals["commits"] <= most_small or sum(map(_is_small, ledger.commits())) <= most_small:
        return False
    compact(ledger, run_id)
    return True


def compact(ledger: Ledger, run_id: str, purge: Purge | None = None) -> Compacted:
    """Write the rows of small commits, those that count, as few commits; call it with the lease held.

    Args:
        ledger: read to its present state.
        run_id: the invocation.
        purge: rows that are left out; then every commit that holds some is written anew, large ones too.

    Raises:
        TransientError: the store failed; the ledger is as it was, or partly compacted, and whole either way.
    """
    done = Compacted()
    committed = ledger.committed_records()
    answers = AnswerIndex(())
    answers.read(ledger)
    batches: dict[tuple[int, bool], _Batch] = {}
    for commit in ledger.commits():
        done.commits_before += 1
        tables = None if purge is None else _purged(ledger, commit, purge)
        if (purge is None and not _is_small(commit)) or (purge is not None and tables is None):
            done.commits_after += 1
            if any(file.table == SOURCES_TABLE for file in commit.parts):
                # Of two versions of a source the later commit tells the newer, so what goes together is of one time.
                done.commits_after += _write_all(ledger, batches, run_id, done)
            continue
        batch = batches.setdefault((commit.pass_index, commit.copied), _Batch())
        _add(batch, ledger, commit, committed, answers, tables)
        if purge is not None or batch.rows >= LARGE_RECORDS or batch.bytes >= LARGE_BYTES:
            done.commits_after += _write(ledger, batches.pop((commit.pass_index, commit.copied)), run_id, done)
    done.commits_after += _write_all(ledger, batches, run_id, done)
    return done


def _is_small(commit: CommitRecord) -> bool:
    if commit.inputs:
        return False
    rows = sum(file.rows for file in commit.parts if file.table in ("pages", "video_segments", ANSWERS, SOURCES_TABLE))
    return rows < LARGE_RECORDS and sum(file.bytes for file in commit.parts) < LARGE_BYTES


def _add(
    batch: _Batch,
    ledger: Ledger,
    commit: CommitRecord,
    committed: CommittedRecords,
    answers: AnswerIndex,
    purged: dict[str, pa.Table] | None,
) -> None:
    states = ledger.states(commit)
    keys = states["record_key"].to_pylist()
    counts = committed.held_by(commit.part_id, keys)
    tables = _tables(ledger, commit) if purged is None else purged
    if purged is not None:
        gone = pc.invert(pc.is_in(states["record_key"], value_set=_keys_of(tables)))
        counts &= ~gone.to_numpy(zero_copy_only=False)
    kept = states.filter(pa.array(counts))
    for name, table in tables.items():
        if name in PART_TABLES and not counts.all():
            table = table.filter(pc.is_in(table["record_key"], value_set=kept["record_key"].combine_chunks()))
        if name == ANSWERS:
            places = map(answers.place_of, table["content_key"].to_pylist())
            newest = [place is not None and place.part_id == commit.part_id for place in places]
            table = table.filter(pa.array(newest, pa.bool_()))
        batch.tables.setdefault(name, []).append(table)
        batch.rows += table.num_rows if name != "blocks" else 0
    batch.states.append(kept)
    batch.commits.append(commit)
    batch.bytes += sum(file.bytes for file in commit.parts)


def _write_all(ledger: Ledger, batches: dict[tuple[int, bool], _Batch], run_id: str, done: Compacted) -> int:
    count = sum(_write(ledger, batch, run_id, done) for batch in batches.values())
    batches.clear()
    return count


def _write(ledger: Ledger, batch: _Batch, run_id: str, done: Compacted) -> int:
    """Write a batch; return how many commits it is then."""
    tables = {name: pa.concat_tables(parts) for name, parts in batch.tables.items()}
    states = pa.concat_tables(batch.states).to_pydict()
    records: dict[str, list[str]] = {}
    statuses: dict[str, list[str]] = {}
    for unit_id, key, status in zip(states["unit_id"], states["record_key"], states["status"], strict=True):
        records.setdefault(unit_id, []).append(key)
        statuses.setdefault(unit_id, []).append(status)
    tokens: dict[str, int] = {}
    for commit in batch.commits:
        for name, count in commit.tokens.items():
            tokens[name] = tokens.get(name, 0) + count
    before = sum(file.rows for commit in batch.commits for file in commit.parts if file.table != RECORDS_TABLE)
    removed = before - sum(table.num_rows for table in tables.values())
    if len(batch.commits) == 1 and not removed:
        return 1
    done.rows_removed += removed
    ledger.commit(
        ledger.begin(states["record_key"]),
        tables,
        run_id=run_id,
        records=records,
        statuses=statuses,
        retryable=_flagged(states, "retryable"),
        second_look=_flagged(states, "second_look"),
        tokens=tokens,
        pass_index=batch.commits[0].pass_index,
        ledger_hits=sum(commit.ledger_hits for commit in batch.commits),
        replaces=[commit.part_id for commit in batch.commits],
        replaces_since=min(commit.created_at for commit in batch.commits),
        copied=batch.commits[0].copied,
        run_uri=batch.commits[-1].run_uri,
    )
    return 1


def _flagged(states: dict[str, list[object]], name: str) -> Iterator[str]:
    for key, flag in zip(states["record_key"], states[name], strict=True):
        if flag:
            yield str(key)


def _tables(ledger: Ledger, commit: CommitRecord) -> dict[str, pa.Table]:
    schemas = {name: part_schema(name) for name in PART_TABLES}
    schemas |= {ANSWERS: KEPT_ANSWER, SOURCES_TABLE: KNOWN_SOURCE, ARCHIVES_TABLE: KNOWN_ARCHIVE}
    return {
        file.table: ledger.read_part(file.table, commit.part_id, schemas[file.table])
        for file in commit.parts
        if file.table in schemas
    }


def _purged(ledger: Ledger, commit: CommitRecord, purge: Purge) -> dict[str, pa.Table] | None:
    """Return the tables of a commit without what is taken out; None where it holds nothing of that."""
    if any(file.table == LISTINGS_TABLE for file in commit.parts):
        return None
    tables = _tables(ledger, commit)
    left = {name: table.filter(pa.array(_stays(table, purge))) for name, table in tables.items()}
    return None if all(left[name].num_rows == table.num_rows for name, table in tables.items()) else left


def _stays(table: pa.Table, purge: Purge) -> Sequence[bool]:
    stays = np.ones(table.num_rows, dtype=bool)
    doc_ids = pa.array(sorted(purge.doc_ids), pa.string())
    for column in DOCUMENT_COLUMNS:
        if column in table.column_names:
            stays &= ~pc.is_in(table[column], value_set=doc_ids).to_numpy(zero_copy_only=False)
    if "source_name" in table.column_names:
        names = pa.array(sorted(purge.source_names), pa.binary(16))
        stays &= ~pc.is_in(table["source_name"], value_set=names).to_numpy(zero_copy_only=False)
    found: Sequence[bool] = stays.tolist()
    return found


def _keys_of(tables: dict[str, pa.Table]) -> pa.Array:
    """Return the record keys that still have a row."""
    columns = [tables[name]["record_key"].combine_chunks() for name in ("pages", "video_segments") if name in tables]
    return pa.concat_arrays(columns) if columns else pa.array([], pa.string())
