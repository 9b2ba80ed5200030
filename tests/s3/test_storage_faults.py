"""Storage on S3 while answers break, each in every way that the proxy knows."""

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.retries import RetryPolicy
from pipeline import listing
from pipeline.lease import Lease
from pipeline.ledger import utc_now
from pipeline.storage import Storage
from schemas.errors import ConfigError, TransientError
from tests.s3.faulty_proxy import FAULTS

QUICK = RetryPolicy(first_wait_seconds=0.02)
NEVER_AGAIN = RetryPolicy(first_wait_seconds=100_000.0, most_wait_seconds=100_000.0, most_seconds=1e9)
"""Whoever waits by this policy waits longer than the test may take."""

DATA = bytes(range(256)) * 2000


@pytest.fixture
def storage(bucket):
    storage = Storage(f"{bucket.url}/run")
    storage.retries = QUICK
    return storage


def impatient(storage):
    """Let a silent store be given up after a second; to be called before it is asked for the first time."""
    storage.filesystem.config_kwargs["read_timeout"] = 1.0


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_survives_a_fault(storage, proxy, fault):
    times = 1 if fault in ("hang", "delay") else 3
    if fault == "hang":
        impatient(storage)

    def broken(method, part):
        proxy.fail(method, part, fault, times)

    broken("PUT", "/run/a")
    storage.put("a", DATA)
    broken("GET", "/run/a")
    assert storage.get("a") == DATA
    broken("HEAD", "/run/a")
    assert storage.exists("a")
    broken("HEAD", "/run/none")
    assert not storage.exists("none")
    storage.put("b", b"2")
    broken("GET", "/run/b")
    assert storage.get_many(["b", "none", "a"]) == [b"2", None, DATA]
    broken("GET", "list-type")
    assert storage.list() == ["a", "b"]
    broken("DELETE", "/run/b")
    storage.delete("b")
    assert storage.list() == ["a"]
    assert sum(proxy.broken.values()) == 7 * times


@pytest.mark.parametrize("fault", ["error_500", "cut", "cut_reset", "short", "reset"])
def test_a_table_is_read_in_parts_whatever_breaks(storage, proxy, fault):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": range(300_000), "y": [0.5] * 300_000}), sink)
    storage.put("x.parquet", bytes(sink.getvalue()))
    proxy.fail("GET", "x.parquet", fault, times=3)
    with storage.open_input("x.parquet", ranges=True) as file:
        assert pq.read_table(file, columns=["x"])["x"].to_pylist() == list(range(300_000))
    assert proxy.broken[fault] == 3


@pytest.mark.parametrize("fault", ["error_after", "reset_after", "error_500", "slow_down", "hang"])
def test_a_creation_whose_answer_was_lost_knows_its_own_object(storage, proxy, fault):
    if fault == "hang":
        impatient(storage)
    proxy.fail("PUT", "lease", fault, times=1 if fault == "hang" else 2)
    assert storage.put_if_absent("lease", b"mine")
    proxy.fail("PUT", "lease", fault, times=1 if fault == "hang" else 2)
    assert not storage.put_if_absent("lease", b"yours")
    assert storage.get("lease") == b"mine"


def test_a_body_that_is_shorter_than_the_store_says_is_not_the_whole(storage, proxy):
    storage.put("a", DATA)
    proxy.fail("GET", "/run/a", "short", times=2)
    assert storage.get("a") == DATA
    proxy.fail("GET", "/run/a", "cut", times=100)
    with pytest.raises(TransientError, match="cannot read"):
        storage.get("a")


def test_of_many_drivers_one_takes_the_run_while_answers_break(storage, proxy):
    proxy.seed, proxy.rate = 5, 0.3
    proxy.faults = ("error_500", "slow_down", "reset", "error_after", "reset_after", "cut")

    def attempt(_):
        own = Storage(storage.uri)
        own.retries = QUICK
        lease = Lease(own, utc_now, beat_seconds=0)
        try:
            lease.acquire()
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(attempt, range(12))).count(True) == 1
    assert sum(proxy.broken.values()) > 5


def test_what_the_store_forbids_fails_at_once_in_one_line(storage, proxy):
    storage.retries = NEVER_AGAIN
    proxy.fail("*", "run", "forbidden", times=1000)
    for call in (
        lambda: storage.put("a", b""),
        lambda: storage.put_if_absent("a", b""),
        lambda: storage.get("a"),
        lambda: storage.exists("a"),
        lambda: storage.list(),
    ):
        with pytest.raises(TransientError) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="not writable"):
        storage.probe_writable()


def test_no_bucket_and_no_server_fail_at_once_in_one_line(bucket, monkeypatch):
    absent = Storage("s3://no-such-bucket-anywhere/run")
    absent.retries = NEVER_AGAIN
    with pytest.raises(ConfigError, match="not writable"):
        absent.probe_writable()
    for endpoint in ("http://127.0.0.1:1", "http://no-such-host.invalid"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        type(absent.filesystem).clear_instance_cache()
        nowhere = Storage(f"{bucket.url}/run")
        nowhere.retries = NEVER_AGAIN
        with pytest.raises(ConfigError, match="not writable") as caught:
            nowhere.probe_writable()
        assert "\n" not in str(caught.value)


def test_failures_are_not_tried_for_ever(storage, proxy):
    storage.retries = RetryPolicy(max_attempts=4, first_wait_seconds=0.01)
    proxy.fail("PUT", "/run/a", "slow_down", times=1000)
    with pytest.raises(TransientError, match="cannot write"):
        storage.put("a", b"x")
    assert proxy.broken["slow_down"] == 4


def test_a_long_listing_goes_on_from_the_page_that_broke(storage, bucket, proxy, monkeypatch):
    monkeypatch.setattr(listing, "PAGE_KEYS", 100)
    names = sorted(f"p/{number:05d}" for number in range(250))
    bucket.direct.pipe({f"{bucket.name}/run/{name}": b"" for name in names})
    proxy.fail("GET", "continuation-token", "cut", times=2)
    proxy.asked.clear()
    assert storage.list("p") == names
    assert len([path for method, path in proxy.asked if "list-type" in path]) == 5
