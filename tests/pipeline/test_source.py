import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.source import Listing, list_sources
from schemas.errors import ConfigError
from schemas.source import SOURCE


def listed(inputs, **options):
    counts = Listing()
    tables = list(list_sources([str(given) for given in inputs], options, counts))
    rows = pa.concat_tables(tables).to_pylist() if tables else []
    return rows, counts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.pdf", "a.pdf", "deep/c.png", "notes.md", ".hidden.pdf", "no_suffix"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path


def test_a_folder_is_walked_in_order_and_passes_over_other_files(folder):
    rows, counts = listed([folder])
    assert [Path(row["source_uri"]).name for row in rows] == ["a.pdf", "b.pdf", "no_suffix", "c.png"]
    assert [row["source_index"] for row in rows] == [0, 1, 2, 3]
    assert counts.passed_over == 1
    assert rows[0]["size_bytes"] == 5
    assert rows[0]["version_tag"] == str((folder / "a.pdf").stat().st_mtime_ns)


def test_tables_have_the_source_schema(folder):
    [table] = list_sources([str(folder)], {}, Listing())
    assert table.schema == SOURCE


def test_a_named_file_is_taken_whatever_its_suffix(folder):
    rows, _ = listed([folder / "notes.md"])
    assert len(rows) == 1


def test_a_glob_matches_files_only(folder):
    rows, _ = listed([folder / "*.pdf"])
    assert [Path(row["source_uri"]).name for row in rows] == ["a.pdf", "b.pdf"]


def test_options_apply_to_every_source(folder):
    rows, _ = listed([folder / "a.pdf"], page_ranges="2-3", password="s")
    assert (rows[0]["page_ranges"], rows[0]["password"]) == ("2-3", "s")


def test_a_csv_manifest_sets_pages_and_password_and_keeps_missing_files(folder):
    manifest = folder / "list.csv"
    manifest.write_text("uri,pages,password\na.pdf,1-5,\nmissing.pdf,,secret\n")
    rows, _ = listed([manifest], page_ranges="9")
    assert rows[0]["source_uri"] == str(folder / "a.pdf")
    assert rows[0]["page_ranges"] == "1-5"
    assert rows[1]["page_ranges"] == "9"
    assert rows[1]["password"] == "secret"
    assert rows[1]["size_bytes"] is None


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_manifests_of_every_kind_name_the_same_sources(folder, suffix):
    manifest = folder / f"list{suffix}"
    if suffix == ".txt":
        manifest.write_text("# comment\na.pdf\n\nb.pdf\n")
    elif suffix == ".jsonl":
        manifest.write_text("\n".join(json.dumps({"uri": name}) for name in ("a.pdf", "b.pdf")))
    else:
        pq.write_table(pa.table({"uri": ["a.pdf", "b.pdf"]}), manifest)
    rows, _ = listed([manifest])
    assert [Path(row["source_uri"]).name for row in rows] == ["a.pdf", "b.pdf"]


def test_times_of_a_manifest_row_are_seconds(folder):
    manifest = folder / "clips.jsonl"
    manifest.write_text(json.dumps({"uri": "a.pdf", "start_seconds": "1.5", "stop_seconds": 4}))
    rows, _ = listed([manifest])
    assert (rows[0]["start_seconds"], rows[0]["stop_seconds"]) == (1.5, 4.0)


def test_a_remote_folder_is_listed():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/listing/x.pdf", b"12")
    memory.pipe_file("/listing/deep/y.pdf", b"123")
    rows, _ = listed(["memory://listing"])
    assert [row["source_uri"].rsplit("/", 1)[1] for row in rows] == ["y.pdf", "x.pdf"]
    assert [row["size_bytes"] for row in rows] == [3, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.pdf", None, "does not exist"),
        ("*.nothing", None, "matches no file"),
        ("gone.csv", None, "does not exist"),
        ("bad.jsonl", "{not json", "cannot be parsed"),
        ("nouri.csv", "path\na.pdf\n", "no 'uri'"),
        ("empty.txt", "\n", "names no source"),
        ("time.jsonl", '{"uri": "a", "start_seconds": "soon"}', "wanted seconds"),
    ],
)
def test_an_input_that_cannot_be_listed_is_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        listed([path])
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no file"):
        listed([tmp_path])
