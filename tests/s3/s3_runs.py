"""Runs on S3 as the tests of this folder make and compare them."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pymupdf

from tests.pipeline.run_tables import TABLES, assert_equal_runs
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
        without_places(mine, places, tmp_path / "mine"),
        without_places(local_run, places, tmp_path / "theirs"),
        # That of a source which cannot be opened stands for its address.
        unlike=("error_id",),
    )


def uploaded(bucket, files):
    for path in files.iterdir():
        bucket.put(f"in/{path.name}", path.read_bytes())
