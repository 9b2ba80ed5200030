"""`python -m tests.fuzz --files 2000 --seed 1`: damaged files through whole runs, and one line of what became of them.

Hostile files that came to an error of ours are kept in the folder.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

FOLDERS = ("tests/pipeline", "tests/operators")


def main() -> int:
    """Run, print, and return 1 when a file met an exception that nobody foresaw."""
    sys.path[:0] = FOLDERS
    from tests.fuzz.campaign import run_campaign

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="kept afterwards; a temporary one by default")
    parser.add_argument("--save", type=Path, help="also write the counts to this file, as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pagereel-fuzz-") as temporary:
        campaign = run_campaign(given.folder or Path(temporary), given.files, given.seed)
    if given.save:
        from jobs.bench.machine import machine_facts

        facts = {"bench": "fuzz", "seed": given.seed} | campaign.counts() | {"machine": machine_facts()}
        given.save.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{campaign.line()}; exceptions that nobody foresaw: {campaign.surprises or 'none'}\n")
    return 1 if campaign.surprises else 0


if __name__ == "__main__":
    sys.exit(main())
