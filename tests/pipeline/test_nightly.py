"""Nights: several runs over one corpus with one ledger. What did not change is neither opened nor asked again."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pymupdf
import pytest
from PIL import Image, ImageDraw
from run_tables import assert_equal_runs

from pipeline import run
from schemas.errors import ConfigError

OPTIONS = {"task": "caption", "model": "demo", "local": True, "max_new_tokens": 3, "attempts": 1}


def write_scan(path: Path, *words: str) -> None:
    document = pymupdf.open()
    for text in words:
        picture = Image.new("RGB", (240, 160), "white")
        ImageDraw.Draw(picture).text((20, 60), text, fill="black", font_size=24)
        data = io.BytesIO()
        picture.save(data, "PNG")
        page = document.new_page(width=120, height=80)
        page.insert_image(page.rect, stream=data.getvalue())
    document.save(path)


class Nights:
    """One corpus, one ledger, and a run folder a night."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inputs = root / "in"
        self.inputs.mkdir()
        write_scan(self.inputs / "a.pdf", "one", "two", "cover")
        write_scan(self.inputs / "b.pdf", "cover", "three")
        (self.inputs / "broken.pdf").write_bytes(b"%PDF-1.7 and no more of it" * 9)

    def night(self, name: str, **options):
        spec = OPTIONS | {"inputs": [str(self.inputs)], "output": str(self.root / name)}
        return run(**spec | {"ledger": str(self.root / "ledger")} | options)

    def rows(self, name: str, table: str = "pages") -> list[dict]:
        return pq.read_table(self.root / name / table).to_pylist()

    def spoil(self) -> None:
        """Make every source unreadable in a way that its listing does not show."""
        for path in self.inputs.iterdir():
            found = path.stat()
            path.write_bytes(b"?" * found.st_size)
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.fixture(scope="module")
def nights(tmp_path_factory) -> Nights:
    nights = Nights(tmp_path_factory.mktemp("nights"))
    first = nights.night("first")
    assert first.complete
    return nights


def test_a_page_that_two_files_share_is_asked_once(nights, tmp_path):
    rows = nights.rows("first")
    assert [row["ledger_hit"] for row in rows].count(True) == 1
    covers = [row for row in rows if Path(row["source_uri"]).name == "b.pdf" and row["page_number"] == 1]
    covers += [row for row in rows if Path(row["source_uri"]).name == "a.pdf" and row["page_number"] == 3]
    assert len({row["content_key"] for row in covers}) == 1
    assert {row["ledger_hit"] for row in covers} == {True, False}
    assert len({(row["raw_output"], row["status"], row["output_tokens"], row["model_id"]) for row in covers}) == 1
    alone = nights.night("alone", ledger=None, inputs=[str(nights.inputs / "b.pdf")])
    same = [row | {"ledger_hit": None} for row in rows if Path(row["source_uri"]).name == "b.pdf"]
    assert alone.complete
    for mine, theirs in zip(nights.rows("alone"), same, strict=True):
        assert {name for name in mine if mine[name] != theirs[name]} <= {
            "run_id", "created_at", "ledger_hit", "render_ms", "queue_ms", "generate_ms", "confidence",
        }  # fmt: skip


def test_a_second_night_asks_nothing_and_opens_no_file(nights):
    for path in nights.inputs.iterdir():
        (nights.root / path.name).write_bytes(path.read_bytes())
    times = {path: path.stat().st_mtime_ns for path in nights.inputs.iterdir()}
    nights.spoil()
    second = nights.night("second")
    for path, moment in times.items():
        path.write_bytes((nights.root / path.name).read_bytes())
        os.utime(path, ns=(moment, moment))
    assert (second.complete, second.ledger_hits, second.computed, second.prompt_tokens) == (True, 5, 0, 0)
    assert second.steps == {}
    rows = nights.rows("second")
    assert {row["ledger_hit"] for row in rows} == {True}
    assert {row["run_id"] for row in rows} == {second.run_id}
    assert nights.rows("second", "runs")[0]["ledger_hits"] == 5
    assert_equal_runs(nights.root / "second", nights.root / "first", unlike=("ledger_hit",))


def test_one_changed_page_costs_one_answer(nights):
    write_scan(nights.inputs / "b.pdf", "cover", "three, as it is now")
    third = nights.night("third")
    assert (third.complete, third.ledger_hits, third.computed, third.known_answers) == (True, 3, 2, 1)
    [asked] = [row for row in nights.rows("third") if not row["ledger_hit"]]
    assert (Path(asked["source_uri"]).name, asked["page_number"]) == ("b.pdf", 2)
    assert third.prompt_tokens == asked["prompt_tokens"] > 0


