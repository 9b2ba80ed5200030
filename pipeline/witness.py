"""What a worker tells the strikes of its run, and who may be inside an operator at the same time."""

import itertools
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from pipeline.shared import Shared
from pipeline.strikes import LastWords, Standing, Touch, Verdict
from schemas.errors import TransientError, WorkerLostError, WorkersBrokenError, one_line

logger = logging.getLogger(__name__)

SHARED_TRIES: Final = 3
SHARED_PAUSE_SECONDS: Final = 2.0


class Doors:
    """Lets many in at once, or one alone; who came first goes first. A thread may leave for another."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._is_alone = False
        self._tickets = itertools.count()
        self._next = 0

    @contextmanager
    def open(self, *, alone: bool) -> Iterator[None]:
        """Wait for one's turn, and be inside."""
        with self._changed:
            ticket = next(self._tickets)
            while ticket != self._next or self._is_alone or (alone and self._inside):
                self._changed.wait()
            self._next += 1
            self._inside += 1
            self._is_alone = alone
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._is_alone = False
                self._changed.notify_all()


class Witness:
    """Tells the strikes of the run what one incarnation of a worker does.

    A touch of which the strikes do not hear costs only that a death there is not counted: where they cannot be reached,
    the work goes on.

    Args:
        strikes: a `pipeline.strikes.Strikes`.
        worker: name of the worker, the same over its incarnations.
        incarnation: this one.
        node: where it is.
        name: what it does, for people.
    """

    def __init__(self, strikes: Shared, worker: str, incarnation: str, node: str, name: str = "?") -> None:
        self.worker = worker
        self.node = node
        self._name = name
        self._strikes = strikes
        self._incarnation = incarnation
        self._numbers = itertools.count()

    def arrive(self, living_nodes: Sequence[str], last_words: LastWords | None) -> None:
        """Say that this incarnation starts.

        Raises:
            WorkersBrokenError: it should not be built.
        """
        reason = self._call("arrive", self.worker, self._incarnation, self.node, living_nodes, last_words, self._name)
        if reason:
            raise WorkersBrokenError(reason)

    def built(self) -> None:
        """Say that it is ready."""
        self._call("built", self.worker, self._incarnation)

    def standing(self, keys: Sequence[str]) -> Standing:
        """Return what is held against `keys`, and against this worker.

        Raises:
            WorkersBrokenError: nobody should go on.
        """
        return self._checked(self._call("standing", self.worker, keys))

    def verdicts(self, keys: Sequence[str]) -> dict[str, Verdict]:
        """Return why each of the condemned among `keys` is not run again."""
        return self._call("verdicts", self.worker, keys) or {}

    @contextmanager
    def touching(self, touch: Touch, *, only_clean: bool = False) -> Iterator[Standing]:
        """Hold records: they are cleared when the block ends, and suspected when it never does.

        Args:
            touch: the records.
            only_clean: True where they are held only when none of them has a strike.

        Raises:
            WorkersBrokenError: nobody should go on.
        """
        number = next(self._numbers)
        standing = self._checked(self._call("touch", self.worker, self._incarnation, number, touch, only_clean))
        if only_clean and standing.strikes:
            yield standing
            return
        try:
            yield standing
        except WorkerLostError:
            # This process ends, with these records in its hands.
            raise
        except BaseException:
            self._call("withdraw", self.worker, self._incarnation, number)
            raise
        self._call("survived", self.worker, self._incarnation, number, touch)

    def _checked(self, standing: Standing | None) -> Standing:
        if standing is None:
            return Standing({})
        if standing.broken:
            raise WorkersBrokenError(standing.broken)
        return standing

    def _call(self, method: str, *arguments: Any) -> Any:
        for left in reversed(range(SHARED_TRIES)):
            try:
                return self._strikes.call(method, *arguments)
            except TransientError as error:
                logger.warning("the strikes of the run cannot be reached (%s): %s", method, one_line(error))
                if left:
                    time.sleep(SHARED_PAUSE_SECONDS)
        return None
