"""How a run looks: live on a terminal, calm lines in a pipe, JSON lines for machines."""

import json
import sys
import time
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobs.terminal import visible
from pipeline.progress import Progress

PLAIN_INTERVAL_SECONDS = 10.0
SILENCE_SECONDS = 60.0
"""Without news a line still comes this often: a sign of life in a log."""
JSON_INTERVAL_SECONDS = 2.0

PHASE_WORDS = {
    "list": "listing", "start": "starting workers", "plan": "planning", "publish": "writing the tables",
}  # fmt: skip


def duration(seconds: float | None) -> str:
    """Return seconds as a person writes them: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return "?"
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def counts_line(progress: Progress) -> str:
    """Return one line that says how far a run is."""
    parts = [f"{progress.resumed + progress.ledger_hits + progress.done}/{progress.planned} done"]
    if progress.resumed:
        parts.append(f"{progress.resumed} of them before")
    if progress.ledger_hits:
        parts.append(f"{progress.ledger_hits} from the ledger")
    parts.append(f"{progress.per_second():.2f}/s")
    if progress.output_tokens and progress.run_seconds:
        parts.append(f"{progress.output_tokens / progress.run_seconds:.0f} tokens/s")
    if progress.owed:
        parts.append(f"{duration(progress.eta_seconds())} left")
    if progress.errors:
        parts.append("errors: " + ", ".join(f"{name} {count}" for name, count in progress.errors.most_common(4)))
    return ", ".join(parts)


def phase_line(progress: Progress) -> str:
    """Return one line on a phase before or after the flow."""
    parts = [PHASE_WORDS.get(progress.phase, progress.phase), f"{progress.sources} sources"]
    if progress.planned:
        parts.append(f"{progress.planned} pages and segments")
    return f"{', '.join(parts)}, {duration(progress.seconds)} so far"


class JsonDisplay:
    """One JSON object a line on standard output."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._last = 0.0
        self._phase = ""

    def emit(self, event: str, **values: object) -> None:
        """Write one event."""
        self._stream.write(json.dumps({"event": event, **values}, ensure_ascii=False, default=str) + "\n")
        self._stream.flush()

    def note(self, message: str) -> None:
        """Write a note."""
        self.emit("note", message=message)

    def progress(self, progress: Progress) -> None:
        """Write the state, every other second at most, and at each new phase."""
        now = time.monotonic()
        if progress.phase == self._phase and now - self._last < JSON_INTERVAL_SECONDS:
            return
        self._phase, self._last = progress.phase, now
        self.emit("progress", **vars(progress), done=progress.done, per_second=round(progress.per_second(), 4))


class PlainDisplay:
    """A line every ten seconds, for pipes and CI logs; errors and notes as they come."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._last = time.monotonic()
        self._last_done = 0

    def note(self, message: str) -> None:
        """Write a note."""
        if not self._quiet:
            self._stream.write(f"pagereel: {visible(message)}\n")
            self._stream.flush()

    def progress(self, progress: Progress) -> None:
        """Write how far the run is."""
        now = time.monotonic()
        wait = PLAIN_INTERVAL_SECONDS if progress.done != self._last_done else SILENCE_SECONDS
        if self._quiet or now - self._last < wait:
            return
        self._last, self._last_done = now, progress.done
        self.note(counts_line(progress) if progress.phase == "run" else phase_line(progress))


class LiveDisplay:
    """A table of the steps and a progress bar that repaint in place."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, force_terminal=True)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._live.start()

    def note(self, message: str) -> None:
        """Print a note above the live part."""
        self._live.console.print(f"pagereel: {visible(message)}", highlight=False, markup=False)

    def progress(self, progress: Progress) -> None:
        """Repaint."""
        if progress.phase == "done":
            self.close()
            return
        done = progress.resumed + progress.ledger_hits + progress.done
        bar = ProgressBar(total=max(1, progress.planned), completed=done, width=40, pulse=progress.phase != "run")
        head = Table.grid(padding=(0, 2))
        head.add_row(Text(progress.phase, style="bold"), bar, Text(duration(progress.seconds)))
        self._live.update(Group(head, Text(counts_line(progress)), self._steps(progress)))

    def _steps(self, progress: Progress) -> Table:
        table = Table(box=None, header_style="dim", padding=(0, 2))
        for column in ("step", "rows in", "rows out", "busy", "rows/s busy"):
            table.add_column(column, justify="left" if column == "step" else "right")
        for name, count in progress.steps.items():
            rate = count["rows_out"] / count["seconds"] if count["seconds"] else 0.0
            table.add_row(
                name, str(count["rows_in"]), str(count["rows_out"]), duration(count["seconds"]), f"{rate:.1f}"
            )
        return table

    def close(self) -> None:
        """Take the live part off the terminal."""
        self._live.stop()
