"""What unchanged archives hold: once listed by a run, their members are known without opening them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa

from operators.archives import Contents, Member
from operators.base import rows_to_table
from pipeline.addresses import stored_uri
from pipeline.commits import utc_now
from pipeline.known_sources import KNOWN_SOURCE, is_tellable, source_name, source_version
from pipeline.ledger import Ledger

ARCHIVES_TABLE: Final = "archives"
OF_SOURCES: Final = ("source_name", "source_version", "source_uri", "size_bytes", "version_tag", "run_id", "seen_at")
KNOWN_ARCHIVE: Final = pa.schema(
    [
        *(KNOWN_SOURCE.field(name) for name in OF_SOURCES),
        pa.field("passed_over", pa.int64()),
        pa.field(
            "members",
            pa.list_(
                pa.struct(
                    [
                        pa.field("name", pa.string()),
                        pa.field("size_bytes", pa.int64()),
                        pa.field("byte_offset", pa.int64()),
                        pa.field("version", pa.string()),
                    ]
                )
            ),
        ),
    ]
)
"""One archive, as it was when it was listed to its end: the fields of `operators.archives.Contents`."""

MEMBERS_AT_ONCE: Final = 200_000


class KnownArchives:
    """What ledgers know of archives; what a run learns goes into its own ledger.

    Args:
        own: the run's ledger, whose lease is held.
        run_id: the invocation.
        others: further ledgers to look into.
    """

    def __init__(self, own: Ledger, run_id: str, others: Sequence[Ledger] = ()) -> None:
        self._own = own
        self._run_id = run_id
        self._ledgers = (own, *others)
        # Read at the first archive: most runs have none.
        self._places: dict[tuple[bytes, bytes], tuple[Ledger, str, int]] | None = None
        self._part: tuple[str, pa.Table] = ("", KNOWN_ARCHIVE.empty_table())
        self._learned: list[dict[str, Any]] = []
        self._members = 0

    def contents(self, archive: Mapping[str, Any]) -> Contents | None:
        """Return what an archive holds that is as it was; None for one that must be opened.

        Args:
            archive: its row, as a file's.
        """
        if not is_tellable(archive):
            return None
        if self._places is None:
            self._places = {key: place for ledger in self._ledgers for key, place in _places(ledger)}
        place = self._places.get((source_name(archive), source_version(archive)))
        if place is None:
            return None
        ledger, part_id, row = place
        try:
            if self._part[0] != part_id:
                self._part = (part_id, ledger.read_part(ARCHIVES_TABLE, part_id, KNOWN_ARCHIVE))
        except FileNotFoundError:
            # Compacted away or purged since the ledger was read.
            return None
        known = self._part[1].slice(row, 1).to_pylist()[0]
        members = {member["name"]: Member(**member) for member in known["members"]}
        return Contents(members=members, passed_over=known["passed_over"])

    def learn(self, archive: Mapping[str, Any], contents: Contents) -> None:
        """Note what an archive holds; one that is damaged is opened again by every call."""
        if contents.damage is not None or not is_tellable(archive):
            return
        members = [
            {
                "name": member.name,
                "size_bytes": member.size_bytes,
                "byte_offset": member.byte_offset,
                "version": member.version,
            }
            for member in contents.members.values()
        ]
        self._learned.append(
            {
                "source_uri": stored_uri(archive["source_uri"]),
                "size_bytes": archive["size_bytes"],
                "version_tag": archive["version_tag"],
                "source_name": source_name(archive),
                "source_version": source_version(archive),
                "run_id": self._run_id,
                "seen_at": utc_now(),
                "passed_over": contents.passed_over,
                "members": members,
            }
        )
        self._members += len(members)
        if self._members >= MEMBERS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what was learned."""
        if not self._learned:
            return
        commit_archives(self._own, rows_to_table(self._learned, KNOWN_ARCHIVE), self._run_id)
        self._learned = []
        self._members = 0


def commit_archives(ledger: Ledger, table: pa.Table, run_id: str, run_uri: str | None = None) -> None:
    """Commit KNOWN_ARCHIVE rows."""
    part_id = ledger.begin([ARCHIVES_TABLE, run_id])
    ledger.commit(part_id, {ARCHIVES_TABLE: table}, run_id=run_id, records={}, statuses={}, run_uri=run_uri)


def archive_parts(ledger: Ledger) -> Iterator[tuple[str, pa.Table]]:
    """Yield the id and the KNOWN_ARCHIVE rows of each committed part with archives, earliest first."""
    for commit in ledger.commits():
        if any(file.table == ARCHIVES_TABLE for file in commit.parts):
            yield commit.part_id, ledger.read_part(ARCHIVES_TABLE, commit.part_id, KNOWN_ARCHIVE)


def known_versions(ledger: Ledger) -> set[tuple[bytes, bytes]]:
    """Return names and versions of the archives that a ledger knows."""
    return {key for key, _ in _places(ledger)}


def _places(ledger: Ledger) -> Iterator[tuple[tuple[bytes, bytes], tuple[Ledger, str, int]]]:
    for part_id, table in archive_parts(ledger):
        pairs = zip(table["source_name"].to_pylist(), table["source_version"].to_pylist(), strict=True)
        for row, pair in enumerate(pairs):
            yield pair, (ledger, part_id, row)
