"""Order: steps, the ledger, the sink, and Ray Data.

`from pipeline import run, RunSpec` is the Python call of what the command line does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.runner import run
    from pipeline.spec import RunSpec
    from pipeline.summary import RunSummary

__all__ = ["RunSpec", "RunSummary", "run"]


def __getattr__(name: str) -> Any:
    # Workers import one module of this package each; the run itself brings every operator along.
    if name == "RunSpec":
        from pipeline.spec import RunSpec

        return RunSpec
    if name == "RunSummary":
        from pipeline.summary import RunSummary

        return RunSummary
    if name == "run":
        from pipeline.runner import run

        return run
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
