"""The chaos harness: `python -m tests.chaos --schedules 20`. Ends with 0 when every run came out as it should."""

import argparse
import json
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from jobs.bench.machine import machine_facts
from tests.chaos.harness import Outcome, Stage, run_schedule, say_where_root_is_needed
from tests.chaos.schedules import KINDS, draw


def main() -> int:
    """Run the schedules that were asked for, and return the exit status."""
    wanted = arguments()
    say_where_root_is_needed()
    kinds = wanted.only.split(",") if wanted.only else KINDS
    seeds = (
        [wanted.replay] if wanted.replay is not None else range(wanted.first_seed, wanted.first_seed + wanted.schedules)
    )
    # What is under way is taken down, whoever ends the harness.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began = time.monotonic()
    outcomes = []
    with Stage() as stage:
        for seed in seeds:
            outcome = run_schedule(stage, draw(seed, kinds))
            outcomes.append(outcome)
            tell(outcome)
            summary = summarise(outcomes) | {"seconds": round(time.monotonic() - began), "only": wanted.only}
            # Each time: whoever ends a night of schedules early keeps what was seen until then.
            if wanted.out:
                Path(wanted.out).write_text(json.dumps(summary, indent=1) + "\n")
    say(table(summary))
    say(json.dumps(summary))
    return 0 if summary["sound"] else 1


def say(line: str) -> None:
    """Write a line at once: somebody is waiting for it."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--schedules", type=int, default=20, help="how many, one seed after the other")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", default="", help=f"main faults, with commas between: {', '.join(KINDS)}")
    parser.add_argument("--replay", type=int, default=None, metavar="SEED", help="one schedule again")
    parser.add_argument("--out", default="", metavar="FILE", help="also write the result here, as JSON")
    wanted = parser.parse_args()
    unknown = set(filter(None, wanted.only.split(","))) - set(KINDS)
    if wanted.schedules < 1:
        parser.error("at least one schedule")
    if unknown:
        parser.error(f"unknown kinds {sorted(unknown)}")
    return wanted


def tell(outcome: Outcome) -> None:
    """Print one line, and what is wrong below it."""
    found = outcome.comparison
    word = f"skipped: {outcome.skipped}" if outcome.skipped else "ok" if outcome.sound else "WRONG"
    statuses = " ".join("hung" if status is None else str(status) for status in outcome.statuses)
    missed = f", missed {dict(outcome.missed)}" if outcome.missed else ""
    schedule = outcome.schedule
    say(f"seed {schedule.seed}: {word}, {outcome.seconds:.0f} s, statuses {statuses}{missed}; {schedule}")
    if outcome.sound:
        return
    say(f"  lost {found.lost}, doubled {found.doubled}, different {found.different}, hung {outcome.hung}")
    for line in (*outcome.unexpected, *found.examples, f"kept: {outcome.kept}"):
        say(f"  {line}")


def summarise(outcomes: list[Outcome]) -> dict[str, object]:
    """Return the counts over all schedules."""
    injected: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    for outcome in outcomes:
        injected += outcome.injected
        missed += outcome.missed
    run = [outcome for outcome in outcomes if not outcome.skipped]
    return {
        "bench": "chaos",
        "seeds": [outcomes[0].schedule.seed, outcomes[-1].schedule.seed],
        "machine": machine_facts(),
        "schedules": len(run),
        "skipped": len(outcomes) - len(run),
        "faults_injected": dict(sorted(injected.items())),
        "faults_missed": dict(sorted(missed.items())),
        "rows_expected": sum(outcome.comparison.expected for outcome in run),
        "lost": sum(outcome.comparison.lost for outcome in run),
        "doubled": sum(outcome.comparison.doubled for outcome in run),
        "different": sum(outcome.comparison.different for outcome in run),
        "hung": sum(outcome.hung for outcome in run),
        "unexpected": sum(len(outcome.unexpected) for outcome in run),
        "services_left_by_ray": sum(outcome.left_by_ray for outcome in run),
        "drivers_ended_by_ray": sum(outcome.ended_by_ray for outcome in run),
        "calls": sum(len(outcome.statuses) for outcome in run),
        "wrong_seeds": [outcome.schedule.seed for outcome in run if not outcome.sound],
        "sound": bool(run) and all(outcome.sound for outcome in run),
    }


def table(summary: dict[str, object]) -> str:
    """Return the counts as lines for people."""
    lines = []
    for name, value in summary.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        lines.append(f"{name.replace('_', ' '):16} {text}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
