"""Many damaged files beside good ones, in runs of a few hundred, and the count of what became of them."""

import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import mutated
from tests.fuzz.runs import assert_same, deaths_of, outcome_of, read_all
from tests.fuzz.seeds import corpus_folder, found_seeds, make_seeds

FILES_A_RUN = 250
OPTIONS = ({"text_layer": "auto"}, {"text_layer": "ignore"}, {"task": "parse"}, {"task": "caption"})
"""Runs take turns: pages by their text layers, all pages rendered, layout blocks, captions."""


@dataclass
class Campaign:
    """What became of damaged files.

    Attributes:
        outcomes: files, by outcome.
        deaths: decoders that died, by signal.
        seconds: of the runs over damaged files.
        surprises: files with an error of the code `internal`: an exception that nobody foresaw.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    surprises: list[Path] = field(default_factory=list)

    def counts(self) -> dict[str, Any]:
        """Return everything as JSON takes it."""
        return {
            "files": self.outcomes.total(),
            "outcomes": dict(self.outcomes.most_common()),
            "decoders_that_died": dict(self.deaths),
            "surprises": len(self.surprises),
            "seconds": round(self.seconds),
        }

    def line(self) -> str:
        """Return one line for people."""
        found = ", ".join(f"{name} {count}" for name, count in self.outcomes.most_common())
        died = ", ".join(f"signal {name}: {count}" for name, count in self.deaths.most_common()) or "none"
        return f"{self.outcomes.total()} files: {found}; decoders that died: {died}; {self.seconds:.0f} s"


def hostile_files(folder: Path, seeds: list[Path], count: int, chance: random.Random) -> list[Path]:
    """Write `count` damaged files, made from `seeds` in turns, and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    # Files of equal bytes share their rows, which belong to the first of them.
    known = {seed.read_bytes() for seed in seeds}
    for number in range(count):
        seed, damaged = seeds[number % len(seeds)], b""
        while not damaged or damaged in known:
            damaged = mutated(chance, seed.read_bytes(), seed.suffix, chance.choice(seeds).read_bytes())
        known.add(damaged)
        files.append(folder / f"{number:05d}-{seed.stem}{seed.suffix}")
        files[-1].write_bytes(damaged)
    return files


def run_campaign(folder: Path, count: int, seed: int, files_a_run: int = FILES_A_RUN) -> Campaign:
    """Read `count` damaged files beside good ones and return what became of them.

    Raises:
        AssertionError: a file has no outcome or several, or a good file came out otherwise than without the others.
    """
    chance = random.Random(seed)
    good = make_seeds(folder / "good")
    seeds = [*good, *found_seeds(corpus_folder())]
    campaign = Campaign()
    alone: dict[int, Any] = {}
    for number, first in enumerate(range(0, count, files_a_run)):
        options = OPTIONS[number % len(OPTIONS)]
        place = number % len(OPTIONS)
        if place not in alone:
            alone[place] = read_all(good, folder / f"alone-{place}", **options)
        files = hostile_files(folder / f"hostile-{number}", seeds, min(files_a_run, count - first), chance)
        both = [*files, *good]
        chance.shuffle(both)
        start = time.monotonic()
        result = read_all(both, folder / f"run-{number}", **options)
        campaign.seconds += time.monotonic() - start
        assert_same(result, alone[place], good)
        campaign.outcomes.update(outcome_of(result, path) for path in files)
        campaign.deaths.update(deaths_of(result))
        errors = [row for path in files for row in result.of("errors", path)]
        campaign.surprises += [Path(row["source_uri"]) for row in errors if row["error_code"] == "internal"]
    return campaign
