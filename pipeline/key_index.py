"""Millions of record keys in a few tens of megabytes."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FOLD_AT = 1 << 16
FOLD_SHARE = 16
KEY_BYTES = 16


class Entry(NamedTuple):
    """What is known of one record: the number of its commit, and its state (a small number of the caller's)."""

    commit: int
    state: int


def short_key(record_key: str) -> bytes:
    """Return 16 bytes that stand for `record_key`; among 10^8 keys two meet with a chance of about 10^-23."""
    return hashlib.blake2b(record_key.encode(), digest_size=KEY_BYTES).digest()


class KeyIndex:
    """A map from record key to `Entry`: 22 bytes a record, plus a small dict of the newest ones.

    What was added first stays, unless the caller's `rank` says that the newer commit wins.

    Args:
        ranks: `ranks[commit]` orders commits, the lower wins; the caller's own list, which may grow.
    """

    def __init__(self, ranks: Sequence[tuple[int, str, str]]) -> None:
        self._ranks = ranks
        self._recent: dict[bytes, Entry] = {}
        self._keys = np.empty(0, dtype=f"S{KEY_BYTES}")
        self._commits = np.empty(0, dtype=np.int32)
        self._states = np.empty(0, dtype=np.int16)

    def __len__(self) -> int:
        self._fold()
        return len(self._keys)

    def __contains__(self, record_key: object) -> bool:
        return isinstance(record_key, str) and self.get(record_key) is not None

    def get(self, record_key: str) -> Entry | None:
        """Return what is known of `record_key`."""
        return self._get(short_key(record_key))

    def add(self, record_key: str, commit: int, state: int) -> None:
        """Note that commit number `commit` holds `record_key`; the better ranked of two commits is kept."""
        key = short_key(record_key)
        known = self._recent.get(key)
        if known is None or self._ranks[commit] < self._ranks[known.commit]:
            self._recent[key] = Entry(commit, state)
        if len(self._recent) >= max(FOLD_AT, len(self._keys) // FOLD_SHARE):
            self._fold()

    def lookup(self, record_keys: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int16]]:
        """Return commit numbers and states of `record_keys`, -1 where one is not known."""
        self._fold()
        wanted = np.array([short_key(key) for key in record_keys], dtype=f"S{KEY_BYTES}")
        places = np.searchsorted(self._keys, wanted)
        places[places == len(self._keys)] = 0
        if not len(self._keys):
            absent = np.full(len(wanted), -1)
            return absent.astype(np.int32), absent.astype(np.int16)
        found = self._keys[places] == wanted
        return np.where(found, self._commits[places], -1), np.where(found, self._states[places], -1)

    def state_counts(self) -> dict[int, int]:
        """Return how many records are in each state."""
        self._fold()
        values, counts = np.unique(self._states, return_counts=True)
        return {int(value): int(count) for value, count in zip(values, counts, strict=True)}

    def _get(self, key: bytes) -> Entry | None:
        recent = self._recent.get(key)
        folded = self._folded(key)
        if recent is None or folded is None:
            return recent or folded
        return min(recent, folded, key=lambda entry: self._ranks[entry.commit])

    def _folded(self, key: bytes) -> Entry | None:
        wanted = np.array(key, dtype=self._keys.dtype)
        place = int(np.searchsorted(self._keys, wanted))
        if place < len(self._keys) and self._keys[place] == wanted:
            return Entry(int(self._commits[place]), int(self._states[place]))
        return None

    def _fold(self) -> None:
        """Move the newest entries into the sorted arrays."""
        if not self._recent:
            return
        newest = list(self._recent.values())
        keys = np.concatenate([self._keys, np.array(list(self._recent), dtype=self._keys.dtype)])
        commits = np.concatenate([self._commits, np.array([e.commit for e in newest], dtype=np.int32)])
        states = np.concatenate([self._states, np.array([e.state for e in newest], dtype=np.int16)])
        by_rank = sorted(range(len(self._ranks)), key=self._ranks.__getitem__)
        rank_of = np.empty(len(by_rank), dtype=np.int64)
        rank_of[by_rank] = np.arange(len(by_rank))
        order = np.lexsort((rank_of[commits], keys))
        first = np.ones(len(order), dtype=bool)
        first[1:] = keys[order][1:] != keys[order][:-1]
        chosen = order[first]
        self._keys, self._commits, self._states = keys[chosen], commits[chosen], states[chosen]
        self._recent.clear()


class KeySet:
    """A set of record keys: 16 bytes each, plus a small set of the newest ones."""

    def __init__(self) -> None:
        self._recent: set[bytes] = set()
        self._keys = np.empty(0, dtype=f"S{KEY_BYTES}")

    def __len__(self) -> int:
        return len(self._keys) + len(self._recent)

    def add_all(self, record_keys: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Add all keys; return for each whether it was new, its first place in `record_keys` counting."""
        short = [short_key(key) for key in record_keys]
        fresh = ~self._contains(short)
        for place in np.flatnonzero(fresh).tolist():
            fresh[place] = short[place] not in self._recent
            self._recent.add(short[place])
        if len(self._recent) >= max(FOLD_AT, len(self._keys) // FOLD_SHARE):
            self._keys = np.sort(np.concatenate([self._keys, np.array(list(self._recent), dtype=self._keys.dtype)]))
            self._recent.clear()
        return fresh

    def contains(self, record_keys: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return for each key whether it was added."""
        short = [short_key(key) for key in record_keys]
        recent: npt.NDArray[np.bool_] = np.array([key in self._recent for key in short], dtype=bool)
        return recent | self._contains(short)

    def _contains(self, short: list[bytes]) -> npt.NDArray[np.bool_]:
        if not len(self._keys):
            return np.zeros(len(short), dtype=bool)
        wanted = np.array(short, dtype=self._keys.dtype)
        places = np.searchsorted(self._keys, wanted)
        places[places == len(self._keys)] = 0
        found: npt.NDArray[np.bool_] = self._keys[places] == wanted
        return found


NEVER = bytes(KEY_BYTES)
"""A version that no source has."""


class SourceIndex:
    """A map from a source's 16-byte name to its index and 16-byte version: 40 bytes each; the last one put stays."""

    def __init__(self) -> None:
        self._recent: dict[bytes, tuple[int, bytes]] = {}
        self._names = np.empty(0, dtype=f"S{KEY_BYTES}")
        self._versions = np.empty(0, dtype=f"S{KEY_BYTES}")
        self._indexes = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        self._fold()
        return len(self._names)

    def put(self, name: bytes, index: int, version: bytes) -> None:
        """Note a source, in place of what was noted for its name."""
        self._recent[name] = (index, version)
        if len(self._recent) >= max(FOLD_AT, len(self._names) // FOLD_SHARE):
            self._fold()

    def get(self, name: bytes) -> tuple[int, bytes] | None:
        """Return index and version of a source."""
        if name in self._recent:
            return self._recent[name]
        wanted = np.array(name, dtype=self._names.dtype)
        place = int(np.searchsorted(self._names, wanted))
        if place == len(self._names) or self._names[place] != wanted:
            return None
        # numpy drops zero bytes at the end of a byte string.
        return int(self._indexes[place]), bytes(self._versions[place]).ljust(KEY_BYTES, b"\0")

    def _fold(self) -> None:
        if not self._recent:
            return
        newest = list(self._recent.values())
        names = np.concatenate([np.array(list(self._recent), dtype=self._names.dtype), self._names])
        versions = np.concatenate([np.array([v for _, v in newest], dtype=self._versions.dtype), self._versions])
        indexes = np.concatenate([np.array([i for i, _ in newest], dtype=np.int64), self._indexes])
        self._names, chosen = np.unique(names, return_index=True)
        self._versions, self._indexes = versions[chosen], indexes[chosen]
        self._recent.clear()
