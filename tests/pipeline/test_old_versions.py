"""A run folder of an earlier version of the tables stays readable, and its rows can go into a ledger of today."""

import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline import run
from pipeline.parts import PartCache
from pipeline.publish import publish
from pipeline.runner import status_of
from pipeline.shared_ledger import SharedLedger
from pipeline.storage import Storage
from pipeline.verify import inspect
from schemas.errors import ConfigError
from schemas.tables import PAGES, TABLES
from schemas.vocabulary import SCHEMA_VERSION

OLD_RUN = Path(__file__).parents[1] / "data" / "run-schema-1.tar.gz"


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    with tarfile.open(OLD_RUN) as packed:
        packed.extractall(tmp_path, filter="data")
    return tmp_path / "run-1"


def test_an_old_run_is_still_accounted_for(old_run: Path) -> None:
    accounting = status_of(str(old_run), verify=True)
    assert accounting.problems == []
    assert (accounting.committed, accounting.published_rows, accounting.complete) == (3, 3, True)


def test_old_rows_lack_the_newer_columns_and_nothing_else(old_run: Path) -> None:
    facts = inspect(Storage(str(old_run)), verify=True)
    assert (facts.problems, dict(facts.schema_versions), facts.records) == ([], {"1": 1}, 3)
    [part] = (old_run / "ledger" / "parts" / "pages").iterdir()
    assert "rung" not in pq.read_schema(part).names
    rows = PartCache(Storage(str(old_run))).get("pages", part.stem)
    assert rows is not None
    assert rows.schema.names == PAGES.names
    assert rows["rung"].null_count == 3
    assert all(text.startswith("Page ") for text in rows["text"].to_pylist())


def test_an_old_run_is_published_in_the_tables_of_today(old_run: Path) -> None:
    manifest = publish(Storage(str(old_run)), "again")
    assert manifest.schema_version == SCHEMA_VERSION
    for name, schema in TABLES.items():
        assert pq.read_table(old_run / name).schema.names == schema.names
    assert pq.read_table(old_run / "pages").num_rows == 3
    assert status_of(str(old_run), verify=True).complete


def test_a_ledger_takes_the_rows_of_an_old_run(old_run: Path, tmp_path: Path) -> None:
    shared = SharedLedger(str(tmp_path / "ledger"))
    assert shared.give(Storage(str(old_run)), "old", "add", None).records == 3
    assert shared.give(Storage(str(old_run)), "old", "add", None).records == 0
    assert inspect(shared.storage, verify=True).problems == []


def test_an_old_folder_is_not_written_on_with_other_rules(old_run: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.pdf"
    source.write_bytes(b"%PDF-1.7")
    with pytest.raises(ConfigError, match="choose another output folder"):
        run(task="ocr", engine="cpu", local=True, inputs=[str(source)], output=str(old_run))
