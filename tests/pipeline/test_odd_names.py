"""Files with odd names, links that lead nowhere: every one a source, every table valid, every command usable."""

import os
import subprocess

import pyarrow.parquet as pq
import pymupdf
import pytest

from pipeline import run
from pipeline.source import Listing, list_sources

ODD = (b"new\nline", b"quo'te\"s", b"-rf", b"$(touch owned)", b"`touch owned`", b"; touch owned;", b"back\\slash",
       b"caf\xe9", b"\xff\xfe", b" space ", b"tab\t", b"\x01\x7f", b"~", b"*", b"[a]", b"a::b", b"%41", b"#1", b"?x=1",
       "ü\u202eñ".encode(), b"{source}", b"x" * 250)  # fmt: skip


def listed(*inputs):
    return [row for table in list_sources([str(given) for given in inputs], {}, Listing()) for row in table.to_pylist()]


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    names = [name if len(name) > 200 else name + b".pdf" for name in ODD]
    for number, name in enumerate(names):
        good = pymupdf.open()
        good.new_page().insert_textbox((50, 50, 500, 700), f"File {number}. " + "Plain words of a page. " * 30)
        # Every second one cannot be opened, and has a command that shows it again.
        content = good.tobytes() if number % 2 else b"%PDF-1.7 " + bytes([number])
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(content)
    target = tmp_path_factory.mktemp("out") / "run"
    summary = run(task="ocr", inputs=[str(folder)], output=str(target), engine="cpu", local=True)
    return folder, names, target, summary


def test_every_file_is_one_source_and_every_text_is_utf_8(odd_run):
    _, names, target, summary = odd_run
    assert (summary.complete, summary.sources) == (True, len(names))
    assert summary.pages + summary.failed_sources == len(names)
    for name in ("pages", "documents", "errors"):
        table = pq.read_table(target / name)
        table.validate(full=True)
        uris = table["source_uri"].to_pylist()
        assert len(uris) == len(set(uris))
        "".join(uris).encode()


def test_every_repro_command_names_its_file_to_a_shell(odd_run):
    _, names, target, _ = odd_run
    rows = pq.read_table(target / "errors").to_pylist()
    found = set()
    for row in rows:
        command = row["repro_command"]
        assert "\n" not in command
        said = subprocess.run(
            ["bash", "-c", "pagereel() { printf '%s' \"$2\"; }; " + command],
            stdout=subprocess.PIPE,
            cwd=target,
            check=True,
        )
        [again] = listed(os.fsdecode(said.stdout))
        assert again["source_uri"] == row["source_uri"]
        found.add(row["source_uri"])
    assert len(found) == len([name for number, name in enumerate(names) if number % 2 == 0])
    assert not (target / "owned").exists()


def test_links_that_go_round_or_nowhere_end_the_listing_no_run(tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.pdf").write_bytes(b"x")
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "self.pdf").symlink_to(folder / "self.pdf")
    (folder / "gone.pdf").symlink_to(folder / "none")
    (folder / "same.pdf").symlink_to(folder / "a.pdf")
    os.mkfifo(folder / "pipe.pdf")
    rows = listed(folder)
    sizes = {os.path.basename(row["source_uri"]): row["size_bytes"] for row in rows}
    assert sizes == {"a.pdf": 1, "same.pdf": 1, "self.pdf": None, "gone.pdf": None, "pipe.pdf": 0}
    assert len(rows) == 5
    assert len(listed(f"{folder}/**/*.pdf")) < 1000
    summary = run(task="ocr", inputs=[str(folder)], output=str(tmp_path / "run"), engine="cpu", local=True)
    assert (summary.complete, summary.failed_sources) == (True, 5)
