"""Accounting: proof by counting that every planned page and segment has exactly one row."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.committed import CommittedRecords
from pipeline.documents import COUNTS
from pipeline.key_index import KeySet
from pipeline.ledger import Ledger
from pipeline.plan import PlanReader, record_counts, unit_keys
from pipeline.publish import Manifest, fingerprint_of, published_tables, read_manifest
from pipeline.storage import Storage
from pipeline.verify import file_problems, part_problems
from schemas.vocabulary import QUIET_STATUSES, STATUSES

EXAMPLES: Final = 3


@dataclass
class Accounting:
    """Where a run stands.

    Attributes:
        sources: planned sources, with those that could not be opened.
        failed_sources: sources that could not be opened.
        planned: distinct planned records; `planned_by_kind` splits them.
        committed: planned records whose rows are committed.
        owed: planned records without.
        second_looks_owed: of these, pages on which the model failed and that it has not seen with other pixels yet.
        superseded: committed records that the present plan does not want: the source or the settings changed.
        statuses: committed records of the plan by status.
        published_rows: rows of the published `pages` and `video_segments`, None before the first publication.
        is_published: True when the published tables hold everything that is committed.
        tokens: sums over all commits, repeated attempts included.
        problems: what does not add up, one line each; empty in a sound run, finished or not.
    """

    sources: int = 0
    failed_sources: int = 0
    units: int = 0
    planned: int = 0
    planned_by_kind: Counter[str] = field(default_factory=Counter)
    committed: int = 0
    owed: int = 0
    second_looks_owed: int = 0
    superseded: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    error_rows: int = 0
    published_rows: int | None = None
    is_published: bool = False
    tokens: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """True when nothing is owed, everything is published, and it all adds up."""
        return self.owed == 0 and self.is_published and not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as JSON can hold them."""
        return asdict(self) | {
            "complete": self.complete,
            "planned_by_kind": dict(self.planned_by_kind),
            "statuses": dict(self.statuses),
        }

    def table(self) -> list[tuple[str, str]]:
        """Return the figures as lines of name and value, for people."""
        lines = [
            ("sources", f"{self.sources} ({self.failed_sources} could not be opened)"),
            ("planned", f"{self.planned} " + _parts(self.planned_by_kind)),
            ("committed", f"{self.committed} " + _parts(self.statuses)),
            ("owed", str(self.owed) + (f" ({self.second_looks_owed} a second look)" if self.second_looks_owed else "")),
            ("published", "not yet" if self.published_rows is None else f"{self.published_rows} rows"),
        ]
        if self.superseded:
            lines.append(("superseded", f"{self.superseded} records of earlier settings or sources"))
        lines += [("problem", problem) for problem in self.problems]
        return [*lines, ("complete", "yes" if self.complete else "no")]


def account(storage: Storage, check_parts: bool = False) -> Accounting:
    """Count a run: finished, still going, or killed.

    Args:
        storage: where the run lives.
        check_parts: True also reads every part and published file and compares their hashes.
    """
    ledger = Ledger(storage)
    committed = ledger.committed_records()
    plan = PlanReader(storage)
    result = Accounting(tokens=dict(ledger.totals))
    planned = _count_plan(plan, committed, result)
    result.superseded = len(committed) - result.committed
    if ledger.broken:
        result.problems.append(
            f"{len(ledger.broken)} commits name parts that are not there, such as {ledger.broken[0]}"
        )
    manifest = read_manifest(storage)
    if manifest is not None:
        result.is_published = manifest.fingerprint in {
            fingerprint_of(plan, ledger, flag, manifest.schema_version) for flag in (False, True)
        }
        _check_published(storage, manifest, planned, result)
    if check_parts:
        result.problems += _hash_problems(storage, ledger, manifest)
    return result


def _count_plan(plan: PlanReader, committed: CommittedRecords, result: Accounting) -> KeySet:
    planned = KeySet()
    result.sources = plan.source_count
    for table in plan:
        keys = unit_keys(table)
        fresh = planned.add_all(keys)
        owed = committed.owed(keys)
        kinds = np.repeat(np.array(table["kind"].to_pylist(), dtype=object), record_counts(table))
        result.units += table.num_rows
        result.failed_sources += table.num_rows - table["error"].null_count
        result.planned += int(fresh.sum())
        result.owed += int((fresh & owed).sum())
        result.second_looks_owed += int((fresh & committed.wait_for_second_look(keys)).sum())
        result.planned_by_kind.update(kinds[fresh].tolist())
        for key in (keys[place] for place in np.flatnonzero(fresh & ~owed).tolist()):
            result.statuses[str(committed.status_of(key))] += 1
    result.committed = result.planned - result.owed
    return planned


