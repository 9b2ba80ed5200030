"""What a run tells whoever watches it, and what it says at its end."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        phase: `list`, `plan`, `start`, `run`, `publish` or `done`.
        planned: records planned, pages and segments.
        resumed: of these, committed before this call.
        ledger_hits: of the others, taken over from a shared ledger.
        known_answers: records of this call whose answer was given before to what they show.
        statuses: records committed by this call, by status.
        errors: error events by category.
        pages, segments: records committed by this call, by kind.
        frames: sampled from those segments.
        prompt_tokens, image_tokens, output_tokens: of the model, this call.
        tokens_saved: that answers in a loop would have gone on to write.
        tokens_wasted: written by attempts that did not answer, before another or before a second look.
        seconds: since this call started.
        run_seconds: since the first unit was handed to a worker.
        steps: counts of each step, as `Meter.snapshot` gives them.
        sources: sources listed.
        failed_sources: sources that could not be opened.
    """

    phase: str = "list"
    planned: int = 0
    resumed: int = 0
    ledger_hits: int = 0
    known_answers: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    pages: int = 0
    segments: int = 0
    frames: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    output_tokens: int = 0
    tokens_saved: int = 0
    tokens_wasted: int = 0
    seconds: float = 0.0
    run_seconds: float = 0.0
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: int = 0
    failed_sources: int = 0

    @property
    def done(self) -> int:
        """Records committed by this call."""
        return sum(self.statuses.values())

    @property
    def owed(self) -> int:
        """Records not committed yet."""
        return max(0, self.planned - self.resumed - self.ledger_hits - self.done)

    def per_second(self) -> float:
        """Records a second of this call's flow."""
        return self.done / self.run_seconds if self.run_seconds > 0 else 0.0

    def eta_seconds(self) -> float | None:
        """Seconds left at the present rate, or None before there is one."""
        rate = self.per_second()
        return self.owed / rate if rate > 0 else None


class Observer(Protocol):
    """Whoever watches a run. Called from the driver's thread, a few times a second at most."""

    def note(self, message: str) -> None:
        """Take one line that a person running a job should see."""

    def progress(self, progress: Progress) -> None:
        """Take the present state."""


class Silent:
    """An observer that watches nothing: the default of the Python call."""

    def note(self, message: str) -> None:
        """Drop the line."""

    def progress(self, progress: Progress) -> None:
        """Drop the state."""
