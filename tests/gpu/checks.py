"""Checks as plain functions, run where pytest is not installed."""

import sys
import traceback
from pathlib import Path

from operators.minicpmv.tiny import write_tiny_model


def write_members(folder, names):
    """Return a folder with the tiny model of each member, by name."""
    made = {}
    for name in names:
        made[name] = Path(folder) / name
        made[name].mkdir()
        write_tiny_model(made[name], name)
    return made


def run_each(checks):
    """Run every (title, function, arguments), print a line for each, and return how many failed."""
    failed = 0
    for title, check, arguments in checks:
        try:
            sys.stdout.write(f"ok      {title}: {check(*arguments)}\n")
        except Exception:  # noqa: BLE001
            failed += 1
            sys.stdout.write(f"FAILED  {title}\n{traceback.format_exc()}")
        sys.stdout.flush()
    sys.stdout.write(f"{failed} checks failed\n")
    return failed
