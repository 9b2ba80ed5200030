"""Is a ledger whole: every committed part there and unchanged, every committed record with its rows."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.commits import COMMITS, PARTS, CommitRecord
from pipeline.known_archives import ARCHIVES_TABLE
from pipeline.known_sources import SOURCES_TABLE
from pipeline.ledger import Ledger
from pipeline.parts import ANSWERS, RECORD_TABLES
from pipeline.storage import Storage
from schemas.vocabulary import QUIET_STATUSES


@dataclass
class LedgerFacts:
    """What a ledger holds.

    Attributes:
        records: distinct records whose row counts, by status in `statuses`.
        waiting: records whose first look failed, and whose second is owed.
        rows: rows of each table in committed parts.
        bytes: of committed parts.
        schema_versions: commits by the version of their tables.
        runs: run folders that gave something; of a run's own ledger none.
        left_behind: part files that belong to no commit that counts; a sweep removes them.
        problems: what does not add up, one line each; empty in a sound ledger.
    """

    uri: str
    commits: int = 0
    records: int = 0
    waiting: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    schema_versions: Counter[str] = field(default_factory=Counter)
    runs: list[str] = field(default_factory=list)
    first_at: str | None = None
    last_at: str | None = None
    left_behind: int = 0
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return every figure, as JSON can hold it."""
        return asdict(self) | {"rows": dict(self.rows), "schema_versions": dict(self.schema_versions)}


def inspect(storage: Storage, *, verify: bool = False) -> LedgerFacts:
    """Return what a ledger holds.

    Args:
        storage: of a shared ledger, or of a run.
        verify: True also reads every part and compares it with its commit.
    """
    ledger = Ledger(storage)
    committed = ledger.committed_records()
    facts = LedgerFacts(storage.uri, records=len(committed), statuses=committed.status_counts())
    facts.waiting = committed.second_look_count()
    live: set[str] = set()
    runs: set[str] = set()
    for commit in ledger.commits():
        facts.commits += 1
        facts.schema_versions[commit.schema_version] += 1
        facts.first_at = min(facts.first_at or commit.created_at, commit.created_at)
        facts.last_at = max(facts.last_at or commit.created_at, commit.created_at)
        runs.update([commit.run_uri] if commit.run_uri else [])
        for file in commit.parts:
            facts.rows[file.table] += file.rows
            facts.bytes += file.bytes
            live.add(file.path)
        if verify:
            facts.problems += _record_problems(ledger, commit)
    facts.runs = sorted(runs)
    facts.left_behind = len(set(storage.list(PARTS)) - live)
    facts.problems += [f"{COMMITS}/{part_id}.json names parts that are not there" for part_id in ledger.broken]
    if verify:
        facts.problems += part_problems(ledger)
    return facts


def part_problems(ledger: Ledger) -> Iterator[str]:
    """Yield one line for each committed part file that is missing or is not what was committed."""
    for commit in ledger.commits():
        for file in commit.parts:
            yield from file_problems(ledger.storage, file.path, file.sha256)


def file_problems(storage: Storage, path: str, sha256: str) -> Iterator[str]:
    """Yield one line where a file is missing or was changed."""
    try:
        found = hashlib.sha256(storage.get(path)).hexdigest()
    except FileNotFoundError:
        yield f"{path} is missing"
        return
    if found != sha256:
        yield f"{path} was changed: sha256 {found[:12]}, committed {sha256[:12]}"


def _record_problems(ledger: Ledger, commit: CommitRecord) -> Iterator[str]:
    """Yield one line for what the rows of a commit do not say as the commit does."""
    try:
        states = ledger.states(commit)
        rows = {
            file.table: _keys(ledger, file.path) for file in commit.parts if file.table in (*RECORD_TABLES, "errors")
        }
    except (FileNotFoundError, pa.ArrowInvalid):
        # The missing or changed file has a line of its own.
        return
    keys = Counter(key for name in RECORD_TABLES for key in rows.get(name, ()))
    wanted = Counter(states["record_key"].to_pylist())
    if keys != wanted:
        different = (keys - wanted) + (wanted - keys)
        yield f"commit {commit.part_id}: {len(different)} records whose rows are not one each, such as {min(different)}"
    loud = pc.invert(pc.is_in(states["status"], value_set=pa.array(QUIET_STATUSES)))
    unexplained = set(states.filter(loud)["record_key"].to_pylist()) - set(rows.get("errors", ()))
    if unexplained:
        some = f"{len(unexplained)} failed records without an error row, such as {min(unexplained)}"
        yield f"commit {commit.part_id}: {some}"


def _keys(ledger: Ledger, path: str) -> list[str]:
    with ledger.storage.open_input(path) as file:
        keys: list[str] = pq.ParquetFile(file).read(columns=["record_key"])["record_key"].to_pylist()
    return keys


COUNTED_TABLES: Final = (*RECORD_TABLES, "blocks", "errors", ANSWERS, SOURCES_TABLE, ARCHIVES_TABLE)
"""In the order in which people are told of them."""
