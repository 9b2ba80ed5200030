"""Runs on a cluster of three hosts, submitted as a user does; hosts die, or cannot be reached, in the middle."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pymupdf
import pytest

from tests.cluster.namespaces import Cluster, Node, can_build, must_build, short_folder
from tests.pipeline.run_tables import assert_equal_runs

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "jobs" / "samples"
RUN_SECONDS = 280
# The GPUs of these hosts do not exist, so the model stays off them.
OPTIONS = [
    "--model", "demo", "--device", "cpu", "--text-layer", "ignore", "--max-slices", "1", "--max-pixels", "200000",
    "--max-new-tokens", "16", "--attempts", "1",
]  # fmt: skip

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    missing = can_build()
    if missing and must_build():
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    # The job's `python` is that of this environment, as it would be the image's.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with short_folder() as folder:
        made = Cluster(folder, cpus=(2, 2), gpus=(1, 1), head_cpus=1, dashboard=True, variables={"PATH": path})
        with made:
            yield made


@pytest.fixture
def whole(cluster: Cluster) -> Cluster:
    """The cluster, every host of it alive."""
    cluster.mend()
    return cluster


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("a", "b", "c"):
        document = pymupdf.open()
        for number in range(1, 21):
            words = f"Document {name}, page {number}. " + "Pack my box with five dozen liquor jugs. " * 9
            document.new_page().insert_textbox((50, 50, 540, 780), words)
        document.save(folder / f"{name}.pdf")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7\n" + b"no pages here " * 20)
    return folder


@pytest.fixture(scope="module")
def expected(inputs, tmp_path_factory) -> Path:
    """The run folder of the same command on one machine."""
    output = tmp_path_factory.mktemp("expected") / "run"
    command = [sys.executable, "-m", "jobs", "ocr", str(inputs), "-o", str(output), "--local", "--quiet", *OPTIONS]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return output


def submit(cluster: Cluster, *command: object) -> subprocess.Popen[str]:
    """Submit a command from this machine to the head, with the tree as it is, and follow it."""
    return subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", cluster.dashboard_url,
         "--working-dir", ".", "--", *map(str, command)],
        cwd=ROOT, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(job: subprocess.Popen[str], cluster: Cluster) -> str:
    """Wait for a job to end well, and return what it has said."""
    try:
        output, _ = job.communicate(timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired:
        job.kill()
        output, _ = job.communicate()
        pytest.fail(f"the job did not end: {output[-3000:]}")
    assert job.returncode == 0, f"{output[-3000:]}\n{cluster.driver_logs()}"
    return output


def wait_until(what: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    """Wait until `what` is so; the job has to be at work meanwhile."""
    deadline = time.monotonic() + RUN_SECONDS
    while not what():
        assert job.poll() is None, f"the job ended too early: {job.communicate()[0][-3000:]}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_commits(output: Path) -> bool:
    return any((output / "ledger" / "commits").glob("*.json"))


def busiest(cluster: Cluster) -> Node:
    """Return the host with most workers of a run, the head left out."""

    def workers(node: Node) -> int:
        found = 0
        for pid in node.pids():
            with contextlib.suppress(OSError):
                found += Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::MapWorker")
        return found

    node = max(cluster.nodes[1:], key=workers)
    assert workers(node), "no host but the head is at work"
    return node


def ocr(inputs: Path, output: Path) -> list[object]:
    return ["python", "-m", "jobs", "ocr", inputs, "-o", output, "--address", "auto", "--quiet", *OPTIONS]


@pytest.mark.parametrize("power", [False, True], ids=["its processes", "its power"])
def test_a_host_that_dies_in_mid_run_changes_no_row(whole, inputs, expected, tmp_path, power):
    output = tmp_path / "run"
    job = submit(whole, *ocr(inputs, output))
    wait_until(lambda: has_commits(output), job)
    whole.kill(busiest(whole), power=power)
    finish(job, whole)
    assert_equal_runs(output, expected)
    verify(output)


@pytest.mark.parametrize("seconds", [2, 20], ids=["and is not missed", "and is given up"])
def test_a_host_that_cannot_be_reached_for_a_while_changes_no_row(whole, inputs, expected, tmp_path, seconds):
    output = tmp_path / "run"
    job = submit(whole, *ocr(inputs, output))
    wait_until(lambda: has_commits(output), job)
    node = busiest(whole)
    whole.cut(node)
    time.sleep(seconds)
    whole.heal(node)
    finish(job, whole)
    assert_equal_runs(output, expected)
    verify(output)


def test_a_model_goes_on_at_another_host_when_its_own_dies(whole, tmp_path):
    job = submit(whole, "python", "-m", "tests.cluster.gpu_flow", tmp_path)
    wait_until(lambda: bool(os.listdir(tmp_path)), job)
    time.sleep(2)
    [first] = os.listdir(tmp_path)
    [node] = [node for node in whole.nodes if node.address == first]
    whole.kill(node)
    rows = [line.split(" ", 3)[1:] for line in finish(job, whole).splitlines() if line.startswith("ROW ")]
    assert sorted(unit for unit, _, _ in rows) == [f"u{number:02}" for number in range(40)]
    assert {gpus.strip() for _, _, gpus in rows} == {"['0']"} or {gpus.strip() for _, _, gpus in rows} == {"[0]"}
    others = {host for _, host, _ in rows} - {first}
    assert others, "every row came from the host that died"


def verify(output: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "status", str(output), "--verify"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
