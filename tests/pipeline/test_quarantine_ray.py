"""Records that end their worker, on a real Ray, with the real operators; each in a process with a limit of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pymupdf
import pytest

from pipeline.strikes import MOST_DEATHS, STRIKES
from tests.pipeline.run_tables import UNLIKE

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ray

OPTIONS = {"task": "caption", "model": "demo", "max_new_tokens": 3, "object_store_mb": 300}
READ = {"task": "ocr", "engine": "cpu", "object_store_mb": 300}


def draw_page(document, number, *, poison):
    page = document.new_page(width=200, height=60)
    if poison:
        page.draw_rect(page.rect, color=(1, 0, 1), fill=(1, 0, 1))
    page.insert_textbox((10, 10, 190, 50), f"Page {number} of {7 * number + 100}", fontsize=15)
    return page


def draw_pictures(folder, count, poison):
    folder.mkdir()
    for number in range(count):
        with pymupdf.open() as document:
            page = draw_page(document, number, poison=number in poison)
            page.get_pixmap(dpi=100).save(folder / f"{number:03d}.png")
    return folder


def draw_scan(path, numbers, poison):
    with pymupdf.open() as scan, pymupdf.open() as drawn:
        for number in numbers:
            picture = draw_page(drawn, number, poison=number in poison).get_pixmap(dpi=150).tobytes("png")
            page = scan.new_page(width=200, height=60)
            page.insert_image(page.rect, stream=picture)
        scan.save(path)


class Runs:
    """Runs of one test, each in a process of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.deaths_file = folder / "deaths"

    def run(self, name, inputs, options, timeout_seconds=280, **asked):
        full = {**options, "inputs": [str(inputs)], "output": str(self.folder / name)}
        order = {"options": full, "deaths": str(self.deaths_file), **asked}
        done = subprocess.run(
            [sys.executable, "-m", "tests.pipeline.poisoned_run", json.dumps(order)],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=timeout_seconds, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    def table(self, name, table):
        return pq.read_table(self.folder / name / table)

    def died(self):
        return self.deaths_file.read_text().split() if self.deaths_file.exists() else []

    def quarantined(self, name):
        return [row for row in self.table(name, "errors").to_pylist() if row["quarantined"]]

    def assert_equal_but_for(self, names, found, wanted):
        """Compare the pages of two runs without those of the files called `names`."""
        tables = []
        for name in (found, wanted):
            pages = self.table(name, "pages")
            spared = pc.invert(pc.match_substring_regex(pages["source_uri"], "|".join(names)))
            columns = [column for column in pages.column_names if column not in (*UNLIKE, "confidence")]
            tables.append(pages.filter(spared).select(columns))
        assert tables[0].num_rows > 0
        assert tables[0].equals(tables[1]), differing(*tables)


def differing(found: pa.Table, wanted: pa.Table):
    if found.num_rows != wanted.num_rows:
        return f"{found.num_rows} rows, wanted {wanted.num_rows}"
    return [name for name in found.column_names if not found[name].equals(wanted[name])]


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def test_a_record_that_kills_is_quarantined_after_three_deaths_and_the_63_with_it_are_as_without_it(runs, tmp_path):
    inputs = draw_pictures(tmp_path / "in", 64, poison={37})
    told = runs.run("run", inputs, OPTIONS, poisoned={"Generate": "SIGSEGV"}, batch_rows={"Generate": 64})
    assert sum(told["statuses"].values()) == 64
    assert runs.died() == ["SIGSEGV"] * MOST_DEATHS
    [error] = runs.quarantined("run")
    assert Path(error["source_uri"]).name == "037.png"
    known = {
        name: error[name] for name in ("error_code", "stage", "batch_size", "bisect_depth", "attempt", "recovered")
    }
    assert known == {
        "error_code": "worker_died", "stage": "generate", "batch_size": 64, "bisect_depth": 2, "attempt": 3,
        "recovered": False,
    }  # fmt: skip
    assert error["exit_signal"] == signal.SIGSEGV
    assert error["retryable"] is False
    assert all(error[name] for name in ("batch_id", "node_id", "actor_id"))
    assert error["repro_command"].startswith("pagereel caption ")
    assert error["repro_command"].count("\n") == 0
    assert len(list((tmp_path / "run" / STRIKES).iterdir())) == MOST_DEATHS

    runs.run("without", inputs, OPTIONS | {"local": True})
    runs.assert_equal_but_for(["037.png"], "run", "without")


@pytest.mark.chaos
def test_three_records_that_kill_in_one_batch(runs, tmp_path):
    inputs = draw_pictures(tmp_path / "in", 64, poison={5, 37, 38})
    runs.run("run", inputs, OPTIONS, 900, poisoned={"Generate": "SIGKILL"}, batch_rows={"Generate": 64})
    assert len(runs.died()) <= 1 + 3 * 2
    assert sorted(Path(row["source_uri"]).name for row in runs.quarantined("run")) == ["005.png", "037.png", "038.png"]
    assert {row["retryable"] for row in runs.quarantined("run")} == {True}
    runs.run("without", inputs, OPTIONS | {"local": True})
    runs.assert_equal_but_for(["005.png", "037.png", "038.png"], "run", "without")


@pytest.mark.chaos
def test_a_record_that_costs_the_device_is_quarantined_with_what_the_worker_said(runs, tmp_path):
    inputs = draw_pictures(tmp_path / "in", 16, poison={3})
    runs.run("run", inputs, OPTIONS, 600, poisoned={"Generate": "lost"}, batch_rows={"Generate": 16})
    assert runs.died() == ["lost"] * MOST_DEATHS
    [error] = runs.quarantined("run")
    assert error["exit_signal"] is None
    assert "the device failed: an illegal address" in error["message"]


@pytest.mark.chaos
def test_a_page_that_kills_the_cpu_engine(runs, tmp_path):
    inputs = draw_pictures(tmp_path / "in", 16, poison={3})
    runs.run("run", inputs, READ, 600, poisoned={"ReadPages": "SIGSEGV"})
    assert runs.died() == ["SIGSEGV"] * MOST_DEATHS
    [error] = runs.quarantined("run")
    assert (Path(error["source_uri"]).name, error["component"]) == ("003.png", "ReadPages")
    runs.run("without", inputs, READ | {"local": True})
    runs.assert_equal_but_for(["003.png"], "run", "without")


@pytest.mark.chaos
def test_a_page_that_kills_the_worker_that_decodes_costs_its_unit_nothing_else(runs, tmp_path):
    inputs = tmp_path / "in"
    inputs.mkdir()
    draw_scan(inputs / "bad.pdf", range(7), poison={3})
    draw_scan(inputs / "good.pdf", range(10, 13), poison=set())
    runs.run("run", inputs, READ, 600, poisoned={"DecodeDocuments": "SIGSEGV"})
    assert runs.died() == ["SIGSEGV"] * MOST_DEATHS
    [error] = runs.quarantined("run")
    assert (error["page_number"], error["stage"], error["batch_size"]) == (4, "render", 7)
    pages = runs.table("run", "pages").to_pylist()
    assert sum(row["status"] == "failure" for row in pages) == 1
    runs.run("without", inputs, READ | {"local": True})
    runs.assert_equal_but_for(["bad.pdf"], "run", "without")


@pytest.mark.chaos
def test_a_model_that_kills_its_worker_on_every_record_stops_the_run_and_quarantines_nobody(runs, tmp_path):
    inputs = draw_pictures(tmp_path / "in", 24, poison=set())
    told = runs.run("run", inputs, OPTIONS, 900, poisoned={"Generate": "any"}, batch_rows={"Generate": 12})
    assert told["error"] == "WorkersBrokenError", told
    assert "the worker of Generate" in told["message"]
    assert "3 different records" in told["message"]
    assert not (tmp_path / "run" / "ledger" / "commits").exists()
    # It is mended, and the same command goes on.
    told = runs.run("run", inputs, OPTIONS, 600, batch_rows={"Generate": 12})
    assert sum(told["statuses"].values()) == 24
    assert runs.quarantined("run") == []


@pytest.mark.chaos
def test_a_worker_that_dies_while_it_is_built_stops_the_run_with_one_line(runs, tmp_path):
    inputs = draw_pictures(tmp_path / "in", 2, poison=set())
    told = runs.run("run", inputs, OPTIONS, 600, poisoned={"Generate": "built"})
    assert told["error"] == "WorkersBrokenError", told
    assert "while it was built" in told["message"]
    assert len(runs.died()) == 3


@pytest.mark.chaos
def test_a_model_that_fails_on_its_first_small_request_stops_the_run_with_one_line(runs, tmp_path):
    inputs = draw_pictures(tmp_path / "in", 2, poison=set())
    told = runs.run("run", inputs, OPTIONS, 600, poisoned={"Generate": "unfit"})
    assert told["error"] == "WorkersBrokenError", told
    assert told["message"] == "the model fails on a small request"
    assert len(runs.died()) == 1


@pytest.mark.chaos
def test_workers_killed_from_outside_at_random_times_cost_no_row(runs, tmp_path):
    inputs = draw_pictures(tmp_path / "in", 64, poison=set())
    runs.run("run", inputs, OPTIONS, 900, kills={"seed": 7, "count": 5}, batch_rows={"Generate": 16})
    # Three kills in a row may hit one record; its failure may pass, so that the same command tries it once more.
    runs.run("run", inputs, OPTIONS, 600)
    assert len(runs.died()) == 5
    assert runs.quarantined("run") == []
    runs.run("without", inputs, OPTIONS | {"local": True})
    runs.assert_equal_but_for(["none of them"], "run", "without")


@pytest.mark.chaos
def test_a_plain_loop_that_a_page_ends_is_through_at_its_fourth_call(runs, tmp_path):
    inputs = draw_pictures(tmp_path / "in", 12, poison={3})
    options = OPTIONS | {"local": True, "object_store_mb": None}
    for _ in range(MOST_DEATHS):
        with pytest.raises(AssertionError):
            runs.run("run", inputs, options, poisoned={"Generate": "SIGSEGV"})
    runs.run("run", inputs, options, poisoned={"Generate": "SIGSEGV"})
    assert runs.died() == ["SIGSEGV"] * MOST_DEATHS
    [error] = runs.quarantined("run")
    assert Path(error["source_uri"]).name == "003.png"
    runs.run("without", inputs, options)
    runs.assert_equal_but_for(["003.png"], "run", "without")
    # What it died of is mended, and somebody asks for it.
    runs.run("run", inputs, options | {"retry_failed": True})
    assert runs.quarantined("run") == []
    found, wanted = (runs.table(name, "pages").sort_by("record_key") for name in ("run", "without"))
    assert found["status"].equals(wanted["status"])
    assert found["raw_output"].equals(wanted["raw_output"])
