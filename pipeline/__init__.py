"""Order: steps, the ledger, the sink, and Ray Data.

`from pipeline import run, RunSpec` is the Python call of what the command line does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.runner import RunSummary, run
    from pipeline.spec import RunSpec

__all__ = ["RunSpec", "RunSummary", "run"]


def __getattr__(name: str) -> Any:
    # Workers import one module of this package each; the run itself brings every operator along.
    if name == "RunSpec":
        from pipeline.spec import RunSpec

        return RunSpec
    if name in ("run", "RunSummary"):
        from pipeline import runner

        return getattr(runner, name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
