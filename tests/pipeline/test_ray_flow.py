"""The same runs on a real Ray: same rows as the plain loop, no torch in CPU workers, dead workers replaced."""

import os
import subprocess
import sys
from pathlib import Path

import pymupdf
import pytest
from run_tables import assert_equal_runs

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "jobs" / "samples"
pytestmark = pytest.mark.ray


def pagereel(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def test_ray_and_the_plain_loop_write_equal_tables(tmp_path):
    for name, extra in (("ray", ["--object-store-mb", 300]), ("loop", ["--local"])):
        done = pagereel("parse", SAMPLES, "-o", tmp_path / name, "--model", "demo", "--quiet", *extra)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "core_worker" not in done.stderr
    assert_equal_runs(tmp_path / "ray", tmp_path / "loop")


FLOW_PROBE = """
import os, signal, sys
import pyarrow as pa
from operators.base import Operator, OperatorConfig, rows_to_table
from operators.decode.documents import DecodeDocuments
from operators.prepare import PrepareImages
from pipeline import cluster, connect
from pipeline.metrics import Meter
from pipeline.step import Flow, Step
from schemas.source import UNIT

SEEN = pa.schema([pa.field("unit_id", pa.string()), pa.field("pid", pa.int64()), pa.field("has_torch", pa.bool_())])

class Config(OperatorConfig):
    folder: str

class DieOnce(Operator[Config]):
    reads, adds, replaces = UNIT, SEEN, True

    def process(self, table):
        mark = os.path.join(self.config.folder, "died")
        ids = table["unit_id"].to_pylist()
        if "u3" in ids and not os.path.exists(mark):
            open(mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        rows = [{"unit_id": i, "pid": os.getpid(), "has_torch": "torch" in sys.modules} for i in ids]
        return rows_to_table(rows, SEEN)

cluster.start_ray(cluster.Cluster(cpus=2, object_store_bytes=200 * 2**20))
units = [connect.hold(rows_to_table([{"unit_id": f"u{n}"}], UNIT)) for n in range(8)]
flow = Flow(heads={"documents": [Step(DieOnce, Config(folder=sys.argv[1]), rows_per_batch=1)]})
ids, pids, torch = [], set(), set()
for table in connect.run_flow(flow, {"documents": units}, connect.RayMeter()):
    ids += table["unit_id"].to_pylist()
    pids |= set(table["pid"].to_pylist())
    torch |= set(table["has_torch"].to_pylist())
cluster.stop_ray()
print(sorted(ids), len(pids), torch)
"""


def test_a_killed_worker_is_replaced_and_loses_no_row(tmp_path):
    script = tmp_path / "probe.py"
    script.write_text(FLOW_PROBE)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    ids, pid_count, torch = last.rsplit(" ", 2)
    assert ids == str([f"u{n}" for n in range(8)])
    assert int(pid_count) >= 2, "the worker that died was not replaced"
    assert torch == "{False}", "a CPU worker imported torch"


def test_a_run_on_a_machine_with_two_cpus_does_not_wait_for_itself(tmp_path):
    document = pymupdf.open()
    document.new_page().insert_text((72, 72), "A few words that are long enough to be trusted as a text layer here.")
    (tmp_path / "in").mkdir()
    document.save(tmp_path / "in" / "a.pdf")
    done = pagereel(
        "ocr", tmp_path / "in", SAMPLES / "videos", "-o", tmp_path / "run", "--model", "demo", "--object-store-mb", 300
    )
    assert done.returncode == 0, done.stderr
    assert "accounted for" in done.stdout


def test_no_cluster_at_the_address_is_one_line(tmp_path):
    done = pagereel("ocr", SAMPLES / "documents", "-o", tmp_path / "run", "--engine", "cpu", "--address", "127.0.0.1:9")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no Ray cluster answers" in done.stderr


def test_a_run_on_ray_that_is_told_to_end_says_so(tmp_path):
    command = [sys.executable, "-m", "jobs", "parse", str(SAMPLES), "-o", str(tmp_path / "run"), "--model", "demo"]
    process = subprocess.Popen(
        [*command, "--json"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while '"phase": "run"' not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 3, errors
    assert errors.strip().splitlines()[-1] == "pagereel: interrupted; the same command resumes"
