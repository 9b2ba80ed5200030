"""Archives as inputs: their members are sources."""

import gzip
import io
import json
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pymupdf
import pytest

from operators.archives import stored_name
from operators.fetch import local_copy
from pipeline import run
from pipeline.request import check_inputs
from pipeline.source import Listing, list_sources
from schemas.errors import ConfigError


def listed(*inputs, **options):
    counts = Listing()
    rows = [
        row for table in list_sources([str(given) for given in inputs], options, counts) for row in table.to_pylist()
    ]
    return rows, counts


def members_of(rows):
    return [(row["source_ref"] or {}).get("member") for row in rows]


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", encoding="utf-8", errors="surrogateescape") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def pdf_of(pages):
    document = pymupdf.open()
    for number in range(pages):
        document.new_page().insert_textbox(
            (50, 50, 550, 700), f"Page {number} of {pages}. " + "Plain words of a page. " * 30
        )
    return document.tobytes()


MEMBERS = {
    "a.pdf": b"1",
    "d/b.pdf": b"22",
    "d/notes.md": b"x",
    ".c.pdf": b"x",
    "__MACOSX/._a.pdf": b"x",
    "in.zip": b"x",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_of(MEMBERS))
    (tmp_path / "b.tar").write_bytes(tar_of(MEMBERS))
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(tar_of(MEMBERS)))
    (tmp_path / "d.pdf").write_bytes(b"plain")
    return tmp_path


def test_members_take_the_place_of_an_archive(folder):
    rows, counts = listed(folder)
    assert members_of(rows) == ["a.pdf", "d/b.pdf", "in.zip"] * 3 + [None]
    assert [Path(row["source_uri"]).name for row in rows] == ["a.zip"] * 3 + ["b.tar"] * 3 + ["c.tar.gz"] * 3 + [
        "d.pdf"
    ]
    assert [row["source_index"] for row in rows] == list(range(10))
    assert counts.passed_over == 3
    assert [row["size_bytes"] for row in rows[:3]] == [1, 2, 1]
    for row in rows[:-1]:
        with local_copy(row["source_uri"], row["source_ref"]) as path:
            assert path.read_bytes() == MEMBERS[row["source_ref"]["member"]]
    for given in (folder / "a.zip", folder / "*.zip", f"file://{folder}/a.zip"):
        assert [row | {"source_uri": ""} for row in listed(given)[0]] == [row | {"source_uri": ""} for row in rows[:3]]


def test_a_member_a_folder_and_a_pattern_inside_an_archive_can_be_named(folder):
    for scheme, archive in (("zip", "a.zip"), ("tar", "b.tar"), ("tar", "c.tar.gz")):
        named = {
            inner: members_of(listed(f"{scheme}://{inner}::{folder}/{archive}")[0])
            for inner in ("d/b.pdf", "d", "*.pdf", "**/*.pdf")
        }
        assert named == {
            "d/b.pdf": ["d/b.pdf"],
            "d": ["d/b.pdf", "d/notes.md"],
            "*.pdf": ["a.pdf", ".c.pdf"],
            "**/*.pdf": list(n for n in MEMBERS if n.endswith(".pdf")),
        }
        [row] = listed(f"{scheme}://d/b.pdf::{folder}/{archive}")[0]
        [same] = [row for row in listed(folder / archive)[0] if row["source_ref"]["member"] == "d/b.pdf"]
        assert row == same | {"source_index": 0}
    with pytest.raises(ConfigError, match="no member"):
        listed(f"zip://none.pdf::{folder}/a.zip")
    for look in (lambda given: check_inputs([given]), listed):
        with pytest.raises(ConfigError, match=r"exist|no such archive"):
            look(f"zip://a.pdf::{folder}/none.zip")


def test_a_remote_archive_is_listed_like_a_local_one(folder):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/shelf/x/a.zip", (folder / "a.zip").read_bytes())
    memory.pipe_file("/shelf/x/b.pdf", b"1")
    assert members_of(listed("memory://shelf/x")[0]) == ["a.pdf", "d/b.pdf", "in.zip", None]
    assert members_of(listed("zip://a.pdf::memory://shelf/x/a.zip")[0]) == ["a.pdf"]


