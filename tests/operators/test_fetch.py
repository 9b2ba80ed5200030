"""Bytes of a source as a local file."""

import hashlib
import http.server
import io
import os
import tarfile
import threading
import zipfile

import fsspec
import pytest

from operators.fetch import FetchConfig, KeptCopy, local_copy, sha256_of
from schemas.errors import FetchError

QUICK = FetchConfig(first_wait_seconds=0.01)
DATA = os.urandom(100_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves DATA; fails as often as the server's `failures` says."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        status = {"/missing": 404, "/forbidden": 403}.get(self.path.partition("?")[0], 200)
        if status == 200 and self.server.failures > 0:
            self.server.failures -= 1
            status = 503
        self.server.requests += 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(DATA)) if status == 200 else "0")
        self.end_headers()
        if body and status == 200:
            self.wfile.write(DATA)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.failures = server.requests = 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def code_of(uri, reference=None, config=QUICK):
    with pytest.raises(FetchError) as caught, local_copy(uri, reference, config):
        pass
    return caught.value.code


def test_a_local_file_is_yielded_as_it_is(tmp_path):
    path = tmp_path / "a b.pdf"
    path.write_bytes(DATA)
    for address in (str(path), f"file://{path}"):
        with local_copy(address) as found:
            assert found == path
    assert path.exists()
    assert sha256_of(path) == hashlib.sha256(DATA).hexdigest()


def test_a_url_is_copied_and_the_copy_removed(server):
    with local_copy(f"{server.url}/scan.pdf?signature=1", None, QUICK) as path:
        assert path.read_bytes() == DATA
        assert path.suffix == ".pdf"
    assert not path.exists()


def test_any_fsspec_file_system_can_be_read():
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe_file("/bucket/a.pdf", DATA)
    with local_copy("memory://bucket/a.pdf") as path:
        assert path.read_bytes() == DATA


def test_failures_in_transit_are_tried_again(server):
    server.failures = 2
    with local_copy(f"{server.url}/a.pdf", None, QUICK) as path:
        assert path.read_bytes() == DATA


def test_failures_in_transit_are_not_tried_for_ever(server):
    server.failures = 1000
    with pytest.raises(FetchError) as caught, local_copy(f"{server.url}/a.pdf", None, QUICK):
        pass
    assert caught.value.code == "unreadable"
    assert caught.value.retryable
    assert 1000 - server.failures <= 2 * QUICK.max_attempts


def test_what_would_fail_again_is_tried_once(server, tmp_path):
    assert code_of(f"{server.url}/missing") == "not_found"
    assert code_of(f"{server.url}/forbidden") == "forbidden"
    assert server.requests <= 4
    assert code_of("nosuchprotocol://x/y") == "unreadable"
    assert code_of(str(tmp_path / "missing.pdf")) == "not_found"
    assert code_of(f"{tmp_path}/missing/\0.pdf") == "not_found"
    assert code_of("memory://bucket/missing.pdf") == "not_found"


def test_messages_hold_no_signature(server):
    with pytest.raises(FetchError) as caught, local_copy(f"{server.url}/missing?signature=hush", None, QUICK):
        pass
    assert caught.value.code == "not_found"
    assert "hush" not in str(caught.value)


def test_folders_and_pipes_are_unreadable_and_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.pdf")
    assert code_of(str(tmp_path / "pipe.pdf")) == "unreadable"
    assert code_of(str(tmp_path)) == "unreadable"


def test_a_source_larger_than_the_policy_is_refused(server):
    assert code_of(f"{server.url}/a.pdf", None, FetchConfig(max_source_bytes=1000)) == "too_large"


def zip_of(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tar_of(members, mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("pack", [zip_of, lambda m: tar_of(m, "w"), lambda m: tar_of(m, "w:gz")])
def test_a_member_of_an_archive_is_a_source(tmp_path, pack):
    archive = tmp_path / "archive"
    archive.write_bytes(pack({"in/a.pdf": DATA, "../../evil.pdf": b"evil"}))
    with local_copy(str(archive), {"path": None, "member": "in/a.pdf"}) as path:
        assert path.read_bytes() == DATA
    with local_copy(str(archive), {"path": None, "member": "../../evil.pdf"}) as path:
        assert path.read_bytes() == b"evil"
        assert path.name == "source.pdf"
    assert code_of(str(archive), {"member": "missing.pdf"}) == "not_found"


def test_a_range_of_a_remote_tar_is_read_without_the_rest():
    packed = tar_of({"a.pdf": DATA[:5000], "b.pdf": DATA[5000:9000]}, "w")
    offset = packed.index(DATA[5000:9000])
    fsspec.filesystem("memory").pipe_file("/bucket/two.tar", packed)
    reference = {"path": "memory://bucket/two.tar", "member": "b.pdf", "byte_offset": offset, "byte_size": 4000}
    with local_copy("memory://bucket/two.tar#b.pdf", reference) as path:
        assert path.read_bytes() == DATA[5000:9000]
    short = reference | {"byte_offset": len(packed) - 10}
    assert code_of("memory://bucket/two.tar", short) == "damaged"


def test_a_bomb_in_an_archive_is_too_large(tmp_path):
    archive = tmp_path / "bomb.zip"
    archive.write_bytes(zip_of({"a.pdf": b"\0" * 50_000_000}))
    assert code_of(str(archive), {"member": "a.pdf"}, FetchConfig(max_source_bytes=1_000_000)) == "too_large"


def test_a_damaged_archive_is_damaged(tmp_path):
    archive = tmp_path / "a.zip"
    archive.write_bytes(zip_of({"a.pdf": DATA})[:5000])
    assert code_of(str(archive), {"member": "a.pdf"}) == "damaged"


def test_the_units_of_a_source_share_one_copy(server):
    kept = KeptCopy(QUICK)
    doc_id = hashlib.sha256(DATA).hexdigest()
    path = kept.path_of(f"{server.url}/a.pdf", None, doc_id)
    requests = server.requests
    assert kept.path_of(f"{server.url}/a.pdf", None, doc_id) == path
    assert server.requests == requests
    other = kept.path_of(f"{server.url}/b.pdf", None, doc_id)
    assert not path.exists()
    assert other.read_bytes() == DATA
    kept.close()
    assert not other.exists()


def test_bytes_that_are_not_those_planned_are_refused(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(b"old")
    doc_id = sha256_of(path)
    kept = KeptCopy(QUICK)
    assert kept.path_of(str(path), None, doc_id) == path
    path.write_bytes(b"newer")
    with pytest.raises(FetchError, match="changed") as caught:
        kept.path_of(str(path), None, doc_id)
    assert caught.value.retryable
    path.unlink()
    with pytest.raises(FetchError) as caught:
        kept.path_of(str(path), None, doc_id)
    assert caught.value.code == "not_found"
    kept.close()
