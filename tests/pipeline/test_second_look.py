"""Pages on which the model failed are shown to it once more: whole runs, their parts, and kills in between."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pymupdf
import pytest
from safetensors.torch import load_file, save_file

from operators.minicpmv.demo import write_demo_model
from operators.minicpmv.family import FAMILIES
from operators.minicpmv.slicing import SliceConfig
from pipeline import run
from pipeline.accounting import account
from pipeline.commits import COMMITS
from pipeline.ledger import Ledger
from pipeline.plan import PlanReader, as_units, count_owed, owed_units, unit_keys, write_plan_part
from pipeline.progress import Silent
from pipeline.publish import publish
from pipeline.runner import status_of
from pipeline.second_look import FirstLooks, other_slicing
from pipeline.sink import WriteRecords, WriteRecordsConfig
from pipeline.spec import make_spec
from pipeline.storage import Storage
from schemas.errors import ConfigError
from tests.pipeline.made_rows import (
    document_unit,
    loop_failure,
    records_of,
    records_table,
    source,
    sources_table,
    units_table,
)
from tests.pipeline.run_tables import UNLIKE, assert_equal_runs

ROOT = Path(__file__).parents[2]
HINDI = ROOT / "jobs" / "samples" / "documents" / "hindi.pdf"

OPTIONS = {"task": "ocr", "model": "demo", "local": True, "max_new_tokens": 20}
"""So few tokens that the demo model ends its answer to some pictures, and to others not."""


def draw_letter(path, size_pt, dpi=100):
    document = pymupdf.open()
    page = document.new_page(width=300, height=120)
    page.insert_textbox((10, 10, 290, 110), "Pack my box with five dozen liquor jugs. ", fontsize=size_pt)
    page.get_pixmap(dpi=dpi).save(path)


def draw_hindi(path):
    with pymupdf.open(HINDI) as document:
        page = document[0]
        page.get_pixmap(dpi=100, clip=pymupdf.Rect(0, 60, page.rect.width, 210)).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures on which the demo model ends at once, with other pixels, and never; the last no engine can read."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, size_pt in (("at-once", 20), ("with-others", 14), ("never", 12)):
        draw_letter(folder / f"{name}.png", size_pt)
    draw_hindi(folder / "unread.png")
    return folder


def read(output, table):
    return pq.read_table(output / table).to_pylist()


def pages_by_name(output):
    return {Path(row["source_uri"]).stem: row for row in read(output, "pages")}


def errors_by_name(output):
    found = {}
    for row in read(output, "errors"):
        found.setdefault(Path(row["source_uri"]).stem, []).append(row)
    return found


def commits_of(output):
    commits = [json.loads(path.read_text()) for path in (output / COMMITS).glob("*.json")]
    return sorted(commits, key=lambda commit: commit["created_at"])


@pytest.fixture(scope="module")
def quiet(pictures, tmp_path_factory):
    """A run that nothing disturbed, and its summary."""
    output = tmp_path_factory.mktemp("quiet") / "run"
    return output, run(**OPTIONS, inputs=[str(pictures)], output=str(output))


def test_pages_go_down_the_ladder_and_say_where_they_ended(quiet):
    output, summary = quiet
    rows = pages_by_name(output)
    assert {name: (row["status"], row["route"], row["rung"], row["attempt"]) for name, row in rows.items()} == {
        "at-once": ("success", "model", "first", 1),
        "with-others": ("success", "model", "other_pixels", 2),
        "never": ("fallback", "cpu", "cpu", 2),
        "unread": ("failure", "cpu", None, 2),
    }
    shown = {name: row["downsample_mode"] for name, row in rows.items()}
    assert shown == {"at-once": "16x", "with-others": "4x", "never": "4x", "unread": "4x"}
    assert rows["with-others"]["image_tokens"] > 3 * rows["at-once"]["image_tokens"]
    assert "liquor" in rows["never"]["text"]
    assert summary.complete
    assert (summary.computed, summary.statuses) == (4, {"success": 2, "fallback": 1, "failure": 1})


def test_each_failed_attempt_is_a_survived_error(quiet):
    output, _ = quiet
    columns = ("error_code", "attempt", "max_attempts", "recovered")
    found = {
        name: [tuple(row[column] for column in columns) for row in rows]
        for name, rows in errors_by_name(output).items()
    }
    looks = [("length", 1, 4, True), ("length", 2, 4, True)]
    assert found == {"with-others": looks[:1], "never": looks, "unread": [*looks, ("abstained", None, None, False)]}


def test_tokens_of_both_looks_are_counted(quiet):
    output, summary = quiet
    [row] = read(output, "runs")
    assert row["tokens_wasted"] == summary.tokens_wasted == 3 * OPTIONS["max_new_tokens"]
    written = sum(page["output_tokens"] for page in read(output, "pages"))
    assert row["output_tokens"] == summary.output_tokens == written
    assert status_of(str(output)).tokens["tokens_wasted"] == row["tokens_wasted"]


def test_a_settled_run_looks_at_nothing_again(quiet, pictures):
    output, _ = quiet
    before = read(output, "pages")
    again = run(**OPTIONS, inputs=[str(pictures)], output=str(output))
    assert (again.computed, again.resumed, again.complete, again.steps) == (0, 4, True, {})
    assert read(output, "pages") == before


def test_without_a_second_look_the_cpu_engine_reads_in_the_same_flow(pictures, tmp_path):
    output = tmp_path / "run"
    assert run(**OPTIONS, inputs=[str(pictures)], output=str(output), second_look=False).complete
    rows = pages_by_name(output)
    assert {name: row["rung"] for name, row in rows.items()} == {
        "at-once": "first", "with-others": "cpu", "never": "cpu", "unread": None,
    }  # fmt: skip
    assert {row["downsample_mode"] for row in rows.values()} == {"16x"}
    assert [(commit["pass_index"], commit["second_look"]) for commit in commits_of(output)] == [(0, [])]
    assert all("--no-second-look" in row["repro_command"] for row in read(output, "errors"))


class Stopped(BaseException):
    """Stands for a kill: nothing in the product catches it."""


class StopsBetween(Silent):
    """Ends the run when the second look is announced."""

    def note(self, message: str) -> None:
        if message.startswith("shown to the model once more"):
            raise Stopped


def test_a_run_that_ends_between_its_looks_owes_the_second_and_nothing_else(quiet, pictures, tmp_path):
    output = tmp_path / "run"
    options = OPTIONS | {"inputs": [str(pictures)], "output": str(output)}
    with pytest.raises(Stopped):
        run(make_spec(options), StopsBetween())
    [first] = commits_of(output)
    assert len(first["second_look"]) == 3
    accounting = status_of(str(output), verify=True)
    assert (accounting.planned, accounting.committed, accounting.owed, accounting.complete) == (4, 1, 3, False)
    assert accounting.second_looks_owed == 3
    assert accounting.problems == []
    assert ("owed", "3 (3 a second look)") in accounting.table()
    resumed = run(**options)
    assert (resumed.computed, resumed.resumed, resumed.complete) == (3, 1, True)
    assert_equal_runs(output, quiet[0])
    _, second = commits_of(output)
    assert sorted(key for keys in second["records"].values() for key in keys) == sorted(first["second_look"])


def test_what_fails_at_both_looks_is_looked_at_again_only_when_asked(pictures, tmp_path):
    output = tmp_path / "run"
    failing = OPTIONS | {"inputs": [str(pictures / "unread.png")], "output": str(output)}
    first = run(**failing)
    assert (first.statuses, first.complete) == ({"failure": 1}, True)
    before = {name: read(output, name) for name in ("pages", "errors")}
    plain = run(**failing)
    assert (plain.computed, plain.complete) == (0, True)
    again = run(**failing, retry_failed=True)
    assert (again.computed, again.complete) == (1, True)
    assert [commit["pass_index"] for commit in commits_of(output)] == [0, 1, 2, 3]
    for name, rows in before.items():
        assert [likened(row) for row in read(output, name)] == [likened(row) for row in rows]


def likened(row):
    return {name: value for name, value in row.items() if name not in (*UNLIKE, "confidence")}


def test_a_model_with_a_resampler_is_shown_other_slices(tmp_path):
    draw_letter(tmp_path / "large.png", 14, dpi=500)
    options = OPTIONS | {"model": "demo:minicpmv4_5", "max_new_tokens": 2}
    output = tmp_path / "run"
    assert run(**options, inputs=[str(tmp_path / "large.png")], output=str(output)).complete
    [row] = read(output, "pages")
    assert (row["max_slice_nums"], row["downsample_mode"], row["attempt"]) == (6, None, 2)
    assert [commit["pass_index"] for commit in commits_of(output)] == [0, 1]


def repeating_model(folder):
    """A tiny model that mostly repeats itself: its letters are embedded three times as large."""
    folder.mkdir()
    write_demo_model(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.language_model.embed_tokens.weight"][:256] *= 3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_loop_is_tried_again_at_each_look_and_every_attempt_is_accounted_for(pictures, tmp_path):
    options = OPTIONS | {"model": repeating_model(tmp_path / "model"), "max_new_tokens": 600}
    output = tmp_path / "run"
    inputs = [str(pictures / name) for name in ("at-once.png", "with-others.png")]
    assert run(**options, inputs=inputs, output=str(output)).complete
    rows, errors = pages_by_name(output), errors_by_name(output)
    assert max(row["attempt"] for row in rows.values()) > 2, "no attempt of this model went round in circles"
    for name, row in rows.items():
        assert (row["status"], row["rung"]) == ("fallback", "cpu")
        assert [error["attempt"] for error in errors[name]] == list(range(1, row["attempt"] + 1))
        assert all(error["recovered"] for error in errors[name])
    lost = [error for found in errors.values() for error in found if error["component"] == "Generate"]
    assert {error["error_code"] for error in lost} == {"repetition"}
    assert status_of(str(output)).tokens["tokens_wasted"] >= 384 * len(lost)


def test_attempts_and_looks_are_part_of_what_a_run_folder_holds(quiet, pictures):
    output, _ = quiet
    for change, message in (({"attempts": 3}, "attempts 2 now 3"), ({"second_look": False}, "look None now False")):
        with pytest.raises(ConfigError, match=message):
            run(**OPTIONS, inputs=[str(pictures)], output=str(output), **change)


@pytest.mark.parametrize("change", [{"engine": "cpu", "model": None}, {"task": "caption"}, {"text_layer": "only"}])
def test_a_second_look_that_nothing_can_give_is_refused(pictures, tmp_path, change):
    options = OPTIONS | {"inputs": [str(pictures)], "output": str(tmp_path / "run"), "second_look": True}
    with pytest.raises(ConfigError, match="--second-look is for ocr and parse"):
        run(**options | change)


@pytest.mark.parametrize(
    ("member", "first", "other"),
    [
        ("minicpmv4_6", {}, {"downsample_mode": "4x"}),
        ("minicpmv4_7", {"downsample_mode": "4x"}, {"downsample_mode": "16x"}),
        ("minicpm_ocr", {"downsample_mode": "4x"}, {"downsample_mode": "16x"}),
        ("minicpmv4_5", {"query_count": 64}, {"query_count": 64, "max_slices": 6}),
        ("minicpmv2_6", {"query_count": 64, "max_slices": 4}, {"query_count": 64, "max_slices": 9}),
    ],
)
def test_what_other_pixels_are_follows_from_the_connector(member, first, other):
    assert other_slicing(SliceConfig(**first), FAMILIES[member]) == SliceConfig(**other)


UNITS = [document_unit(0, [1, 2, 3]), document_unit(1, [4])]
KEYS = [key for unit in UNITS for key in unit["record_keys"]]


@pytest.fixture
def storage(tmp_path):
    """A plan of four pages, of which the second and the last wait for a second look."""
    storage = Storage(str(tmp_path / "run"))
    write_plan_part(storage, units_table(UNITS), sources_table([source(index) for index in range(2)]), "s")
    waiting = {"status": "repetition", "error": loop_failure(), "needs_second_look": True, "rung": "first"}
    rows = [row for unit in UNITS for row in records_of(unit)]
    write(storage, [rows[0], rows[1] | waiting, rows[2], rows[3] | waiting])
    return storage


def write(storage, rows, pass_index=0):
    WriteRecords(WriteRecordsConfig(run_uri=storage.uri, run_id="r", pass_index=pass_index))(records_table(rows))


def test_a_record_that_waits_is_owed_and_not_done(storage):
    committed = Ledger(storage).committed_records()
    assert committed.owed(KEYS).tolist() == [False, True, False, True]
    assert committed.wait_for_second_look([*KEYS, "unknown"]).tolist() == [False, True, False, True, False]
    assert [part is None for part in committed.parts_of(KEYS)] == [False, True, False, True]
    assert [part is None for part in committed.first_look_parts_of([*KEYS, "unknown"])] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert (len(committed), committed.second_look_count(), committed.retryable_count()) == (2, 2, 0)
    assert (committed.status_of(KEYS[1]), committed.part_of(KEYS[1]), KEYS[1] in committed) == (None, None, False)
    assert committed.status_counts() == {"success": 2}


def test_each_look_gets_its_own_units_and_all_of_them_are_owed(storage):
    committed = Ledger(storage).committed_records()
    assert list(owed_units(PlanReader(storage), committed)) == []
    [second] = owed_units(PlanReader(storage), committed, second_look=True)
    assert unit_keys(second) == [KEYS[1], KEYS[3]]
    assert second["page_numbers"].to_pylist() == [[2], [4]]
    assert count_owed(PlanReader(storage), committed) == 2


def test_a_second_look_remembers_what_the_first_failed_on(storage):
    committed = Ledger(storage).committed_records()
    [second] = owed_units(PlanReader(storage), committed, second_look=True)
    looks = FirstLooks(storage, committed)
    assert looks.failures(unit_keys(second)) == {}
    of_model = loop_failure() | {"component": "ParseCompletions", "attempt": 2}
    rows = records_of(UNITS[1], status="repetition", error=of_model, recovered=[loop_failure()], needs_second_look=True)
    write(storage, rows, pass_index=1)
    committed = Ledger(storage).committed_records()
    failures = FirstLooks(storage, committed).failures(KEYS)
    assert failures == {KEYS[3]: [of_model]}
    units = as_units(second, survived=failures).to_pylist()
    assert [unit["survived"] for unit in units] == [[None], [[of_model]]]


def test_a_row_that_waits_is_not_published(storage):
    manifest = publish(storage, "r")
    assert manifest.owed_records == 2
    result = account(storage, check_parts=True)
    assert (result.owed, result.second_looks_owed, result.published_rows, result.problems) == (2, 2, 2, [])
    assert result.statuses == Counter(success=2)
    assert result.error_rows == 0


def test_the_rows_of_a_later_pass_settle_it_whatever_they_say(storage):
    failed = {"status": "repetition", "error": loop_failure(), "recovered": [loop_failure()]}
    write(storage, [records_of(UNITS[0])[1] | failed, *records_of(UNITS[1])], pass_index=1)
    publish(storage, "r")
    result = account(storage, check_parts=True)
    assert result.complete
    assert result.statuses == Counter(success=3, repetition=1)
    assert (result.second_looks_owed, result.error_rows) == (0, 2)


@pytest.mark.ray
def test_a_run_on_ray_that_is_killed_at_its_second_look_resumes_to_the_tables_of_a_quiet_run(quiet, pictures, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "jobs", "ocr", str(pictures), "-o", str(output), "--model", "demo", "--quiet"]
    command += ["--max-new-tokens", "20", "--object-store-mb", "300"]
    options = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **options
    )
    deadline = time.monotonic() + 200
    while not (output / COMMITS).exists() or not any(commit["second_look"] for commit in commits_of(output)):
        assert process.poll() is None, "the run ended before its second look"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    killed_calls = {commit["run_id"] for commit in commits_of(output)}
    before = status_of(str(output))
    assert before.second_looks_owed > 0
    assert not before.complete
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_equal_runs(output, quiet[0])
    assert status_of(str(output), verify=True).complete
    commits = commits_of(output)
    settled = [key for c in commits for keys in c["records"].values() for key in keys if key not in c["second_look"]]
    assert len(settled) == len(set(settled)) == 4, "a page was settled twice"
    assert {commit["run_id"] for commit in commits} > killed_calls
