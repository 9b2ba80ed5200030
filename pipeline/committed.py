"""Which records are committed, and which of them a later pass answers again."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from pipeline.key_index import Entry, KeyIndex
from schemas.errors import ContractError
from schemas.vocabulary import QUIET_STATUSES, STATUSES

RETRYABLE_BIT = 1 << 8
SECOND_LOOK_BIT = 1 << 9
_STATUS_BITS = RETRYABLE_BIT - 1


class Outcome(NamedTuple):
    """What became of a committed record.

    Attributes:
        retryable: its failure may pass by itself.
        committed_at: when its commit was made, as text that sorts.
        part_id: the part that holds its row.
    """

    status: str
    retryable: bool
    committed_at: str
    part_id: str

    @property
    def failed(self) -> bool:
        """Whether a row in `errors` explains it."""
        return self.status not in QUIET_STATUSES


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

    def outcomes_of(self, record_keys: Sequence[str]) -> "list[Outcome | None]":
        """Return what became of each key, None where it is owed."""
        commits, states = self._index.lookup(record_keys)
        done = (commits >= 0) & (states & SECOND_LOOK_BIT == 0)
        return [
            Outcome(STATUSES[state & _STATUS_BITS], bool(state & RETRYABLE_BIT), *self._ranks[commit][1:])
            if is_done
            else None
            for commit, state, is_done in zip(commits.tolist(), states.tolist(), done.tolist(), strict=True)
        ]

    def held_by(self, part_id: str, record_keys: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return for each key whether its row that counts lies in a part, for a first look as well."""
        commits, _ = self._index.lookup(record_keys)
        held = [commit >= 0 and self._ranks[commit][2] == part_id for commit in commits.tolist()]
        return np.array(held, dtype=bool)

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


def state_of(status: str, *, retryable: bool = False, second_look: bool = False) -> int:
    """Return a status and what else counts of a record as one small number.

    Raises:
        ContractError: the status is outside the vocabulary.
    """
    if status not in STATUSES:
        raise ContractError(f"status {status!r} is not in the closed vocabulary {list(STATUSES)}")
    return STATUSES.index(status) | RETRYABLE_BIT * retryable | SECOND_LOOK_BIT * second_look
