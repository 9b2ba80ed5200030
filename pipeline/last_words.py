"""Files in which a process leaves word of what ends it, for the one that takes its place on the same machine."""

import faulthandler
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TextIO

from pydantic import ValidationError

from pipeline.shared import Shared
from pipeline.strikes import LastWords, Standing, Touch
from pipeline.witness import Witness
from schemas.ids import digest

FAULTS: Final = {
    "Segmentation fault": signal.SIGSEGV,
    "Aborted": signal.SIGABRT,
    "Bus error": signal.SIGBUS,
    "Floating-point exception": signal.SIGFPE,
    "Floating point exception": signal.SIGFPE,
    "Illegal instruction": signal.SIGILL,
}
"""How the fault handler of Python names the signals that it reports."""

FATAL: Final = "Fatal Python error: "
LONGEST: Final = 4000


class WordFile:
    """Where one worker leaves its last words.

    What ends it by a fault in native code is written by Python's fault handler; SIGKILL leaves nothing.

    Args:
        worker: name of the worker, the same over its incarnations.
        folder: where the file lies; None: beside the log that standard error goes to, which goes with the session.
    """

    def __init__(self, worker: str, folder: Path | None = None) -> None:
        self._path = (folder or log_folder()) / f"pagereel-{worker}.words"

    def of_predecessor(self) -> LastWords | None:
        """Return what the last incarnation left here; None where it ended in silence, or elsewhere."""
        return read_words(_text_of(self._path))

    def open(self) -> None:
        """Begin a new file, into which faults of this process are written from now on."""
        try:
            self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the process lives
        except OSError:
            return
        faulthandler.enable(self._file, all_threads=False)

    def say(self, message: str) -> None:
        """Leave word before this process ends by itself."""
        try:
            self._path.write_text(message, encoding="utf-8")
        except OSError:
            return


class LoneWitness(Witness):
    """The witness of a plain loop, whose only worker is the driver.

    Nobody is left to see its end, so what it has in hand stands in a file, after which the fault handler would write.
    Only such faults count: a loop that is ended from outside, for lack of memory or with its machine leaves a file that
    reports none. Where somebody else has the fault handler, nothing is counted.

    Args:
        strikes: a `pipeline.strikes.Strikes`.
        run_uri: tells the files of runs apart.
        folder: where the file lies; None: that of temporary files.
    """

    def __init__(self, strikes: Shared, run_uri: str, folder: Path | None = None) -> None:
        super().__init__(strikes, "driver", f"{os.getpid()}", "")
        self._path = (folder or Path(tempfile.gettempdir())) / f"pagereel-{os.getuid()}-{digest(run_uri)[:16]}.words"
        self._held: list[Touch] = []
        self._file: TextIO | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Count the fault that ended the loop before this one, and listen for the next until the block ends."""
        if faulthandler.is_enabled():
            yield
            return
        first, _, report = _text_of(self._path).partition("\n")
        words = read_words(report)
        try:
            touch = Touch.model_validate_json(first) if words else None
        except ValidationError:
            touch = None
        if touch is not None:
            self._strikes.call("arrive", self.worker, "before", "", [""], None)
            self._strikes.call("built", self.worker, "before")
            self._strikes.call("touch", self.worker, "before", 0, touch, False)
        self.arrive([""], words)
        self.built()
        with open(self._path, "w", encoding="utf-8") as self._file:
            faulthandler.enable(self._file, all_threads=False)
            try:
                yield
            finally:
                faulthandler.disable()
                self._file = None
                self._path.unlink(missing_ok=True)

    @contextmanager
    def touching(self, touch: Touch, *, only_clean: bool = False) -> Iterator[Standing]:
        """Hold records; what is at work is what was taken up last, since one part of the loop waits for another."""
        with super().touching(touch, only_clean=only_clean) as standing:
            self._held.append(touch)
            self._write()
            try:
                yield standing
            finally:
                self._held.remove(touch)
                self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)
        self._file.truncate()
        if self._held:
            self._file.write(self._held[-1].model_dump_json() + "\n")
        self._file.flush()


def read_words(text: str) -> LastWords | None:
    """Return what a process said as it ended; None where it said nothing."""
    said = text.strip()
    return LastWords(exit_signal=signal_of(said), message=said[:LONGEST]) if said else None


def signal_of(text: str) -> int | None:
    """Return the signal that a report of the fault handler names; None where it is none."""
    if not text.startswith(FATAL):
        return None
    name = text.splitlines()[0].removeprefix(FATAL)
    return int(FAULTS[name]) if name in FAULTS else None


def log_folder() -> Path:
    """Return the folder of the file that standard error goes to, or that of temporary files."""
    try:
        path = Path(os.readlink("/proc/self/fd/2"))
    except OSError:
        return Path(tempfile.gettempdir())
    return path.parent if path.is_absolute() and path.is_file() else Path(tempfile.gettempdir())


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
