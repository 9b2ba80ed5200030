"""Storage on a local disk, in memory, and on S3 (a moto server)."""

import errno
import os
import pickle
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from operators.retries import RetryPolicy
from pipeline.accounting import account
from pipeline.commits import utc_now
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.plan import owed_units, read_plan, write_plan_part
from pipeline.publish import publish
from pipeline.sink import WriteRecords, WriteRecordsConfig
from pipeline.storage import TEMPORARY_PREFIX, Storage
from schemas.errors import ConfigError, TransientError
from schemas.tables import PAGES
from tests.pipeline.made_rows import (
    document_unit,
    failed_unit,
    records_of,
    records_table,
    source,
    sources_table,
    units_table,
    video_unit,
)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    if find_spec("moto") is None or find_spec("s3fs") is None:
        pytest.skip("moto is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/moto-api/", timeout=1).read()
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    name = uuid.uuid4().hex
    if request.param == "local":
        return Storage(str(tmp_path / "run"))
    if request.param == "memory":
        return Storage(f"memory://{name}/run")
    url = request.getfixturevalue("s3_server")
    for variable, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(variable, value)
    bucket = Storage(f"s3://bucket-{name}")
    bucket.filesystem.mkdir(f"bucket-{name}")
    return Storage(f"s3://bucket-{name}/run")


def test_content_comes_back_whole_and_is_replaced_whole(storage: Storage) -> None:
    storage.put("ledger/a.json", b"one")
    storage.put("ledger/a.json", b"two, longer")
    assert storage.get("ledger/a.json") == b"two, longer"


def test_what_is_absent_is_not_found(storage: Storage) -> None:
    assert not storage.exists("nothing")
    assert storage.list("nowhere") == []
    with pytest.raises(FileNotFoundError):
        storage.get("nothing")
    storage.delete("nothing")


def test_only_the_first_of_two_creations_counts(storage: Storage) -> None:
    assert storage.put_if_absent("lease.json", b"mine")
    assert not storage.put_if_absent("lease.json", b"yours")
    assert storage.get("lease.json") == b"mine"


def test_a_listing_shows_files_of_all_depths_in_order_and_what_others_wrote_since(storage: Storage) -> None:
    storage.put("parts/b/2", b"")
    storage.put("parts/a/1", b"")
    storage.put("partsother/3", b"")
    assert storage.list("parts") == ["parts/a/1", "parts/b/2"]
    Storage(storage.uri).put("parts/c", b"")
    assert storage.list("parts") == ["parts/a/1", "parts/b/2", "parts/c"]
    storage.delete("parts/a/1")
    assert storage.list("parts") == ["parts/b/2", "parts/c"]


def test_many_names_are_fetched_in_order_with_none_for_absent_ones(storage: Storage) -> None:
    for number in range(20):
        storage.put(f"c/{number}", str(number).encode())
    found = storage.get_many(["c/7", "c/none", "c/3"])
    assert found == [b"7", None, b"3"]


def test_parquet_is_read_in_place(storage: Storage) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1, 2, 3]}), sink)
    storage.put("t/x.parquet", bytes(sink.getvalue()))
    with storage.open_input("t/x.parquet") as file:
        assert pq.read_table(file)["x"].to_pylist() == [1, 2, 3]


def test_a_commit_is_seen_by_another_reader_of_the_same_run(storage: Storage) -> None:
    writer, reader = Ledger(storage), Ledger(Storage(storage.uri))
    assert len(reader.committed_records()) == 0
    part_id = writer.begin(["k"])
    writer.commit(part_id, {"pages": PAGES.empty_table()}, run_id="r", records={"u": ["k"]}, statuses={"u": ["blank"]})
    assert reader.committed_records().part_of("k") == part_id


def test_a_whole_run_lives_on_every_store(storage: Storage) -> None:
    units = [document_unit(0, [1, 2]), failed_unit(1), video_unit(2, [0])]
    write_plan_part(storage, units_table(units), sources_table([source(index) for index in range(3)]), "s")
    sink = WriteRecords(WriteRecordsConfig(run_uri=storage.uri, run_id="r"))
    for table in owed_units(read_plan(storage), Ledger(storage).committed_records()):
        for unit in table.to_pylist():
            sink(records_table(records_of(unit)))
    publish(storage, "r")
    result = account(Storage(storage.uri), check_parts=True)
    assert (result.problems, result.committed, result.complete) == ([], 3, True)
    with Lease(storage, utc_now, beat_seconds=0), pytest.raises(ConfigError):
        Lease(Storage(storage.uri), utc_now).acquire()


def test_storage_travels_to_workers_as_its_uri(storage: Storage) -> None:
    storage.put("a", b"x")
    assert pickle.loads(pickle.dumps(storage)).get("a") == b"x"


def test_a_writable_target_passes_the_probe_and_keeps_no_trace(storage: Storage) -> None:
    storage.probe_writable()
    assert storage.list() == []


def test_one_of_many_local_creators_wins(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: storage.put_if_absent("lease", str(n).encode()), range(40)))
    assert won.count(True) == 1
    assert storage.get("lease") == str(won.index(True)).encode()


def test_creation_stays_exclusive_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    storage = Storage(str(tmp_path))
    assert storage.put_if_absent("lease", b"mine")
    assert not storage.put_if_absent("lease", b"yours")
    assert storage.get("lease") == b"mine"


def test_a_local_write_that_never_ended_is_not_listed_and_can_be_removed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.put("parts/a", b"x")
    (tmp_path / "parts" / f"{TEMPORARY_PREFIX}dead").write_bytes(b"half")
    assert storage.list() == ["parts/a"]
    assert storage.delete_temporaries() == 1
    assert os.listdir(tmp_path / "parts") == ["a"]


def test_a_target_below_a_file_is_a_config_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="not writable") as caught:
        Storage(str(tmp_path / "file" / "run")).probe_writable()
    assert "\n" not in str(caught.value)


def test_an_unreachable_bucket_is_a_config_error_in_one_line(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with pytest.raises(ConfigError, match="not writable") as caught:
        Storage("s3://no-such-bucket-anywhere/run").probe_writable()
    assert "\n" not in str(caught.value)


def test_an_unknown_protocol_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        Storage("nonsense://x")


def test_a_refused_write_is_transient_and_leaves_the_old_content(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.put("a", b"old")
    (tmp_path / "b").mkdir()
    with pytest.raises(TransientError, match="cannot write"):
        storage.put("b", b"a folder is in the way")
    assert storage.get("a") == b"old"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


class Breaking(MemoryFileSystem):
    """A store whose library raises errors of its own, as botocore and google do; here without a word."""

    class OddError(Exception):
        pass

    def refuse(self, *arguments: object, **options: object) -> None:
        raise self.OddError

    pipe_file = cat_file = cat = find = info = rm_file = refuse
    _open = refuse


def test_whatever_a_store_raises_is_a_transient_error_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage("memory://odd/run")
    monkeypatch.setattr(storage, "filesystem", Breaking())
    storage.retries = RetryPolicy(max_attempts=1)
    calls = (
        lambda: storage.put("a", b""),
        lambda: storage.put_if_absent("a", b""),
        lambda: storage.get("a"),
        lambda: storage.get_many(["a"]),
        lambda: storage.exists("a"),
        lambda: storage.list(),
        lambda: storage.delete("a"),
        lambda: storage.open_input("a"),
        lambda: storage.open_input("a", ranges=True),
    )
    for call in calls:
        with pytest.raises(TransientError, match=r": OddError$"):
            call()
