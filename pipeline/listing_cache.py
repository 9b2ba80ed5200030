"""Which listed sources a plan holds already, so that they are not opened again."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.addresses import stored_uri
from pipeline.key_index import NEVER, SourceIndex
from pipeline.plan import PlanReader, next_part_number, planned_name, planned_version
from pipeline.storage import Storage


class ListingCache:
    """Tells which listed sources are planned already, so that they are not opened again.

    A source is known by uri, archive member, page ranges and time range. It is planned when its newest part saw the
    same size and version tag under the same settings, and met no error that may pass by itself. A remote source
    without a version tag is never planned: whether it changed shows when it is read. An encrypted source for which
    there is a password is tried again. What could not be listed, an archive or a folder, and now can, has the sources
    in it and is none itself. Holds about 40 bytes a source.

    Attributes:
        part_number: for `write_plan_part`, of all that is planned from here on.

    Args:
        storage: where the run lives.
        settings_digest: as `write_plan_part` takes it.
        retry_failed: True probes every source again that met an error.
    """

    def __init__(self, storage: Storage, settings_digest: str, *, retry_failed: bool = False) -> None:
        self._settings_digest = settings_digest
        self._retry_failed = retry_failed
        self._encrypted: set[int] = set()
        self._unlisted: dict[bytes, int] = {}
        self._known = SourceIndex()
        reader = PlanReader(storage)
        self.part_number = next_part_number(reader.names)
        self._planned_below = reader.next_source_index
        self._is_planned = reader.is_planned
        self._next_index = reader.next_source_index
        for table in reader:
            self._remember(table)

    def __len__(self) -> int:
        return len(self._known)

    def to_probe(self, listed: pa.Table) -> pa.Table:
        """Return the SOURCE rows of `listed` that must be probed.

        A source that was planned before keeps its index; a new one keeps the one of the listing unless another source
        has it, then it gets the next free one. A source that is listed twice is taken once.
        """
        fresh: list[dict[str, Any]] = []
        for row in listed.to_pylist():
            name, version = planned_name(row), planned_version(row, self._settings_digest)
            self._unlisted.pop(name, None)
            known = self._known.get(name)
            unlocked = known is not None and known[0] in self._encrypted and row["password"]
            if known is not None and known[1] == version and not unlocked:
                continue
            row["source_index"] = known[0] if known else self._free_index(row["source_index"])
            self._encrypted.discard(row["source_index"])
            self._known.put(name, row["source_index"], version)
            fresh.append(row)
        return pa.Table.from_pylist(fresh, schema=listed.schema)

    def to_retire(self) -> list[int]:
        """Return the indexes of planned sources that could not be listed, and that this listing did not name again."""
        return list(self._unlisted.values())

    def passwords(self, listed: pa.Table) -> dict[int, str]:
        """Return the passwords of listed sources by the `source_index` that they have in the plan."""
        found = {}
        for row in listed.filter(pc.is_valid(listed["password"])).to_pylist():
            known = self._known.get(planned_name(row))
            if known is not None:
                found[known[0]] = row["password"]
        return found

    def addresses(self, listed: pa.Table) -> dict[int, str]:
        """Return the full addresses of sources whose stored ones are shorter, as `passwords` returns passwords."""
        found = {}
        for row in listed.to_pylist():
            known = self._known.get(planned_name(row)) if stored_uri(row["source_uri"]) != row["source_uri"] else None
            if known is not None:
                found[known[0]] = row["source_uri"]
        return found

    def _remember(self, table: pa.Table) -> None:
        names = ["source_index", "source_uri", "version_tag", "source_name", "source_version", "error"]
        for row in table.select(names).to_pylist():
            error = row["error"]
            untagged = "://" in row["source_uri"] and not row["version_tag"]
            retry = untagged or (error is not None and (self._retry_failed or error["retryable"]))
            if error is not None and error["stage"] == "list":
                self._unlisted[row["source_name"]] = row["source_index"]
            if error is not None and error["error_code"] == "encrypted":
                self._encrypted.add(row["source_index"])
            self._known.put(row["source_name"], row["source_index"], NEVER if retry else row["source_version"])

    def _free_index(self, wanted: int) -> int:
        # Listings count upwards: below `_next_index` and above the plan, this listing has taken every index it passed.
        taken = wanted < self._next_index if wanted >= self._planned_below else self._is_planned(wanted)
        index = self._next_index if taken else wanted
        self._next_index = max(self._next_index, index + 1)
        return index
