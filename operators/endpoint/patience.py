"""When to try again, and when to stop waiting for a server."""

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

FIRST_DELAY_SECONDS: Final = 0.5
LONGEST_DELAY_SECONDS: Final = 30.0


def delay_seconds(failures: int, draw: float, retry_after_seconds: float | None, patience_seconds: float) -> float:
    """Return how long to wait before the next attempt.

    Args:
        failures: attempts that failed so far, from 1.
        draw: random, 0 to 1: requests that failed together do not come back together.
        retry_after_seconds: what the server asks for, honoured up to the patience.
        patience_seconds: of the run with a server that gives no answers.
    """
    backoff = min(FIRST_DELAY_SECONDS * 2.0 ** min(failures - 1, 16), LONGEST_DELAY_SECONDS)
    asked = min(max(retry_after_seconds or 0.0, 0.0), patience_seconds)
    return asked + backoff * (0.5 + draw / 2)


def retry_after_seconds(header: str | None, now: datetime) -> float | None:
    """Return what a `Retry-After` header asks for, seconds or a date; None where it says nothing that can be read."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            until = parsedate_to_datetime(header)
        except ValueError:
            return None
        if until.tzinfo is None:
            until = until.replace(tzinfo=UTC)
        seconds = (until - now).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None


class Silence:
    """How long a server has answered nobody.

    Args:
        patience_seconds: after so long it counts as gone.
    """

    def __init__(self, patience_seconds: float) -> None:
        self._patience_seconds = patience_seconds
        self._since: float | None = None

    def ends(self) -> None:
        """Note that the server gave an answer."""
        self._since = None

    def lasts(self, now: float) -> None:
        """Note that an attempt failed, at a time in seconds of any clock."""
        if self._since is None:
            self._since = now

    def is_too_long(self, now: float, under_way: Iterable[float]) -> bool:
        """Return whether the server counts as gone.

        Args:
            now: of the same clock.
            under_way: when each request that waits for its answer was sent. One that was sent before the silence may
                still be answered: a server that is busy with long answers turns others away.
        """
        if self._since is None or now - self._since < self._patience_seconds:
            return False
        return all(sent >= self._since for sent in under_way)