def test_another_prompt_is_asked_anew_and_leaves_the_old_answers_where_they_are(nights):
    other = nights.night("other", prompt="What is this?")
    assert (other.complete, other.ledger_hits, other.computed) == (True, 0, 5)
    again = nights.night("again")
    assert (again.complete, again.ledger_hits, again.computed) == (True, 5, 0)


def test_failures_are_taken_over_and_computed_again_only_when_asked(nights):
    failed = [row for row in nights.rows("first") if row["status"] not in ("success", "blank")]
    assert failed, "answers of three tokens are cut off"
    taken = nights.night("retry")
    assert taken.ledger_hits == 5
    assert len(nights.rows("retry", "errors")) == len(nights.rows("again", "errors"))
    retried = nights.night("retried", retry_failed=True)
    assert (retried.complete, retried.ledger_hits + retried.computed) == (True, 5)
    assert (retried.computed, retried.known_answers) == (len(failed), 1)
    assert retried.prompt_tokens > 0, "what is tried again does not meet its own earlier answer"
    after = nights.night("after")
    assert (after.ledger_hits, after.computed) == (5, 0)


def test_a_renamed_file_is_opened_and_asked_nothing(nights):
    (nights.inputs / "a.pdf").rename(nights.inputs / "c.pdf")
    moved = nights.night("moved")
    (nights.inputs / "c.pdf").rename(nights.inputs / "a.pdf")
    assert (moved.complete, moved.computed, moved.ledger_hits) == (True, 0, 5)
    assert {Path(row["source_uri"]).name for row in nights.rows("moved")} == {"b.pdf", "c.pdf"}
    assert all("a.pdf" not in row["repro_command"] for row in nights.rows("moved", "errors"))


def test_the_run_folder_is_no_ledger_to_share(nights):
    with pytest.raises(ConfigError, match="the run folder itself"):
        nights.night("own", ledger=str(nights.root / "own"))


def write_archives(folder: Path, words: str) -> list[Path]:
    """Write a zip and a compressed tar with a page each."""
    folder.mkdir(exist_ok=True)

    def page(name: str) -> bytes:
        document = pymupdf.open()
        document.new_page(width=300, height=200).insert_textbox((20, 20, 280, 180), f"{name}. {words * 9}")
        data: bytes = document.tobytes()
        return data

    with zipfile.ZipFile(folder / "a.zip", "w") as packed:
        packed.writestr("deep/page.pdf", page("one"))
        packed.writestr("notes.txt", "passed over")
    with tarfile.open(folder / "b.tar.gz", "w:gz") as packed:
        member = tarfile.TarInfo("page.pdf")
        member.size = len(data := page("two"))
        packed.addfile(member, io.BytesIO(data))
    return [folder / "a.zip", folder / "b.tar.gz"]


def test_an_unchanged_archive_is_not_opened(tmp_path):
    options = {"task": "ocr", "engine": "cpu", "local": True, "inputs": [str(tmp_path / "in")]}
    options |= {"ledger": str(tmp_path / "ledger")}
    archives = write_archives(tmp_path / "in", "Pack my box. ")
    first = run(**options, output=str(tmp_path / "first"))
    assert (first.complete, first.sources, first.computed) == (True, 2, 2)
    kept = [(path, path.read_bytes(), path.stat().st_mtime_ns) for path in archives]
    for path, data, moment in kept:
        path.write_bytes(b"?" * len(data))
        os.utime(path, ns=(moment, moment))
    for name in ("second", "first"):
        again = run(**options, output=str(tmp_path / name))
        assert (again.complete, again.sources, again.computed) == (True, 2, 0)
    assert_equal_runs(tmp_path / "second", tmp_path / "first", unlike=("ledger_hit",))
    members = [row["source_ref"]["member"] for row in pq.read_table(tmp_path / "second" / "documents").to_pylist()]
    assert members == ["deep/page.pdf", "page.pdf"]

    write_archives(tmp_path / "in", "Other words. ")
    changed = run(**options, output=str(tmp_path / "third"))
    assert (changed.complete, changed.sources, changed.ledger_hits, changed.known_answers) == (True, 2, 0, 0)


def test_a_damaged_archive_is_opened_by_every_night(tmp_path):
    options = {"task": "ocr", "engine": "cpu", "local": True, "inputs": [str(tmp_path / "in")]}
    options |= {"ledger": str(tmp_path / "ledger")}
    _, torn = write_archives(tmp_path / "in", "Pack my box. ")
    data = torn.read_bytes()
    torn.write_bytes(data[: len(data) // 2])
    for name in ("first", "second"):
        summary = run(**options, output=str(tmp_path / name))
        assert summary.complete
        [error] = pq.read_table(tmp_path / name / "errors").to_pylist()
        assert (error["error_code"], Path(error["source_uri"]).name) == ("damaged", torn.name)
    assert summary.ledger_hits == 1
