"""Sources on S3: what patterns and prefixes find, odd keys, archives and large objects read in parts."""

import io
import os
import tarfile
import zipfile

import pyarrow as pa
import pytest

from operators.fetch import CHUNK_BYTES, FetchConfig, Shelf, local_copy
from operators.retries import RetryPolicy
from pipeline import looks
from pipeline.source import Listing, list_sources
from schemas.errors import ConfigError, FetchError

QUICK = FetchConfig(first_wait_seconds=0.02)
ODD_KEYS = ("a b.pdf", "a+b.pdf", "a%41.pdf", "ünï/ß.pdf", "a&b=c;d.pdf", "q?x=1.pdf", "#1.pdf", "[1].pdf", "it's.pdf")


@pytest.fixture(autouse=True)
def quick_listing(monkeypatch):
    monkeypatch.setattr(looks, "LISTING_RETRIES", RetryPolicy(first_wait_seconds=0.02))


def listed(*inputs):
    tables = list(list_sources(list(inputs), {}, Listing()))
    return pa.concat_tables(tables).to_pylist() if tables else []


def keys_of(bucket, rows):
    return [row["source_uri"].removeprefix(f"{bucket.url}/") for row in rows]


def test_prefixes_and_patterns_find_what_they_say(bucket):
    for key in ("in/a.pdf", "in/b.png", "in/deep/c.pdf", "in/.hidden.pdf", "in/notes.md", "inner/d.pdf", "in/folder/"):
        bucket.put(key, b"x")
    found = {
        given: keys_of(bucket, listed(f"{bucket.url}/{given}")) for given in ("in", "in/", "in/*.pdf", "in/**", "")
    }
    assert found["in"] == found["in/"] == ["in/a.pdf", "in/b.png", "in/deep/c.pdf"]
    assert found["in/*.pdf"] == ["in/a.pdf"]
    assert found["in/**"] == ["in/a.pdf", "in/b.png", "in/deep/c.pdf", "in/notes.md"]
    assert found[""] == ["in/a.pdf", "in/b.png", "in/deep/c.pdf", "inner/d.pdf"]
    assert keys_of(bucket, listed(f"{bucket.url}/in*/**/*.pdf")) == ["in/a.pdf", "in/deep/c.pdf", "inner/d.pdf"]
    assert keys_of(bucket, listed(f"{bucket.url}/in/notes.md")) == ["in/notes.md"]
    for given in ("in/*.tif", "none/", "none.pdf"):
        with pytest.raises(ConfigError):
            listed(f"{bucket.url}/{given}")


def test_odd_keys_are_listed_and_read_one_by_one_and_together(bucket):
    for key in ODD_KEYS:
        bucket.put(f"odd/{key}", key.encode())
    rows = listed(f"{bucket.url}/odd/")
    assert keys_of(bucket, rows) == sorted(f"odd/{key}" for key in ODD_KEYS)
    for row in rows:
        key = row["source_uri"].removeprefix(f"{bucket.url}/odd/")
        with local_copy(row["source_uri"], None, QUICK) as path:
            assert path.read_bytes() == key.encode()
        assert listed(row["source_uri"]) == [row | {"source_index": 0}]


def test_a_listing_under_faults_is_the_listing_without(bucket, proxy):
    for number in range(30):
        bucket.put(f"in/{number:02d}.pdf", b"x" * number)
    bucket.put("list.txt", b"".join(b"in/%02d.pdf\n" % number for number in range(30)))
    wanted = listed(f"{bucket.url}/in/")
    assert [row["size_bytes"] for row in wanted] == list(range(30))
    proxy.seed, proxy.rate = 2, 0.2
    proxy.faults = ("error_500", "slow_down", "throttle", "cut", "cut_reset", "reset")
    assert listed(f"{bucket.url}/in/") == wanted
    assert listed(f"{bucket.url}/in/*.pdf") == wanted
    by_manifest = listed(f"{bucket.url}/list.txt")
    assert [row["source_uri"] for row in by_manifest] == [row["source_uri"] for row in wanted]
    assert [row["size_bytes"] for row in by_manifest] == list(range(30))
    assert sum(proxy.broken.values()) > 5


@pytest.mark.parametrize("fault", ["cut", "cut_reset", "short", "error_500", "slow_down", "reset"])
def test_a_large_object_goes_on_from_the_range_that_broke(bucket, proxy, fault):
    data = os.urandom(5 * CHUNK_BYTES + 17)
    bucket.put("large.mp4", data)
    proxy.asked.clear()
    proxy.fail("GET", "large", fault, times=3)
    with local_copy(f"{bucket.url}/large.mp4", None, QUICK) as path:
        assert path.read_bytes() == data
    assert proxy.broken[fault] == 3
    # Six ranges and what broke of them; aiohttp asks again by itself after a reset.
    assert len([method for method, _ in proxy.asked if method == "GET"]) == 6 + 3


def test_a_body_that_never_comes_whole_is_unreadable_and_not_corrupt(bucket, proxy):
    bucket.put("a.pdf", os.urandom(10_000))
    for fault in ("short", "cut"):
        proxy.fail("GET", "a.pdf", fault, times=1000)
        with pytest.raises(FetchError) as caught, local_copy(f"{bucket.url}/a.pdf", None, QUICK):
            pass
        assert (caught.value.code, caught.value.retryable) == ("unreadable", True)
        proxy.rules.clear()


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(members, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "pack", [tar_of, zip_of, lambda m: zip_of(m, zipfile.ZIP_STORED)], ids=["tar", "zip", "stored"]
)
def test_a_member_is_read_without_the_rest_of_its_archive(bucket, proxy, pack):
    members = {f"{number}.pdf": os.urandom(3_000_000) for number in range(8)}
    bucket.put("x.zip", pack(members))
    proxy.fail("GET", "x.zip", "cut", times=2)
    rows = listed(f"{bucket.url}/x.zip")
    assert [row["source_ref"]["member"] for row in rows] == list(members)
    proxy.sent_bytes = 0
    shelf = Shelf()
    for place in (2, 6):
        proxy.fail("GET", "x.zip", "cut_reset", times=2)
        with local_copy(rows[place]["source_uri"], rows[place]["source_ref"], QUICK, shelf) as path:
            assert path.read_bytes() == members[f"{place}.pdf"]
    shelf.close()
    assert proxy.sent_bytes < 12_000_000


def test_an_archive_that_was_replaced_while_it_was_kept_open_is_opened_anew(bucket):
    shelf = Shelf()
    for size in (1_000_000, 700_000):
        members = {name: os.urandom(size) for name in ("a.pdf", "b.pdf", "c.pdf")}
        bucket.put("x.zip", zip_of(members))
        for name in ("c.pdf", "a.pdf"):
            with local_copy(f"{bucket.url}/x.zip", {"member": name}, QUICK, shelf) as path:
                assert path.read_bytes() == members[name]
    shelf.close()
