"""Whole runs from S3 to S3 while answers break: the tables are those of a local run."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pymupdf
import pytest

from pipeline import run
from tests.pipeline.run_tables import TABLES, assert_equal_runs
from tests.s3.conftest import SECRET_KEY, SESSION_TOKEN
from tests.s3.faulty_proxy import FAULTS

ROOT = Path(__file__).parents[2]
CPU = {"task": "ocr", "engine": "cpu", "local": True}
QUICK_FAULTS = tuple(name for name in FAULTS if name != "hang")


def pdf_of(pages, text="A page of text, long enough to be trusted as the text layer of a page. ") -> bytes:
    document = pymupdf.open()
    for number in range(pages):
        page = document.new_page()
        page.insert_textbox((50, 50, 550, 700), f"Page {number}. " + text * 8)
    return document.tobytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three documents, one of them damaged, in a folder."""
    folder = tmp_path_factory.mktemp("in")
    (folder / "a b+c%41.pdf").write_bytes(pdf_of(12))
    (folder / "ünï.pdf").write_bytes(pdf_of(2, "Other words that are as trustworthy as the first. "))
    (folder / "bad.pdf").write_bytes(pdf_of(3)[:200])
    return folder


@pytest.fixture(scope="module")
def local_run(files, tmp_path_factory):
    target = tmp_path_factory.mktemp("local") / "run"
    run(inputs=[str(files)], output=str(target), **CPU)
    return target


def pagereel(*arguments, environment=None, status=0):
    command = [sys.executable, "-m", "jobs", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == status, done.stderr[-3000:] + done.stdout[-2000:]
    return done.stdout + done.stderr


def fetched(bucket, prefix, target):
    """Copy a run from the bucket to a folder, past the proxy."""
    for key in bucket.direct.find(f"{bucket.name}/{prefix}"):
        path = target / key.partition(f"/{prefix}/")[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bucket.direct.cat_file(key))
    return target


def without_places(run, places, target):
    """Write the tables of a run anew, with each of `places` left out of every text."""

    def plain(value):
        if isinstance(value, str):
            for place in places:
                value = value.replace(place, "")
        elif isinstance(value, dict):
            value = {name: plain(item) for name, item in value.items()}
        elif isinstance(value, list):
            value = [plain(item) for item in value]
        return value

    for name in TABLES:
        table = pq.read_table(run / name)
        (target / name).mkdir(parents=True)
        rows = [plain(row) for row in table.to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), target / name / "0.parquet")
    return target


def assert_same(bucket, prefix, local_run, files, tmp_path):
    mine = fetched(bucket, prefix, tmp_path / "fetched")
    places = [f"{bucket.url}/in/", f"{files}/"]
    assert_equal_runs(
        without_places(mine, places, tmp_path / "mine"), without_places(local_run, places, tmp_path / "theirs")
    )


def uploaded(bucket, files):
    for path in files.iterdir():
        bucket.put(f"in/{path.name}", path.read_bytes())


def test_a_run_on_s3_under_faults_gives_the_tables_of_a_local_run(bucket, proxy, files, local_run, tmp_path):
    uploaded(bucket, files)
    proxy.seed, proxy.rate, proxy.faults = 3, 0.15, QUICK_FAULTS
    summary = run(inputs=[f"{bucket.url}/in/*.pdf"], output=f"{bucket.url}/run", **CPU)
    assert (summary.complete, summary.pages, summary.failed_sources) == (True, 14, 1)
    assert sum(proxy.broken.values()) >= 10
    assert_same(bucket, "run", local_run, files, tmp_path)
    again = run(inputs=[f"{bucket.url}/in/*.pdf"], output=f"{bucket.url}/run", **CPU)
    assert (again.complete, again.computed, again.resumed) == (True, 0, 14)


