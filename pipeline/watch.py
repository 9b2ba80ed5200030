"""A thread that shows a run's state while the driver waits for rows, and ends a run that hangs."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType

from pipeline.executor import Executor
from pipeline.progress import Observer, Progress
from pipeline.watchdog import PLACING_SECONDS, UNREACHABLE_SECONDS, GoneError, Stillness
from schemas.errors import TransientError, one_line

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 0.5
SIGNS_SECONDS = 5.0
WATCHED_PHASES = ("plan", "run")

GRACE_SECONDS = 120.0
"""Time for the driver to come back from a call once it was told to; a cluster that is gone may hold it there."""

GONE_GRACE_SECONDS = 3.0
"""The same where Ray is about to end this process itself, with another status."""

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
EXIT_INCOMPLETE = 3


class Watch:
    """Shows `progress` twice a second, with the step counts of `executor`; use it as a context manager.

    It ends a run whose workers have given no sign of life for as long as the flow allows, and one whose cluster does
    not answer any more: the driver is interrupted as by Ctrl-C, and where it does not come back from whatever holds it,
    the process ends with status 3. Use it from the thread that runs.

    Args:
        progress: what is shown.
        executor: whose workers are watched.
        observer: whom it is shown to.
        leave: ends the process.
        grace_seconds: time for the driver to come back.

    Raises:
        TransientError: on leaving, where the run was ended here.
    """

    def __init__(
        self,
        progress: Progress,
        executor: Executor,
        observer: Observer,
        leave: Callable[[int], object] = os._exit,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self._progress = progress
        self._executor = executor
        self._observer = observer
        self._leave = leave
        self._grace_seconds = grace_seconds
        self._stop = threading.Event()
        self._driver = threading.current_thread()
        self._thread = threading.Thread(target=self._show_until_stopped, name="watch", daemon=True)
        self._began = time.perf_counter()
        self._moved = Stillness(time.monotonic())
        self._answered_at: float | None = None
        self._looked_at = 0.0
        self._told_unplaced = False
        self.stuck: str | None = None

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._stop.set()
            self._thread.join(timeout=10)
        except KeyboardInterrupt:
            if not self.stuck:
                raise
            # It was found to hang at the very moment that it came to its end.
        if kind is None:
            self._show()
        elif self.stuck and not isinstance(value, Exception):
            raise TransientError(self.stuck) from value

    def _show_until_stopped(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            if self._progress.phase == "run":
                self._read_steps()
            self._show()
            if self.stuck is None and time.monotonic() - self._looked_at > SIGNS_SECONDS:
                self._look()

    def _look(self) -> None:
        """End the run where it hangs."""
        self._looked_at = now = time.monotonic()
        if self._progress.phase not in WATCHED_PHASES:
            self._moved.seconds((self._progress.phase,), now)
            self._answered_at, self._told_unplaced = None, False
            return
        try:
            signs = self._executor.signs()
            still = self._moved.seconds((self._progress.phase, self._progress.done, self._rows(), signs), now)
            if still > PLACING_SECONDS and not self._told_unplaced:
                self._tell_unplaced()
            self._answered_at = now
            if still > self._executor.patience_seconds:
                self._end(f"nothing has moved for {still:.0f} s: {self._waits_for()}", self._grace_seconds)
        except GoneError as error:
            self._end(one_line(error), min(self._grace_seconds, GONE_GRACE_SECONDS))
        # Whatever a cluster that is cut off raises: it is silence.
        except Exception as error:  # noqa: BLE001
            logger.debug("no sign of life this time: %r", error)
            since = self._answered_at or self._began_at(now)
            if now - since > UNREACHABLE_SECONDS:
                told = f"the cluster has not answered for {now - since:.0f} s: {one_line(error)}"
                self._end(told, self._grace_seconds)

    def _began_at(self, now: float) -> float:
        self._answered_at = now
        return now

    def _rows(self) -> tuple[int, ...]:
        return tuple(count["rows_out"] for count in self._progress.steps.values())

    def _waits_for(self) -> str:
        try:
            return self._executor.waits_for()
        # It hangs, whether or not anybody can say on what.
        except Exception as error:  # noqa: BLE001
            return f"on what is not known ({one_line(error)})"

    def _tell_unplaced(self) -> None:
        missing = self._executor.unplaced()
        if missing:
            self._told_unplaced = True
            self._observer.note(f"still waiting: {missing}")

    def _end(self, message: str, grace_seconds: float) -> None:
        """Interrupt the driver; where it does not come back, end the process."""
        self.stuck = message
        logger.error("%s", self.stuck)
        # A shell lets what it starts in the background ignore Ctrl-C.
        heard = [number for number in INTERRUPTS if callable(signal.getsignal(number))]
        if self._driver is threading.main_thread() and heard:
            signal.pthread_kill(self._driver.ident or 0, heard[0])
        if not self._stop.wait(grace_seconds):
            self._observer.note(self.stuck)
            os.write(2, f"pagereel: {self.stuck}\n".encode("utf-8", "backslashreplace"))
            self._leave(EXIT_INCOMPLETE)

    def _read_steps(self) -> None:
        # A display that cannot read its numbers shows the old ones; it must never end a run.
        try:
            self._progress.steps = self._executor.steps()
        except Exception as error:  # noqa: BLE001
            logger.debug("no step counts this time: %r", error)

    def _show(self) -> None:
        self._progress.seconds = time.perf_counter() - self._began
        try:
            self._observer.progress(self._progress)
        except Exception as error:  # noqa: BLE001
            logger.warning("the display failed: %r", error)