def test_a_manifest_may_name_members_and_whole_archives(folder):
    lines = [
        {"uri": "a.zip", "member": "d/b.pdf", "pages": "2"},
        {"uri": "b.tar", "member": "a.pdf"},
        {"uri": "zip://a.pdf::" + str(folder / "a.zip")},
        {"uri": "a.zip", "member": "none.pdf"},
        {"uri": "none.zip", "member": "a.pdf"},
        {"uri": "c.tar.gz", "pages": "3"},
    ]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, _ = listed(folder / "list.jsonl")
    assert members_of(rows) == ["d/b.pdf", "a.pdf", "a.pdf", "none.pdf", "a.pdf", "a.pdf", "d/b.pdf", "in.zip"]
    assert [row["page_ranges"] for row in rows] == ["2", None, None, None, None, "3", "3", "3"]
    assert [row["size_bytes"] for row in rows[:6]] == [2, 1, 1, None, None, 1]
    assert rows[1]["source_ref"]["byte_offset"] is not None


def test_a_damaged_archive_is_one_row_with_an_error_and_the_rest_goes_on(folder):
    (folder / "a.zip").write_bytes(b"PK\3\4 no zip")
    whole = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(whole[: whole.index(b"d/b.pdf") + 100])
    (folder / "e.zip").write_bytes(zip_of({}))
    rows, _ = listed(folder)
    outcomes = [(Path(row["source_uri"]).name, (row["error"] or {}).get("error_code")) for row in rows]
    assert outcomes == [
        ("a.zip", "damaged"),
        ("b.tar", None),
        ("b.tar", "damaged"),
        *[("c.tar.gz", None)] * 3,
        ("d.pdf", None),
        ("e.zip", "empty"),
    ]
    [row] = listed(folder / "a.zip")[0]
    assert (row["error"]["stage"], row["error"]["error_category"], row["error"]["retryable"]) == (
        "list",
        "corrupt_input",
        False,
    )


def test_an_archive_of_other_things_is_refused_when_it_is_all_there_is(tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_of({"a.md": b"x"}))
    with pytest.raises(ConfigError, match="holds no file to read"):
        listed(tmp_path / "a.zip")


def test_a_member_of_an_unchanged_zip_looks_unchanged_and_another_does_not(folder):
    before = {row["source_ref"]["member"]: row["version_tag"] for row in listed(folder / "a.zip")[0]}
    (folder / "a.zip").write_bytes(zip_of(MEMBERS | {"a.pdf": b"9"}))
    after = {row["source_ref"]["member"]: row["version_tag"] for row in listed(folder / "a.zip")[0]}
    assert [name for name in before if before[name] != after[name]] == ["a.pdf"]


def test_a_run_reads_members_and_its_repro_commands_name_them(tmp_path):
    odd = b"caf\xe9 'x'\n::2.pdf".decode("utf-8", "surrogateescape")
    members = {"good.pdf": pdf_of(2), "bad.pdf": b"%PDF-1.7 no", odd: b"no", "nested.zip": zip_of({"a.pdf": pdf_of(1)})}
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "x.tar.gz").write_bytes(gzip.compress(tar_of(members)))
    (folder / "y.zip").write_bytes(zip_of({"good.pdf": pdf_of(2), "other.pdf": pdf_of(3)}))
    summary = run(task="ocr", inputs=[str(folder)], output=str(tmp_path / "run"), engine="cpu", local=True)
    assert (summary.complete, summary.pages, summary.failed_sources) == (True, 7, 3)
    again = run(task="ocr", inputs=[str(folder)], output=str(tmp_path / "run"), engine="cpu", local=True)
    assert (again.complete, again.computed, again.resumed) == (True, 0, 7)
    pages = pq.read_table(tmp_path / "run" / "pages").to_pylist()
    assert {row["source_ref"]["member"] for row in pages} == {"good.pdf", "other.pdf"}
    errors = pq.read_table(tmp_path / "run" / "errors").to_pylist()
    assert len(errors) == 3
    reread = []
    for row in errors:
        assert "\n" not in row["repro_command"]
        said = subprocess.run(
            ["bash", "-c", f"pagereel() {{ printf '%s' \"$2\"; }}; {row['repro_command']}"], stdout=-1
        )
        [again], _ = listed(os.fsdecode(said.stdout))
        reread.append(again["source_ref"]["member"])
        with local_copy(again["source_uri"], again["source_ref"]) as path:
            assert path.read_bytes() in members.values()
    assert sorted(reread) == sorted(["bad.pdf", stored_name(odd), "nested.zip"])
    assert sorted(row["source_ref"]["member"] for row in errors) == sorted(reread)
    assert not [name for name in os.listdir(tmp_path) if name not in ("in", "run")]
