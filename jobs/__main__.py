"""`python -m jobs`, which is also `pagereel`: the command line, and the benchmarks beside it."""

import sys
from typing import Final

from jobs.watched import go_on_in_child

RUNS: Final = ("ocr", "parse", "caption", "run")
"""Commands that start Ray."""


def main() -> None:
    """Run the command line, or a benchmark."""
    asked = sys.argv[1:]
    if asked[:1] == ["bench"]:
        from jobs.bench.__main__ import main as bench

        bench(asked[1:])
        return
    if asked[:1] and asked[0] in RUNS and "--help" not in asked:
        go_on_in_child()
    from jobs.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
