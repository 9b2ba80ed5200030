"""Sources on a web server: with ranges and without, whole whatever breaks."""

import http.server
import io
import os
import re
import threading
import zipfile

import pytest

from operators.fetch import CHUNK_BYTES, FetchConfig, local_copy
from schemas.errors import FetchError
from tests.s3.faulty_proxy import FaultyProxy

QUICK = FetchConfig(first_wait_seconds=0.02)
DATA = os.urandom(3 * CHUNK_BYTES + 99)


class Files(http.server.BaseHTTPRequestHandler):
    """Serves the server's `content`; keeps ranges where `ranges` says so."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        content = self.server.content
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            start, stop = int(asked[1]), min(int(asked[2]) + 1, len(content))
            self.send_response_only(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
            content = content[start:stop]
        else:
            self.send_response_only(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.content, server.ranges = DATA, True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def web(server):
    with FaultyProxy(f"http://127.0.0.1:{server.server_port}") as proxy:
        yield proxy


def gets(proxy):
    return len([method for method, _ in proxy.asked if method == "GET"])


@pytest.mark.parametrize("fault", ["cut", "cut_reset", "short", "error_500", "slow_down", "throttle"])
def test_a_large_file_goes_on_from_the_range_that_broke(web, fault):
    web.fail("GET", "a.mp4", fault, times=3)
    with local_copy(f"{web.url}/a.mp4", None, QUICK) as path:
        assert path.read_bytes() == DATA
    assert (web.broken[fault], gets(web)) == (3, 4 + 3)


@pytest.mark.parametrize("fault", ["cut", "cut_reset", "short", "error_500"])
def test_without_ranges_it_comes_whole_or_again(web, server, fault):
    server.ranges = False
    web.fail("GET", "a.mp4", fault, times=2)
    with local_copy(f"{web.url}/a.mp4", None, QUICK) as path:
        assert path.read_bytes() == DATA
    web.fail("GET", "a.mp4", "short", times=1000)
    with pytest.raises(FetchError) as caught, local_copy(f"{web.url}/a.mp4", None, FetchConfig(max_attempts=2)):
        pass
    assert (caught.value.code, caught.value.retryable) == ("unreadable", True)


def test_a_small_file_is_one_request_with_its_length_checked(web, server):
    server.content = DATA[:1000]
    web.fail("GET", "a.pdf", "short")
    with local_copy(f"{web.url}/a.pdf", None, QUICK) as path:
        assert path.read_bytes() == DATA[:1000]
    assert gets(web) == 2


def test_a_member_of_a_zip_is_read_in_place_where_there_are_ranges(web, server):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(20):
            archive.writestr(f"{number}.pdf", DATA[number * 500_000 : (number + 1) * 500_000])
    server.content = buffer.getvalue()
    for ranges in (True, False):
        server.ranges = ranges
        web.sent_bytes = 0
        with local_copy(f"{web.url}/x.zip", {"member": "7.pdf"}, QUICK) as path:
            assert path.read_bytes() == DATA[3_500_000:4_000_000]
        assert (web.sent_bytes < 2_000_000) == ranges
