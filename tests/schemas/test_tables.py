"""The output tables, as strangers load them."""

import subprocess
import sys
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import ContractError
from schemas.tables import BLOCKS, TABLES, VOCABULARY, check_vocabulary
from schemas.vocabulary import BLOCK_LABELS, SCHEMA_VERSION, STATUSES

SAMPLES: dict[str, dict[str, Any]] = {
    "pages": {
        "page_id": "d:1",
        "page_number": 1,
        "status": "success",
        "text": "Grüße 中文 $x^2$",
        "source_ref": {"path": "a.tar", "member": "b.pdf", "byte_offset": 512, "byte_size": 9},
        "is_table": None,
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
    },
    "blocks": {
        "block_id": "d:1/b0000",
        "label": "table",
        "bbox": [1.0, 2.0, 3.0, 4.0],
        "bbox_norm1000": [1, 2, 3, 1000],
        "section_path": ["d:1/b0001"],
        "is_derived": False,
    },
    "video_segments": {
        "segment_id": "v:0.0-30.0",
        "status": "success",
        "caption": "a dog",
        "frame_timestamps_seconds": [0.0, 0.5],
        "temporal_ids": [[0, 1], [2]],
        "events": [{"start_seconds": 0.0, "stop_seconds": 1.0, "text": "barks"}],
    },
    "documents": {
        "doc_id": "d",
        "status": None,
        "kind": "pdf",
        "page_spans": [{"start": 0, "end": 3, "page_number": 1}],
    },
    "errors": {"error_id": "e", "stage": "open", "error_code": "encrypted", "error_category": "password_required"},
    "runs": {"run_id": "r", "config": "{}", "gpu_seconds": 1.5, "started_at": datetime(2026, 1, 1, tzinfo=UTC)},
}


@pytest.fixture(params=sorted(TABLES))
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A table of one full row and one that is null wherever it may be."""
    name = request.param
    full = SAMPLES[name]
    required = {column: full[column] for column, words in VOCABULARY[name].items() if None not in words}
    table = pa.Table.from_pylist([full, required], schema=TABLES[name])
    check_vocabulary(name, table)
    path = tmp_path / f"{name}.parquet"
    pq.write_table(table, path)
    return path


def test_the_footer_names_the_table_and_its_schema_version(file: Path) -> None:
    metadata = pq.read_schema(file).metadata
    assert metadata[b"pagereel.schema_version"] == SCHEMA_VERSION.encode()
    assert metadata[b"pagereel.table"] == file.stem.encode()


def test_pandas_loads_each_table(file: Path) -> None:
    frame = pd.read_parquet(file)
    assert list(frame.columns) == TABLES[file.stem].names
    assert len(frame) == 2


def test_duckdb_loads_each_table_and_reaches_into_it(file: Path) -> None:
    # Through Arrow: DuckDB's own conversion of times with a zone to Python objects asks for another package.
    assert duckdb.sql(f"select * from '{file}'").to_arrow_table().column_names == TABLES[file.stem].names
    if file.stem == "pages":
        found = duckdb.sql(f"select source_ref.member, text from '{file}' limit 1").fetchall()
        assert found == [("b.pdf", "Grüße 中文 $x^2$")]
    if file.stem == "video_segments":
        found = duckdb.sql(f"select events[1].text, temporal_ids[1][2] from '{file}' limit 1").fetchall()
        assert found == [("barks", 1)]


@pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed")
def test_hugging_face_datasets_loads_each_table(file: Path, tmp_path: Path) -> None:
    code = (
        "import sys, datasets; datasets.disable_progress_bars();"
        "d = datasets.load_dataset('parquet', data_files=sys.argv[1], split='train', cache_dir=sys.argv[2]);"
        "print(d.num_rows, ','.join(d.column_names))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(file), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["2", ",".join(TABLES[file.stem].names)]


@pytest.mark.ray
def test_ray_data_loads_all_tables(tmp_path: Path) -> None:
    for name, schema in TABLES.items():
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist([SAMPLES[name]] * 2, schema=schema), tmp_path / name / "a.parquet")
    code = (
        "import sys, ray, ray.data\n"
        "ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False,"
        " logging_level='ERROR')\n"
        "ray.data.DataContext.get_current().enable_progress_bars = False\n"
        "for name in sys.argv[2:]:\n"
        "    rows = ray.data.read_parquet(sys.argv[1] + '/' + name).take_all()\n"
        "    print(name, len(rows), len(rows[0]))\n"
        "ray.shutdown()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *TABLES], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [word for name, s in TABLES.items() for word in (name, "2", str(len(s)))]


@pytest.mark.parametrize(
    ("table_name", "column"), [(name, column) for name, columns in VOCABULARY.items() for column in columns]
)
def test_a_word_outside_a_closed_column_is_named(table_name: str, column: str) -> None:
    row = SAMPLES[table_name] | {column: "invented"}
    table = pa.Table.from_pylist([SAMPLES[table_name], row], schema=TABLES[table_name])
    with pytest.raises(ContractError, match=f"{table_name}.{column} is 'invented'"):
        check_vocabulary(table_name, table)


def test_a_status_is_never_null_where_a_record_has_a_row() -> None:
    table = pa.Table.from_pylist([SAMPLES["pages"] | {"status": None}], schema=TABLES["pages"])
    with pytest.raises(ContractError, match=r"pages\.status is None"):
        check_vocabulary("pages", table)


def test_every_word_of_a_vocabulary_is_accepted() -> None:
    check_vocabulary("blocks", pa.Table.from_pylist([{"label": label} for label in BLOCK_LABELS], schema=BLOCKS))
    check_vocabulary("pages", pa.Table.from_pylist([{"status": status} for status in STATUSES], schema=TABLES["pages"]))


def test_an_empty_table_is_fine() -> None:
    for name, schema in TABLES.items():
        check_vocabulary(name, schema.empty_table())
