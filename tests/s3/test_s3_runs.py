"""Whole runs from S3 to S3 while answers break: the tables are those of a local run."""

from pipeline import run
from tests.s3.s3_runs import CPU, QUICK_FAULTS, assert_same, pdf_of, uploaded


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
