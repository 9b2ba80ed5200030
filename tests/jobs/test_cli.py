"""The command line as a user meets it: messages, exit statuses, JSON."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pymupdf
import pytest

from jobs.options import ARGUMENT_FIELDS, GROUPS
from jobs.spec import load_spec
from operators.minicpmv.tiny import write_tiny_model
from pipeline.spec import RunSpec
from schemas.errors import ConfigError

ROOT = Path(__file__).parents[2]
SPECS = sorted((ROOT / "jobs" / "specs").glob("*.yaml"))


def pagereel(*arguments: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs", *map(str, arguments)],
        cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"} | variables,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


@pytest.fixture
def document(tmp_path: Path) -> Path:
    made = pymupdf.open()
    for number in range(3):
        made.new_page().insert_text((72, 72), f"Page {number + 1} has words enough to be trusted as a text layer.")
    path = tmp_path / "in" / "three.pdf"
    path.parent.mkdir()
    made.save(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frob"], "No such command"),
        (["ocr"], "Missing argument"),
        (["ocr", "x.pdf"], "Missing option"),
        (["ocr", "x.pdf", "-o", "OUT", "--nope"], "No such option"),
        (["ocr", "x.pdf", "-o", "OUT", "--fps", "fast"], "--fps"),
        (["ocr", "x.pdf", "-o", "OUT", "--fps", "99"], "fps: Input should be less than or equal to 30"),
        (["ocr", "x.pdf", "-o", "OUT", "--engine", "vllm"], "--engine"),
        (["ocr", "x.pdf", "-o", "OUT", "--packing", "7"], "--packing"),
        (
            ["ocr", "IN", "-o", "OUT", "--model", "demo", "--packing", "4"],
            "MiniCPM-V 4.6 has no --packing: it sees clips",
        ),
        (["ocr", "/no/such/file.pdf", "-o", "OUT"], "does not exist"),
        (["ocr", "IN", "-o", "/proc/none"], "not writable"),
        (["ocr", "IN", "-o", "OUT", "--model", "/no/such/folder"], "neither a folder nor a hub id"),
        (["ocr", "IN", "-o", "OUT", "--device", "cuda"], "no GPU is here"),
        (["caption", "IN", "-o", "OUT"], "captions need a model"),
        (["run", "/no/such/spec.yaml"], "cannot be read"),
        (["status", "/no/such/run"], "is no run folder"),
    ],
)
def test_a_wrong_command_is_one_line_and_status_2(tmp_path, document, arguments, message):
    given = [str(document) if a == "IN" else str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    done = pagereel(*given, CUDA_VISIBLE_DEVICES="")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("pagereel: ocr with")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1
    assert lines[0].startswith("pagereel: ")
    assert message in lines[0]


@pytest.mark.parametrize("option", [["--thinking"], ["--stack-frames", "3"], ["--downsample", "4x"]], ids=" ".join)
def test_runs_and_plans_refuse_what_their_model_does_not_have(tmp_path, document, option):
    (tmp_path / "model").mkdir()
    write_tiny_model(tmp_path / "model", "minicpmv2_6")
    for command in (["ocr", document, "-o", tmp_path / "out"], ["plan", document]):
        done = pagereel(*command, "--model", tmp_path / "model", *option)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(f"pagereel: MiniCPM-V 2.6 has no {option[0]}: ")
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_run_prints_the_accounting_and_where_the_tables_are(tmp_path, document):
    done = pagereel("ocr", document.parent, "-o", tmp_path / "out", "--local")
    assert done.returncode == 0, done.stderr
    assert "accounted for: 3 pages and segments planned = 3 rows" in done.stdout
    assert f"{tmp_path / 'out'}/" in done.stdout
    assert "CPU engine" in done.stderr.splitlines()[0]


def test_json_output_is_one_object_a_line_and_ends_with_the_summary(tmp_path, document):
    done = pagereel("ocr", document, "-o", tmp_path / "out", "--local", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["event"] == "summary"
    assert events[-1]["statuses"] == {"success": 3}
    assert {event["event"] for event in events} == {"note", "progress", "summary"}


def test_status_and_plan_speak_json_too(tmp_path, document):
    pagereel("ocr", document, "-o", tmp_path / "out", "--local", "--quiet")
    status = pagereel("status", tmp_path / "out", "--verify", "--json")
    assert status.returncode == 0
    assert json.loads(status.stdout)["complete"] is True
    plan = pagereel("plan", document, "--task", "parse", "--json")
    assert json.loads(plan.stdout)["records"] == 3


def test_an_incomplete_run_has_status_3(tmp_path, document):
    pagereel("ocr", document, "-o", tmp_path / "out", "--local", "--quiet")
    for commit in (tmp_path / "out" / "ledger" / "commits").glob("*.json"):
        commit.unlink()
    assert pagereel("status", tmp_path / "out").returncode == 3
    assert pagereel("ocr", document, "-o", tmp_path / "out", "--local", "--quiet").returncode == 0
    assert pagereel("status", tmp_path / "out").returncode == 0


def test_an_error_rate_above_the_one_allowed_is_status_4_only_when_asked(tmp_path, document):
    (document.parent / "broken.pdf").write_bytes(b"%PDF-1.7 and no more")
    loose = pagereel("ocr", document.parent, "-o", tmp_path / "loose", "--local", "--quiet")
    strict = pagereel("ocr", document.parent, "-o", tmp_path / "strict", "--local", "--quiet", "--max-error-rate", 0.1)
    assert (loose.returncode, strict.returncode) == (0, 4)


def test_a_run_that_is_told_to_end_says_so_and_resumes(tmp_path):
    made = pymupdf.open()
    for number in range(400):
        made.new_page().insert_text((72, 72), f"Page {number + 1} has words enough to be trusted as a text layer.")
    made.save(tmp_path / "long.pdf")
    command = [sys.executable, "-m", "jobs", "ocr", str(tmp_path / "long.pdf"), "-o", str(tmp_path / "out"), "--local"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    commits = tmp_path / "out" / "ledger" / "commits"
    deadline = time.monotonic() + 100
    while not list(commits.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert errors.strip().splitlines()[-1] == "pagereel: interrupted; the same command resumes"
    done = pagereel("ocr", tmp_path / "long.pdf", "-o", tmp_path / "out", "--local", "--json")
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["complete"]
    assert summary["resumed"] > 0
    assert summary["resumed"] + summary["computed"] == 400


def test_help_names_every_option_of_the_spec():
    done = pagereel("ocr", "--help", COLUMNS="200")
    for name in RunSpec.model_fields:
        if name not in ARGUMENT_FIELDS:
            assert f"--{name.replace('_', '-')}" in done.stdout, name


def test_every_option_stands_in_one_group():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(set(RunSpec.model_fields) - set(ARGUMENT_FIELDS))


def test_doctor_reports_versions_and_ends_with_0():
    done = pagereel("doctor", "--json")
    report = json.loads(done.stdout)
    names = {check["name"]: check["state"] for check in report["checks"]}
    assert done.returncode == 0, done.stdout
    assert names["pymupdf"] == "ok"
    assert names["PyMuPDF works"] == "ok"


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_the_example_job_files_load(path):
    spec = load_spec(str(path))
    assert spec.output


def test_a_job_file_runs(tmp_path, document):
    job = tmp_path / "job.yaml"
    job.write_text(f"task: ocr\ninputs: {document}\noutput: {tmp_path / 'out'}\nlocal: true\n")
    done = pagereel("run", job)
    assert done.returncode == 0, done.stderr
    assert "= 3 rows" in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: ocr\n", "inputs: Field required"),
        ("task: dance\ninputs: [a]\noutput: b\n", "task: Input should be"),
        ("task: ocr\ninputs: [a]\noutput: b\npasword: x\n", "pasword: Extra inputs"),
        ("task: ocr\ninputs: [a]\noutput: b\npassword: x\n", "holds no password"),
        ("- a\n- b\n", "no mapping"),
        ("task: [unclosed\n", "is no YAML"),
    ],
)
def test_a_wrong_job_file_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_spec(str(path))
    assert "\n" not in str(caught.value)
