"""How the tables of two runs are compared: equal, but for when and by which call a row was made."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TABLES = ("pages", "blocks", "video_segments", "documents", "errors")
UNLIKE = ("run_id", "created_at", "render_ms", "queue_ms", "generate_ms")
ROUNDED = "confidence"
"""A mean of log-probabilities: padding of another batch moves its last digits, never the tokens."""


def assert_equal_runs(found: Path, wanted: Path, note: str = "", unlike: tuple[str, ...] = ()) -> None:
    for name in TABLES:
        mine, theirs = (pq.read_table(run / name) for run in (found, wanted))
        assert mine.schema == theirs.schema
        names = [column for column in mine.column_names if column not in (*UNLIKE, *unlike, ROUNDED)]
        if not mine.select(names).equals(theirs.select(names)):
            raise AssertionError(f"{name} differs{note}: {differences(mine.select(names), theirs.select(names))}")
        if ROUNDED in mine.column_names:
            pair = [np.array(table[ROUNDED].to_pylist(), dtype=float) for table in (mine, theirs)]
            np.testing.assert_allclose(*pair, atol=1e-4, err_msg=f"{name}{note}")


def differences(found: pa.Table, wanted: pa.Table) -> str:
    if found.num_rows != wanted.num_rows:
        return f"{found.num_rows} rows, wanted {wanted.num_rows}"
    pairs = zip(found.to_pylist(), wanted.to_pylist(), strict=True)
    return str([{k: (a[k], b[k]) for k in a if a[k] != b[k]} for a, b in pairs if a != b][:3])
