"""Kills: the driver dies at a random moment, the same command runs again, and the tables are those of a quiet run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pymupdf
import pytest
from run_tables import assert_equal_runs

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "jobs" / "samples"
KILLS = 3
"""Kills in a run over hundreds of pages; `tests.chaos` kills smaller ones, at more kinds of moments."""

PAGES, DOCUMENTS = 60, 4
RUN_SECONDS = 240


def environment() -> dict[str, str]:
    return os.environ | {"RAY_DEDUP_LOGS": "0", "PYTHONPATH": str(ROOT)}


def start(inputs: Path, output: Path) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "jobs", "ocr", str(inputs), str(SAMPLES / "videos"), "-o", str(output)]
    arguments += ["--model", "demo", "--object-store-mb", "300", "--quiet", "--pages", "1-60"]
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(inputs: Path, output: Path) -> float:
    began = time.monotonic()
    process = start(inputs, output)
    _, errors = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, errors.decode()[-2000:]
    return time.monotonic() - began


def committed_by_call(output: Path) -> dict[str, set[str]]:
    calls: dict[str, set[str]] = {}
    for path in (output / "ledger" / "commits").glob("*.json"):
        commit = json.loads(path.read_text())
        calls.setdefault(commit["run_id"], set()).update(key for keys in commit["records"].values() for key in keys)
    return calls


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for index in range(DOCUMENTS):
        document = pymupdf.open()
        for number in range(PAGES):
            page = document.new_page()
            words = f"Document {index}, page {number + 1}. " + "Pack my box with five dozen liquor jugs. " * 15
            page.insert_textbox((50, 50, 540, 780), words)
        document.save(folder / f"{index}.pdf")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7\n" + b"no pages here " * 20)
    (folder / "scan.pdf").write_bytes((SAMPLES / "documents" / "scan.pdf").read_bytes())
    return folder


@pytest.fixture(scope="module")
def quiet_run(inputs, tmp_path_factory) -> tuple[Path, float]:
    output = tmp_path_factory.mktemp("quiet") / "run"
    return output, finish(inputs, output)


@pytest.mark.chaos
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("attempt", range(KILLS))
def test_a_killed_run_resumes_to_the_tables_of_a_quiet_run(inputs, quiet_run, tmp_path, attempt):
    expected, quiet_seconds = quiet_run
    output = tmp_path / "run"
    moment = random.Random(attempt).uniform(0.5, quiet_seconds)
    process = start(inputs, output)
    time.sleep(moment)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    before = {key for keys in committed_by_call(output).values() for key in keys}
    killed_calls = set(committed_by_call(output))
    finish(inputs, output)
    assert_equal_runs(output, expected, f" after a kill at {moment:.2f} s")
    after = committed_by_call(output)
    again = {key for call, keys in after.items() if call not in killed_calls for key in keys} & before
    assert not again, f"{len(again)} committed records were computed again after a kill at {moment:.2f} s"
    status = subprocess.run(
        [sys.executable, "-m", "jobs", "status", str(output), "--verify", "--json"],
        cwd=ROOT, env=environment(), capture_output=True, check=False,
    )  # fmt: skip
    assert status.returncode == 0, status.stdout.decode()


@pytest.mark.ray
def test_a_second_driver_on_a_run_is_refused(inputs, tmp_path):
    output = tmp_path / "run"
    first = start(inputs, output)
    try:
        deadline = time.monotonic() + 60
        while not list((output / "ledger").glob("leases/*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        second = start(inputs, output)
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 2
        assert b"is being worked on by process" in errors
        assert len(errors.decode().strip().splitlines()) == 1
        first.communicate(timeout=RUN_SECONDS)
        assert first.returncode == 0
    finally:
        first.kill()
        first.communicate()
