"""Commands on S3 as a user gives them: with Ray, twice at once, with secrets in environment and addresses."""

import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from tests.s3.conftest import SECRET_KEY, SESSION_TOKEN
from tests.s3.s3_runs import QUICK_FAULTS, ROOT, assert_same, fetched, pagereel, pdf_of, uploaded


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
    manifest.write_text(f"{bucket.url}/in/none.pdf\n{signed}/none.pdf?{signature}\n")
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
