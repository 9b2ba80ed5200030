"""A ledger that several runs share: what one of them computed, no other computes again.

It has the layout of a run's own ledger. At its start a run takes over the rows of the records that it owes and finds
there, and at its end it gives what it computed itself; in between nothing is written, so runs may go on side by side,
and a lease is held only while one gives. What is given comes in large parts: commits of a night, not of a sink call.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from pipeline.commits import Clock, utc_now
from pipeline.compact import MOST_SMALL_GIFTS, compact_if_needed
from pipeline.give import Giver
from pipeline.known_sources import KnownSources, Listed
from pipeline.lease import Lease
from pipeline.ledger import GARBAGE_AGE_SECONDS, Ledger
from pipeline.plan import unit_keys
from pipeline.spec import RunSpec
from pipeline.storage import Storage
from pipeline.take_over import Copier, is_usable
from schemas.errors import ConfigError, TransientError

LEASE_WAIT_SECONDS: Final = 600.0
LEASE_LOOK_SECONDS: Final = 2.0


@dataclass
class Given:
    """What a run gave to a ledger."""

    records: int = 0
    answers: int = 0
    sources: int = 0


class SharedLedger:
    """A ledger beside the runs that share it.

    Args:
        uri: a folder, or a URL of any fsspec protocol.
        clock: the present time, in UTC.

    Raises:
        ConfigError: nothing can be written there.
    """

    def __init__(self, uri: str, clock: Clock = utc_now) -> None:
        self.uri = uri
        self.storage = Storage(uri)
        self._clock = clock
        self.ledger = Ledger(self.storage, clock)

    def known_sources(self, probe_digest: str, *, retry_failed: bool) -> KnownSources:
        """Return what the ledger knows of sources."""
        return KnownSources(self.ledger, probe_digest, retry_failed=retry_failed)

    def take_over(
        self,
        run: Storage,
        owed: Callable[[], Iterable[pa.Table]],
        run_id: str,
        *,
        repro_template: str,
        retry_failed: bool = False,
        pass_index: int = 0,
    ) -> int:
        """Copy into a run the rows of the records that it owes and that are here; return how many.

        Failures are taken over as well, for they would come again; those that may pass by themselves are not.

        Args:
            run: the run folder.
            owed: gives PLANNED_UNIT tables with the owed records of each unit.
            run_id: the invocation; goes into every row.
            repro_template: as `WriteRecordsConfig` takes it.
            retry_failed: True takes over no failure.
            pass_index: of the run's present pass over records that it has and that are owed again.
        """
        # As it is now: what was replaced since it was last read may be removed.
        self.ledger = Ledger(self.storage, self._clock)
        committed = self.ledger.committed_records()
        if not len(committed):
            return 0
        copier = Copier(self.storage, Ledger(run, self._clock), run_id, repro_template, pass_index)
        for units in owed():
            outcomes = [
                outcome if is_usable(outcome, retry_failed=retry_failed) else None
                for outcome in committed.outcomes_of(unit_keys(units))
            ]
            copier.add(units, outcomes)
        copier.flush()
        return copier.count

    def give(
        self, run: Storage, run_uri: str, run_id: str, probe_digest: str | None, listed: Listed | None = None
    ) -> Given:
        """Give what a run computed and the ledger lacks; a kill at any moment leaves it for the next call.

        Args:
            run: the run folder.
            run_uri: its address, as it is stored.
            run_id: the invocation.
            probe_digest: as `KnownSources` takes it; None gives no sources.
            listed: what the run listed, where that was everything that its inputs name.

        Raises:
            TransientError: another run writes to the ledger, and went on for minutes.
        """
        with _waited_for(Lease(self.storage, self._clock), self.uri) as lease:
            self.ledger = Ledger(self.storage, self._clock)
            given = Given()
            own = Ledger(run, self._clock)
            giver = Giver(self.ledger, own, run_id, run_uri)
            given.records = giver.records(lease)
            given.answers = giver.answers(lease)
            if probe_digest is not None:
                given.sources = giver.sources(lease, probe_digest)
                giver.archives(lease)
            if listed is not None:
                giver.listing(lease, listed)
            self.ledger.refresh()
            compact_if_needed(self.ledger, run_id, MOST_SMALL_GIFTS)
            self.ledger = Ledger(self.storage, self._clock)
            self.ledger.sweep(replaced_grace_seconds=GARBAGE_AGE_SECONDS)
        self.ledger = Ledger(self.storage, self._clock)
        return given


@contextlib.contextmanager
def held(storage: Storage, *, removes_at_once: bool = False) -> Iterator[Ledger]:
    """Yield a ledger whose lease is held; what counts for nothing afterwards is removed.

    Args:
        storage: where it lives.
        removes_at_once: True leaves nothing behind for runs that read it now: they compute once more what they miss.
    """
    with _waited_for(Lease(storage, utc_now), storage.uri):
        yield Ledger(storage)
        grace_seconds = 0.0 if removes_at_once else GARBAGE_AGE_SECONDS
        Ledger(storage).sweep(replaced_grace_seconds=grace_seconds)


def shared_ledger(spec: RunSpec) -> SharedLedger | None:
    """Return the ledger that a run shares, None where it shares none.

    Raises:
        ConfigError: it is the run folder itself, or nothing can be written there.
    """
    if spec.ledger is None:
        return None
    if not spec.ledger.strip():
        raise ConfigError("--ledger is empty: it names nothing")
    shared = SharedLedger(spec.ledger)
    if shared.storage.is_same_place(Storage(spec.output)):
        raise ConfigError("--ledger is the run folder itself: a run has a ledger of its own there already")
    shared.storage.probe_writable()
    return shared


class _waited_for:  # noqa: N801
    """Holds a lease, waiting for whoever has it."""

    def __init__(self, lease: Lease, uri: str) -> None:
        self._lease = lease
        self._uri = uri

    def __enter__(self) -> Lease:
        deadline = time.monotonic() + LEASE_WAIT_SECONDS
        while True:
            try:
                return self._lease.__enter__()
            except ConfigError as error:
                if time.monotonic() > deadline:
                    raise TransientError(f"the ledger {self._uri} stays taken: {error}") from error
            time.sleep(LEASE_LOOK_SECONDS)

    def __exit__(self, *about: Any) -> None:
        self._lease.__exit__(*about)
