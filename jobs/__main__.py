"""`python -m jobs`: the command line, and the benchmarks beside it."""

import sys

from jobs.cli import main


def _main() -> None:
    if sys.argv[1:2] == ["bench"]:
        from jobs.bench.__main__ import main as bench

        bench(sys.argv[2:])
        return
    main()


if __name__ == "__main__":
    _main()
