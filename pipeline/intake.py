"""The first phases of a call: inputs are listed, and what the plan does not know is probed and planned."""

import time
from collections.abc import Iterator
from typing import Final

import pyarrow as pa

from pipeline.call import Call
from pipeline.config import probe_config, probe_digest
from pipeline.flow import plan_flow
from pipeline.known_archives import KnownArchives
from pipeline.known_sources import Listed
from pipeline.ledger import Ledger
from pipeline.listing_cache import ListingCache
from pipeline.local import rebatch
from pipeline.plan import retire_sources
from pipeline.request import listed
from pipeline.source import Listing
from pipeline.take_over import KnownPlanner

PLAN_TASKS_PER_WORKER: Final = 4
SOURCES_PER_PLAN_PART: Final = 256
MOST_PLAN_PARTS: Final = 2_000


class Intake:
    """Lists the inputs of a call, and plans what is new among them.

    Args:
        call: whose.

    Attributes:
        passwords: of sources, by place in the listing; they are stored nowhere.
        addresses: of sources whose stored address leaves a secret out, by place in the listing.
        listed: digest of everything that was listed, for the shared ledger.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.passwords: dict[int, str] = {}
        self.addresses: dict[int, str] = {}
        self.listed = Listed([*call.spec.stored()["inputs"], call.spec.pages or ""])

    def run(self) -> None:
        """List the inputs, and probe the sources that the plan does not know."""
        call = self.call
        began = time.perf_counter()
        call.phase("list")
        cache = ListingCache(call.storage, call.settings.digest, retry_failed=call.spec.retry_failed)
        listing = Listing()
        fresh = self._list(cache, listing)
        if call.lists_the_same and call.spec.limit is None:
            retire_sources(call.storage, cache.to_retire(), cache.part_number)
        call.seconds["list"] = time.perf_counter() - began
        if listing.passed_over:
            call.observer.note(
                f"{listing.passed_over} files that are no documents or videos by their names passed over"
            )
        count = sum(table.num_rows for table in fresh)
        call.progress.sources = listing.sources
        if count:
            self._probe(fresh, count, cache.part_number)

    def _list(self, cache: ListingCache, listing: Listing) -> list[pa.Table]:
        """Return the sources that have to be probed."""
        call = self.call
        fresh: list[pa.Table] = []
        planner = self._known_planner(cache.part_number)
        archives = KnownArchives(Ledger(call.storage), call.run_id, [call.shared.ledger] if call.shared else [])
        for table in listed(call.spec, listing, archives):
            if call.shared:
                self.listed.add(table)
            wanted = cache.to_probe(table)
            fresh.append(planner.plan(wanted) if planner else wanted)
            self.passwords |= cache.passwords(table)
            self.addresses |= cache.addresses(table)
            call.progress.sources = listing.sources
        if planner:
            planner.flush()
        archives.flush()
        return fresh

    def _known_planner(self, part_number: int) -> KnownPlanner | None:
        """Return what plans the sources that the shared ledger knows; None without one."""
        call = self.call
        if call.shared is None:
            return None
        config = probe_config(call.spec, call.settings)
        known = call.shared.known_sources(probe_digest(config), retry_failed=call.spec.retry_failed)
        return KnownPlanner(known, call.storage, config, call.settings.digest, part_number, call.progress)

    def _probe(self, fresh: list[pa.Table], count: int, part_number: int) -> None:
        call = self.call
        call.start()
        call.phase("plan")
        began = time.perf_counter()
        wanted = max(1, count // (PLAN_TASKS_PER_WORKER * call.executor.worker_count))
        rows = min(max(SOURCES_PER_PLAN_PART, count // MOST_PLAN_PARTS), wanted)
        held = [call.executor.hold(table) for table in rebatch(_drained(fresh), rows) if table.num_rows]
        flow = plan_flow(call.flow_config(), run_uri=call.spec.output, part_number=part_number)
        for planned in call.executor.run(flow, {"sources": held}):
            call.progress.planned += sum(planned["record_count"].to_pylist())
            call.progress.failed_sources += planned.num_rows - planned["error_code"].null_count
        call.seconds["plan"] = time.perf_counter() - began


def _drained(tables: list[pa.Table]) -> Iterator[pa.Table]:
    """Yield the tables and let go of them: a million listed sources need not lie in the driver twice."""
    tables.reverse()
    while tables:
        yield tables.pop()
