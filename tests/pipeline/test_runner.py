"""Whole runs in a plain loop: real decoders, real tables, no Ray."""

import json
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pymupdf
import pytest

from pipeline import run
from pipeline.preview import plan
from pipeline.progress import Progress
from pipeline.runner import status_of
from pipeline.spec import make_spec
from schemas.errors import ConfigError


class Recorder:
    def __init__(self):
        self.notes = []
        self.phases = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def progress(self, progress: Progress) -> None:
        self.phases.append(progress.phase)


def write_pdf(path: Path, pages: int, word: str = "page") -> Path:
    document = pymupdf.open()
    for number in range(1, pages + 1):
        page = document.new_page()
        text = f"This is {word} {number}. " + "The quick brown fox jumps over the lazy dog. " * 12
        page.insert_textbox((50, 50, 540, 780), text, fontsize=11)
    document.save(path)
    return path


def write_video(path: Path, seconds: float) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(int(seconds * 10)):
            pixels = np.full((48, 64, 3), index % 250, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    write_pdf(folder / "a.pdf", 13)
    write_pdf(folder / "b.pdf", 2, "leaf")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4\nno more than this")
    (folder / "empty.png").write_bytes(b"")
    return folder


def options(tmp_path: Path, folder: Path, **more):
    return {"task": "ocr", "inputs": [str(folder)], "output": str(tmp_path / "run"), "local": True, **more}


def read(tmp_path: Path, table: str, run_name: str = "run"):
    return pq.read_table(tmp_path / run_name / table).to_pylist()


def test_every_page_has_one_row_and_every_unopened_file_one_error(tmp_path, corpus_folder):
    summary = run(**options(tmp_path, corpus_folder))
    assert summary.complete
    assert summary.statuses == {"success": 15}
    pages = read(tmp_path, "pages")
    assert [(Path(row["source_uri"]).name, row["page_number"]) for row in pages] == [
        *[("a.pdf", number) for number in range(1, 14)],
        *[("b.pdf", number) for number in range(1, 3)],
    ]
    assert pages[4]["text"].startswith("This is page 5.")
    assert {row["route"] for row in pages} == {"text_layer"}
    errors = {Path(row["source_uri"]).name: row["error_code"] for row in read(tmp_path, "errors")}
    assert errors == {"broken.pdf": "no_pages", "empty.png": "empty"} or errors == {
        "broken.pdf": "damaged",
        "empty.png": "empty",
    }
    documents = {Path(row["source_uri"]).name: row for row in read(tmp_path, "documents")}
    assert documents["a.pdf"]["success_count"] == 13
    assert documents["empty.png"]["status"] == "failure"


def test_a_second_call_computes_nothing(tmp_path, corpus_folder):
    run(**options(tmp_path, corpus_folder))
    before = read(tmp_path, "pages")
    again = run(**options(tmp_path, corpus_folder))
    assert (again.computed, again.resumed, again.complete) == (0, 15, True)
    assert again.steps == {}
    assert read(tmp_path, "pages") == before


def test_a_changed_file_is_read_again_and_the_others_are_not(tmp_path, corpus_folder):
    run(**options(tmp_path, corpus_folder))
    write_pdf(corpus_folder / "b.pdf", 3, "sheet")
    again = run(**options(tmp_path, corpus_folder))
    assert (again.computed, again.complete) == (3, True)
    texts = [row["text"] for row in read(tmp_path, "pages") if row["source_uri"].endswith("b.pdf")]
    assert len(texts) == 3
    assert all(text.startswith("This is sheet") for text in texts)


def test_other_settings_in_the_same_folder_are_refused(tmp_path, corpus_folder):
    run(**options(tmp_path, corpus_folder))
    with pytest.raises(ConfigError, match=r"dpi 200\.0 now 150"):
        run(**options(tmp_path, corpus_folder, dpi=150))


def test_videos_are_skipped_without_a_model_and_accounted_for(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_video(folder / "v.avi", 1.5)
    summary = run(**options(tmp_path, folder))
    assert summary.complete
    [segment] = read(tmp_path, "video_segments")
    assert (segment["status"], segment["route_reason"]) == ("skipped", "the CPU engine reads pages, not videos")


def test_segments_are_cut_every_so_many_seconds_and_captioned(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_video(folder / "v.avi", 3.5)
    summary = run(**options(tmp_path, folder, task="caption", model="demo", segment_seconds=2.0))
    assert summary.complete
    assert summary.weights_kind == "demo_random"
    segments = read(tmp_path, "video_segments")
    assert [(row["start_seconds"], row["stop_seconds"]) for row in segments] == [(0.0, 2.0), (2.0, 3.5)]
    assert all(row["output_tokens"] > 0 and row["weights_kind"] == "demo_random" for row in segments)
    assert [row["frame_timestamps_seconds"] for row in segments] == [[0.0, 1.0], [2.0, 3.0]]


def test_two_ranges_of_one_video_are_a_complete_run(tmp_path):
    write_video(tmp_path / "v.avi", 5.0)
    ranges = [(0, 2), (2, 4)]
    lines = [json.dumps({"uri": "v.avi", "start_seconds": start, "stop_seconds": stop}) for start, stop in ranges]
    manifest = tmp_path / "list.jsonl"
    manifest.write_text("\n".join(lines))
    summary = run(**options(tmp_path, manifest, task="caption", model="demo"))
    assert summary.complete
    assert status_of(str(tmp_path / "run")).problems == []
    segments = read(tmp_path, "video_segments")
    assert [(row["segment_index"], row["start_seconds"], row["stop_seconds"]) for row in segments] == [
        (0, 0.0, 2.0),
        (0, 2.0, 4.0),
    ]
    assert len({row["segment_id"] for row in segments}) == 2


def test_two_ranges_of_one_document_that_fail_are_a_complete_run(tmp_path):
    write_pdf(tmp_path / "a.pdf", 3)
    manifest = tmp_path / "list.jsonl"
    manifest.write_text("\n".join(json.dumps({"uri": "a.pdf", "pages": pages}) for pages in ("9", "10", "2")))
    summary = run(**options(tmp_path, manifest))
    assert summary.complete
    assert status_of(str(tmp_path / "run")).problems == []
    errors = read(tmp_path, "errors")
    assert [row["error_code"] for row in errors] == ["page_missing", "page_missing"]
    assert len({row["error_id"] for row in errors}) == 2
    assert [row["page_number"] for row in read(tmp_path, "pages")] == [2]


def test_a_mixed_folder_is_one_run(tmp_path, corpus_folder):
    write_video(corpus_folder / "v.avi", 1.0)
    summary = run(**options(tmp_path, corpus_folder, model="demo"))
    assert summary.complete
    assert (summary.pages, summary.segments) == (15, 1)


def test_pages_and_limit_choose_what_is_read(tmp_path, corpus_folder):
    summary = run(**options(tmp_path, corpus_folder, pages="2,5-6", limit=1))
    assert summary.sources == 1
    assert [row["page_number"] for row in read(tmp_path, "pages")] == [2, 5, 6]


def test_parse_writes_blocks_that_join_their_pages(tmp_path, corpus_folder):
    run(**options(tmp_path, corpus_folder, task="parse", limit=1))
    pages = {row["page_id"] for row in read(tmp_path, "pages")}
    blocks = read(tmp_path, "blocks")
    assert {row["page_id"] for row in blocks} == pages
    assert all(row["bbox"] and row["reading_order"] >= 0 for row in blocks)


def test_the_password_is_used_and_never_written(tmp_path):
    secret = "correct horse battery"
    folder = tmp_path / "in"
    folder.mkdir()
    document = pymupdf.open()
    document.new_page().insert_text((72, 72), "hidden words that are long enough to be trusted as text")
    document.save(
        folder / "locked.pdf", encryption=pymupdf.PDF_ENCRYPT_AES_256, user_pw=secret, owner_pw="another secret"
    )
    refused = run(**options(tmp_path, folder) | {"output": str(tmp_path / "no")})
    assert refused.errors == {"password_required": 1}
    opened = run(**options(tmp_path, folder, password=secret))
    assert opened.statuses == {"success": 1}
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes()


def test_status_of_a_finished_run_adds_up(tmp_path, corpus_folder):
    run(**options(tmp_path, corpus_folder))
    accounting = status_of(str(tmp_path / "run"), verify=True)
    assert accounting.complete
    assert (accounting.planned, accounting.committed, accounting.owed) == (15, 15, 0)


def test_status_finds_a_page_that_vanished(tmp_path, corpus_folder):
    run(**options(tmp_path, corpus_folder))
    [file] = (tmp_path / "run" / "pages").glob("*.parquet")
    table = pq.read_table(file)
    pq.write_table(table.slice(1), file)
    accounting = status_of(str(tmp_path / "run"))
    assert not accounting.complete
    assert accounting.problems


def test_status_of_something_else_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no run\.json"):
        status_of(str(tmp_path))


def test_a_plan_counts_and_writes_nothing(tmp_path, corpus_folder):
    report = plan(make_spec(options(tmp_path, corpus_folder, output="-")))
    assert (report.counts.sources, report.counts.failed_sources) == (4, 2)
    assert (report.counts.units, report.counts.records) == (5, 15)
    assert not (tmp_path / "run").exists()


def test_the_observer_hears_who_reads_first(tmp_path, corpus_folder):
    recorder = Recorder()
    run(make_spec(options(tmp_path, corpus_folder)), recorder)
    assert "CPU engine" in recorder.notes[0]
    assert "no model was named" in recorder.notes[0]
    assert recorder.phases[-1] == "done"


def test_the_run_file_says_how_it_ended(tmp_path, corpus_folder):
    summary = run(**options(tmp_path, corpus_folder))
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written["summary"]["statuses"] == summary.statuses
    assert written["versions"]["pymupdf"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ["/no/such/file.pdf"]}, "does not exist"),
        ({"output": "/proc/nowhere"}, "not writable"),
        ({"model": "/no/such/model"}, "neither a folder nor a hub id"),
        ({"task": "caption"}, "captions need a model"),
        ({"engine": "cpu", "model": "demo"}, "takes no --model"),
        ({"fps": 0}, "greater than 0"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_spec_that_cannot_run_is_refused_in_one_line(tmp_path, corpus_folder, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run(**options(tmp_path, corpus_folder) | change)
    assert "\n" not in str(caught.value)


def test_a_failed_page_is_read_again_only_when_asked(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_video(folder / "v.avi", 1.0)
    short = options(tmp_path, folder, task="caption", model="demo", max_new_tokens=1)
    first = run(**short)
    assert first.statuses == {"truncated": 1}
    assert first.complete
    plain = run(**short)
    assert (plain.computed, plain.complete) == (0, True)
    again = run(**short, retry_failed=True)
    assert (again.computed, again.complete) == (1, True)
    assert len(read(tmp_path, "video_segments")) == 1
    assert len(read(tmp_path, "errors")) == 1


def test_a_file_that_was_away_is_read_when_it_is_back(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    path = write_pdf(folder / "a.pdf", 2)
    data = path.read_bytes()
    manifest = tmp_path / "list.txt"
    manifest.write_text(str(path))
    path.unlink()
    away = run(**options(tmp_path, manifest))
    assert away.errors == {"source_unavailable": 1}
    path.write_bytes(data)
    back = run(**options(tmp_path, manifest))
    assert (back.computed, back.statuses, back.failed_sources) == (2, {"success": 2}, 0)


def test_a_model_folder_may_move(tmp_path, corpus_folder):
    from operators.minicpmv.demo import write_demo_model

    model = tmp_path / "model"
    model.mkdir()
    write_demo_model(model)
    run(**options(tmp_path, corpus_folder, model=str(model)))
    model.rename(tmp_path / "moved")
    again = run(**options(tmp_path, corpus_folder, model=str(tmp_path / "moved")))
    assert (again.computed, again.complete) == (0, True)


def test_the_repro_command_carries_the_options_that_matter(tmp_path, corpus_folder):
    run(**options(tmp_path, corpus_folder, task="parse", dpi=150, pages="1-2"))
    commands = [row["repro_command"] for row in read(tmp_path, "errors")]
    assert len(commands) == 2
    assert all(command.startswith("pagereel parse ") and "--dpi 150" in command for command in commands)
    assert all("--local" not in command and "--pages 1-2" not in command for command in commands)