def test_a_model_reads_from_s3_under_faults_as_it_reads_from_a_disk(bucket, proxy, tmp_path):
    files = tmp_path / "in"
    files.mkdir()
    (files / "a.pdf").write_bytes(pdf_of(2))
    uploaded(bucket, files)
    options = {"task": "ocr", "local": True, "model": "demo", "text_layer": "ignore", "max_new_tokens": 8}
    run(inputs=[str(files)], output=str(tmp_path / "run"), **options)
    proxy.seed, proxy.rate, proxy.faults = 4, 0.15, QUICK_FAULTS
    run(inputs=[f"{bucket.url}/in/"], output=f"{bucket.url}/run", **options)
    assert sum(proxy.broken.values()) >= 5
    assert_same(bucket, "run", tmp_path / "run", files, tmp_path)


@pytest.mark.ray
def test_workers_of_a_cluster_read_and_write_s3_under_faults(bucket, proxy, files, local_run, tmp_path):
    uploaded(bucket, files)
    proxy.seed, proxy.rate, proxy.faults = 6, 0.1, QUICK_FAULTS
    options = ("-o", f"{bucket.url}/run", "--engine", "cpu", "--workers", 1)
    pagereel("ocr", f"{bucket.url}/in/", *options, environment=bucket.environment)
    assert sum(proxy.broken.values()) >= 5
    assert_same(bucket, "run", local_run, files, tmp_path)


def test_two_drivers_on_one_run_end_in_one_result(bucket, files, local_run, tmp_path):
    uploaded(bucket, files)
    command = [sys.executable, "-m", "jobs", "ocr", f"{bucket.url}/in/", "-o", f"{bucket.url}/run", "--local"]
    drivers = [
        subprocess.Popen([*command, "--engine", "cpu"], cwd=ROOT, env=bucket.environment, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    ended = sorted((driver.communicate(timeout=280)[1], driver.returncode) for driver in drivers)
    statuses = sorted(status for _, status in ended)
    assert statuses in ([0, 0], [0, 2]), ended
    assert_same(bucket, "run", local_run, files, tmp_path)


def test_nothing_that_a_run_writes_or_says_holds_a_credential(bucket, proxy, s3_server, tmp_path):
    bucket.put("in/a.pdf", pdf_of(1))
    bucket.put("web/w.pdf", pdf_of(1))
    host = s3_server.removeprefix("http://")
    signed = f"http://web-user:web-password@{host}/{bucket.name}/web"
    signature = "X-Amz-Signature=0123456789abcdefSIGNED&X-Amz-Security-Token=PRESIGNED-TOKEN&X-Amz-Expires=60"
    # The server refuses the last: a key that is not there, in a URL full of secrets.
    inputs = [f"{bucket.url}/in/", f"{signed}/w.pdf?{signature}"]
    manifest = tmp_path / "list.txt"
    manifest.write_text(
        f"{bucket.url}/in/none.pdf\n{signed}/none.pdf?{signature}\nhttp://web-user:web-password@127.0.0.1:1/x\n"
    )
    proxy.seed, proxy.rate, proxy.faults = 9, 0.1, QUICK_FAULTS
    options = ("-o", f"{bucket.url}/run", "--local", "--engine", "cpu")
    said = pagereel("ocr", *inputs, manifest, *options, environment=bucket.environment)
    proxy.fail("*", "run2", "forbidden", times=1000)
    said += pagereel("ocr", *inputs, "-o", f"{bucket.url}/run2", "--local", environment=bucket.environment, status=2)
    written = [said.encode()]
    for path in fetched(bucket, "run", tmp_path / "fetched").rglob("*"):
        if path.is_file():
            written.append(path.read_bytes())
            if path.suffix == ".parquet":
                written.append(repr(pq.read_table(path).to_pylist()).encode())
    assert len(written) > 10
    for secret in (SECRET_KEY, SESSION_TOKEN, "web-password", "0123456789abcdefSIGNED", "PRESIGNED-TOKEN"):
        assert [part for part in written if secret.encode() in part] == [], secret