def _check_published(storage: Storage, manifest: Manifest, planned: KeySet, result: Accounting) -> None:
    missing = [path for path in sorted(manifest.paths()) if not storage.exists(path)]
    if missing:
        result.problems.append(f"{len(missing)} published files are missing, such as {missing[0]}")
        return
    extra = [name for table in manifest.tables for name in storage.list(table) if name not in manifest.paths()]
    if extra:
        result.problems.append(f"{len(extra)} files are not part of the publication, such as {extra[0]}")
    explained, source_errors = _read_errors(storage, manifest, result)
    statuses: Counter[str] = Counter()
    rows = 0
    seen, ids = KeySet(), KeySet()
    for table_name, id_column in (("pages", "page_id"), ("video_segments", "segment_id")):
        for table in published_tables(storage, manifest, table_name, ["record_key", id_column, "task", "status"]):
            rows += table.num_rows
            statuses.update(table["status"].to_pylist())
            _check_rows(table, id_column, (planned, seen, ids, explained), result.problems)
    result.published_rows = rows
    unknown = set(statuses) - set(STATUSES)
    if unknown:
        result.problems.append(f"statuses outside the vocabulary: {sorted(map(str, unknown))}")
    if result.is_published:
        _compare("published rows", rows, "committed records", result.committed, result)
        _compare("published statuses", dict(statuses), "committed statuses", dict(result.statuses), result)
        _compare("error rows without a record", source_errors, "sources that failed", result.failed_sources, result)
        _check_documents(storage, manifest, result)


def _check_rows(
    table: pa.Table, id_column: str, sets: tuple[KeySet, KeySet, KeySet, KeySet], problems: list[str]
) -> None:
    planned, seen, ids, explained = sets
    keys, statuses = table["record_key"].to_pylist(), table["status"].to_pylist()
    page_tasks = [
        f"{own} {task}" for own, task in zip(*table.select([id_column, "task"]).to_pydict().values(), strict=True)
    ]
    quiet = np.array([status in QUIET_STATUSES for status in statuses], dtype=bool)
    checks = (
        ("published twice", ~seen.add_all(keys)),
        ("published for one page or segment and task twice", ~ids.add_all(page_tasks)),
        ("published, but not planned", ~planned.contains(keys)),
        ("failed without a row in errors", ~quiet & ~explained.contains(keys)),
    )
    for what, mask in checks:
        wrong = [keys[place] for place in np.flatnonzero(mask).tolist()]
        if wrong:
            problems.append(f"{len(wrong)} records {what}, such as {wrong[0]}")


def _read_errors(storage: Storage, manifest: Manifest, result: Accounting) -> tuple[KeySet, int]:
    explained = KeySet()
    error_ids = KeySet()
    of_sources = 0
    repeated = 0
    for table in published_tables(storage, manifest, "errors", ["record_key", "error_id"]):
        result.error_rows += table.num_rows
        of_sources += table["record_key"].null_count
        repeated += int((~error_ids.add_all(table["error_id"].to_pylist())).sum())
        explained.add_all(table["record_key"].drop_null().to_pylist())
    if repeated:
        result.problems.append(f"{repeated} error rows are there twice")
    return explained, of_sources


def _check_documents(storage: Storage, manifest: Manifest, result: Accounting) -> None:
    rows, records, owed, failed = 0, 0, 0, 0
    for table in published_tables(storage, manifest, "documents", ["status", *COUNTS]):
        rows += table.num_rows
        sums = {name: pc.sum(table[name]).as_py() or 0 for name in COUNTS}
        owed += sums["owed_count"]
        records += sum(sums.values())
        counted = sum((table[name].to_numpy() for name in COUNTS), start=np.zeros(table.num_rows))
        failed += int(((counted == 0) & (np.array(table["status"].to_pylist()) == "failure")).sum())
    _compare("documents rows", rows, "planned sources", result.sources, result)
    # Equal files share their records, and each of them counts its own pages.
    if records < result.planned or owed < result.owed:
        result.problems.append(f"documents count {records} records, {owed} owed; {result.planned} are planned")
    if failed < result.failed_sources:
        result.problems.append(f"{failed} documents failed as a whole, wanted {result.failed_sources}")


def _hash_problems(storage: Storage, ledger: Ledger, manifest: Manifest | None) -> Iterator[str]:
    yield from part_problems(ledger)
    for files in (manifest.tables if manifest else {}).values():
        for file in files:
            yield from file_problems(storage, file.path, file.sha256)


def _compare(left_name: str, left: Any, right_name: str, right: Any, result: Accounting) -> None:
    if left != right:
        result.problems.append(f"{left_name}: {left}, {right_name}: {right}")


def _parts(counts: Counter[str]) -> str:
    return "(" + ", ".join(f"{count} {name}" for name, count in counts.most_common()) + ")" if counts else ""
