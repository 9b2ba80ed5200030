"""A thread that shows a run's state while the driver waits for rows."""

import logging
import threading
import time
from types import TracebackType

from pipeline.executor import Executor
from pipeline.progress import Observer, Progress

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 0.5


class Watch:
    """Shows `progress` twice a second, with the step counts of `executor`; use it as a context manager."""

    def __init__(self, progress: Progress, executor: Executor, observer: Observer) -> None:
        self._progress = progress
        self._executor = executor
        self._observer = observer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show_until_stopped, name="watch", daemon=True)
        self._began = time.perf_counter()
        self._run_began: float | None = None

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        if kind is None:
            self._show()

    def _show_until_stopped(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            if self._progress.phase == "run":
                self._read_steps()
            self._show()

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
