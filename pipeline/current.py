"""What a shared ledger knows of its sources: which are as they were last listed, were replaced, or are gone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from operators.base import rows_to_table
from pipeline.addresses import stored_uri
from pipeline.commits import conformed, part_path
from pipeline.compact import Purge
from pipeline.key_index import SourceIndex
from pipeline.known_sources import KNOWN_SOURCE, LISTINGS_TABLE, SOURCES_TABLE, source_name, source_parts
from pipeline.ledger import Ledger

STATES: Final = ("current", "replaced", "gone")
NOT_SHOWN: Final = ("source_name", "source_version", "probe_digest")
CURRENT_SOURCE: Final = pa.schema(
    [pa.field("state", pa.string()), *(field for field in KNOWN_SOURCE if field.name not in NOT_SHOWN)]
)
"""One row for each version of a source. `current`: the newest, as far as a listing tells; `replaced`: an older one;
`gone`: the source was in no later listing of the same inputs."""


@dataclass(frozen=True)
class Removal:
    """What taking out sources would take out.

    Attributes:
        purge: for `pipeline.compact.compact`.
        versions: versions of the sources that were found.
        shared: documents that other sources hold as well, and that stay for their sake.
    """

    purge: Purge
    versions: int
    shared: int


def source_states(ledger: Ledger) -> Iterator[pa.Table]:
    """Yield CURRENT_SOURCE rows, in the order in which runs gave them; bounded memory but for 40 bytes a source."""
    newest = SourceIndex()
    place = 0
    for _, table in source_parts(ledger, ["source_name", "source_version"]):
        for name, version in zip(*table.to_pydict().values(), strict=True):
            newest.put(name, place, version)
            place += 1
    listed = _listed(ledger)
    place = 0
    for rows in _known(ledger):
        shown: list[dict[str, Any]] = []
        for row in rows:
            entry = newest.get(row["source_name"])
            is_newest = entry is not None and entry[0] == place
            state = "replaced" if not is_newest else "current" if _is_listed(row, listed) else "gone"
            shown.append({"state": state, **{name: value for name, value in row.items() if name not in NOT_SHOWN}})
            place += 1
        yield rows_to_table(shown, CURRENT_SOURCE)


def removal_of(ledger: Ledger, addresses: Sequence[str]) -> Removal:
    """Return what is taken out with the sources of `addresses`; one that ends in a slash stands for all below it."""
    wanted = [stored_uri(address) for address in addresses]
    names: set[bytes] = set()
    doc_ids: set[str] = set()
    kept: set[str] = set()
    versions = 0
    for row in (row for rows in _known(ledger) for row in rows):
        if any(row["source_uri"] == one or (one.endswith("/") and row["source_uri"].startswith(one)) for one in wanted):
            versions += 1
            # An archive and its members have names of their own.
            names |= {row["source_name"], source_name({"source_uri": row["source_uri"]})}
            doc_ids.update([row["doc_id"]] if row["doc_id"] else [])
        elif row["doc_id"]:
            kept.add(row["doc_id"])
    return Removal(Purge(frozenset(doc_ids - kept), frozenset(names)), versions, len(doc_ids & kept))


def _known(ledger: Ledger) -> Iterator[list[dict[str, Any]]]:
    for commit in ledger.commits():
        if any(file.table == SOURCES_TABLE for file in commit.parts):
            yield ledger.read_part(SOURCES_TABLE, commit.part_id, KNOWN_SOURCE).to_pylist()


def _is_listed(row: dict[str, Any], listed: set[bytes] | None) -> bool:
    return listed is None or row["source_name"] in listed


def _listed(ledger: Ledger) -> set[bytes] | None:
    """Return the names in the latest listing of all inputs; None where no run has left one."""
    names: set[bytes] | None = None
    for commit in ledger.commits():
        if any(file.table == LISTINGS_TABLE for file in commit.parts):
            with ledger.storage.open_input(part_path(LISTINGS_TABLE, commit.part_id)) as file:
                found = conformed(pq.ParquetFile(file).read(), pa.schema([KNOWN_SOURCE.field("source_name")]))
            names = (names or set()) | set(found["source_name"].to_pylist())
    return names
