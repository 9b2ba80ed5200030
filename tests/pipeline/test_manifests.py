"""Long and odd manifests: read line by line, and names as their bytes say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.fetch import local_copy
from pipeline.source import Listing, list_sources
from schemas.errors import ConfigError

ROOT = Path(__file__).parents[2]
MEASURE = """
import resource, sys
from pipeline.source import Listing, list_sources
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
next(list_sources([sys.argv[1]], {}, Listing()))
before = peak()
print(sum(table.num_rows for table in list_sources([sys.argv[1]], {}, Listing())), peak() - before)
"""


def listed(*inputs):
    return [row for table in list_sources([str(given) for given in inputs], {}, Listing()) for row in table.to_pylist()]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt", ".parquet"])
def test_a_long_manifest_is_listed_in_the_memory_of_a_short_one(tmp_path, suffix):
    count = 60_000
    path = tmp_path / f"list{suffix}"
    filler = "x" * 400
    if suffix == ".parquet":
        column = pa.array([f"{filler}{number}.pdf" for number in range(count)])
        pq.write_table(pa.table({"uri": column, "other": column}), path, compression="none", use_dictionary=False)
    else:
        names = (f"{filler}{number}.pdf" for number in range(count))
        lines = (json.dumps({"uri": name}) if suffix == ".jsonl" else name for name in names)
        path.write_text(("uri\n" if suffix == ".csv" else "") + "\n".join(lines))
    assert path.stat().st_size > 24_000_000
    command = [sys.executable, "-c", MEASURE, str(path)]
    rows, grown_megabytes = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert int(rows) == count
    assert int(grown_megabytes) < 15


def test_names_with_every_legal_byte_come_through_a_list_of_names(tmp_path):
    names = [b"n" + bytes([byte]) + b".pdf" for byte in range(1, 256) if bytes([byte]) not in (b"/", b"\n", b"\r")]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    (tmp_path / "list.txt").write_bytes(b"\n".join(names))
    rows = listed(tmp_path / "list.txt")
    assert len({row["source_uri"] for row in rows}) == len(names) == 252
    for row, name in zip(rows, names, strict=True):
        assert row["size_bytes"] == len(name)
        with local_copy(row["source_uri"]) as path:
            assert path.read_bytes() == name


def test_a_line_may_end_as_windows_ends_it_and_start_with_a_mark(tmp_path):
    for name in ("a.pdf", "b c.pdf"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.pdf\r\n\r\n# no\r\nb c.pdf\r\n")
    (tmp_path / "list.csv").write_bytes(b'\xef\xbb\xbfuri,pages\r\na.pdf,1\r\n"b c.pdf",\r\n')
    for manifest in ("list.txt", "list.csv"):
        assert [Path(row["source_uri"]).name for row in listed(tmp_path / manifest)] == ["a.pdf", "b c.pdf"]


def test_a_csv_field_may_hold_a_newline(tmp_path):
    (tmp_path / "new\nline.pdf").write_bytes(b"x")
    (tmp_path / "list.csv").write_text('uri\n"new\nline.pdf"\n')
    [row] = listed(tmp_path / "list.csv")
    assert row["size_bytes"] == 1


@pytest.mark.parametrize("data", ["a.pdf\n".encode("utf-16"), b"a\0b.pdf\n", b"x" * 2_000_000])
def test_what_is_no_list_of_names_is_refused_in_one_line(tmp_path, data):
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(ConfigError, match="cannot be parsed") as caught:
        listed(tmp_path / "list.txt")
    assert "\n" not in str(caught.value)


def test_a_manifest_stays_what_it_names_however_paths_are_written(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.pdf").write_bytes(b"x")
    lines = ["a.pdf", "./a.pdf", ".//a.pdf", f"{tmp_path}/in/a.pdf", f"{tmp_path}/in/./a.pdf"]
    (tmp_path / "in" / "list.txt").write_text("\n".join(lines))
    assert {row["source_uri"] for row in listed(tmp_path / "in" / "list.txt")} == {f"{tmp_path}/in/a.pdf"}


def test_a_remote_manifest_is_read_like_a_local_one():
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/manifests/a.pdf", b"123")
    memory.pipe_file("/manifests/list.jsonl", b'{"uri": "a.pdf"}\n{"uri": "b.pdf"}\n')
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"uri": ["a.pdf", "b.pdf"]}), sink)
    memory.pipe_file("/manifests/list.parquet", bytes(sink.getvalue()))
    for suffix in ("jsonl", "parquet"):
        assert [row["size_bytes"] for row in listed(f"memory://manifests/list.{suffix}")] == [3, None]
