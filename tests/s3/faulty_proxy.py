"""An HTTP proxy that stands before an S3 server and breaks some of its answers; each break can be replayed.

In a test::

    with FaultyProxy(upstream="http://127.0.0.1:5000") as proxy:      # seed=0, rate=0: passes everything on
        proxy.fail("PUT", "lease", "error_after", times=1)            # method, part of the path, fault, how often
        ...                                                           # AWS_ENDPOINT_URL=proxy.url
        assert proxy.broken["error_after"] == 1                       # what was broken, by fault
        proxy.asked                                                   # [(method, path with query)] of all requests
        proxy.sent_bytes                                              # of bodies, to the client

In a process of its own (the port is the first line on stdout; SIGTERM ends it and prints the counts as JSON)::

    python -m tests.s3.faulty_proxy --upstream http://127.0.0.1:5000 --port 0 --seed 1 --rate 0.1 [--faults a,b]

    GET  /-/counts            -> {"requests": 812, "broken": {"error_500": 9, ...}}
    POST /-/rate?rate=0.25    -> breaks more or less from now on

Whether the n-th request of one method and path is broken, and how, depends on the seed, the method, the path and n
alone: not on the time, nor on what runs beside it. Hashes and random ids in a path (eight hex digits or more) count as
one and the same. After `most_in_a_row` broken answers of one method and path the next one passes, so a client that
tries more often than that must succeed.

Faults (`FAULTS`; those that do not fit a request are replaced by `error_500`):

=============  =========================================================================================
error_500      500 InternalError; the request is not passed on
slow_down      503 SlowDown; not passed on
throttle       429; not passed on
hang           not passed on, no answer: the connection stays silent for `hang_seconds`, then closes
reset          not passed on; the connection is reset
delay          passed on after `delay_seconds`, then answered as usual
cut            the answer says its whole length, half of the body comes, the connection closes
cut_reset      the same, and the connection is reset
short          half of the body, and a Content-Length that fits the half (a store that lies); only by rule or name
forbidden      403 AccessDenied; not passed on; only by rule or name
error_after    passed on, then answered with 500: the client cannot know that it was done
reset_after    passed on, then the connection is reset
=============  =========================================================================================
"""

import argparse
import collections
import contextlib
import hashlib
import http.client
import http.server
import json
import re
import signal
import socket
import struct
import sys
import threading
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

FAULTS = (
    "error_500", "slow_down", "throttle", "hang", "reset", "delay", "cut", "cut_reset", "error_after", "reset_after",
)  # fmt: skip
ERRORS = {
    "error_500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "error_after": (500, "InternalError", "We encountered an internal error. Please try again."),
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "throttle": (429, "TooManyRequests", "Please reduce your request rate."),
    "forbidden": (403, "AccessDenied", "Access Denied"),
}
NAMED_ONLY = ("short", "forbidden")
OF_BODIES = ("cut", "cut_reset", "short")
OF_CHANGES = ("error_after", "reset_after")
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "proxy-connection", "te", "upgrade"}
CONTROL = "/-/"
DRAWN = re.compile(r"[0-9a-f]{8,}")


@dataclass
class Rule:
    """Breaks the next `times` requests of a method (or "*") whose address holds `part`."""

    method: str
    part: str
    fault: str
    times: int


class FaultyProxy:
    """See the module. Use as a context manager, or `start` and `stop`."""

    def __init__(
        self,
        upstream: str,
        *,
        seed: int = 0,
        rate: float = 0.0,
        faults: tuple[str, ...] = FAULTS,
        port: int = 0,
        hang_seconds: float = 60.0,
        delay_seconds: float = 0.3,
        most_in_a_row: int = 3,
    ) -> None:
        self.upstream = urlsplit(upstream)
        self.seed, self.rate, self.faults = seed, rate, faults
        self.hang_seconds, self.delay_seconds, self.most_in_a_row = hang_seconds, delay_seconds, most_in_a_row
        self.rules: list[Rule] = []
        self.broken: collections.Counter[str] = collections.Counter()
        self.asked: list[tuple[str, str]] = []
        self.sent_bytes = 0
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._seen: collections.Counter[tuple[str, str]] = collections.Counter()
        self._in_a_row: collections.Counter[tuple[str, str]] = collections.Counter()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.proxy = self
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> "FaultyProxy":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    __enter__ = start

    def __exit__(self, *error: object) -> None:
        self.stop()

    def fail(self, method: str, part: str, fault: str, times: int = 1) -> None:
        """Break the next `times` requests of `method` ("*" for any) whose path and query hold `part`."""
        assert fault in (*FAULTS, *NAMED_ONLY), fault
        self.rules.append(Rule(method, part, fault, times))

    def counts(self) -> dict[str, object]:
        return {"requests": len(self.asked), "broken": dict(self.broken)}

    def fault_of(self, method: str, address: str) -> str | None:
        """Return the fault of this request, None to pass it on as it is."""
        with self._lock:
            self.asked.append((method, address))
            fault = self._by_rule(method, address) or self._by_seed(method, address)
            if fault in OF_CHANGES and method in ("GET", "HEAD"):
                fault = "error_500"
            if fault in OF_BODIES and method != "GET":
                fault = "error_500"
            if fault:
                self.broken[fault] += 1
            return fault

    def _by_rule(self, method: str, address: str) -> str | None:
        for rule in self.rules:
            if rule.times > 0 and rule.method in ("*", method) and rule.part in address:
                rule.times -= 1
                return rule.fault
        return None

    def _by_seed(self, method: str, address: str) -> str | None:
        key = (method, address.partition("?")[0])
        # Names that a run draws anew would make every replay another one.
        kind = (method, DRAWN.sub("*", key[1]))
        self._seen[kind] += 1
        drawn = hashlib.sha256(repr((self.seed, kind, self._seen[kind])).encode()).digest()
        chance, choice = struct.unpack(">QQ", drawn[:16])
        if chance / 2**64 >= self.rate or self._in_a_row[key] >= self.most_in_a_row:
            self._in_a_row[key] = 0
            return None
        self._in_a_row[key] += 1
        return self.faults[choice % len(self.faults)]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    proxy: FaultyProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that leaves is what this is for."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    # A head and a body in two packets would wait for each other's acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        if self.path.startswith(CONTROL):
            self._request_body()
            self._control()
        else:
            self._answer()
        self.wfile.flush()

    def handle_expect_100(self) -> bool:
        """Say nothing yet: a server that hangs does not ask for the body either."""
        return True

    def _request_body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _control(self) -> None:
        proxy = self.server.proxy
        asked = parse_qs(urlsplit(self.path).query)
        if "rate" in asked:
            proxy.rate = float(asked["rate"][0])
        self._send(200, {"Content-Type": "application/json"}, json.dumps(proxy.counts()).encode())

    def _answer(self) -> None:
        proxy = self.server.proxy
        fault = proxy.fault_of(self.command, self.path)
        if fault == "hang":
            proxy.stopping.wait(proxy.hang_seconds)
            self.close_connection = True
            return
        body = self._request_body()
        if fault == "reset":
            self._reset()
        elif fault in ("error_500", "slow_down", "throttle", "forbidden"):
            self._refuse(fault)
        else:
            if fault == "delay":
                proxy.stopping.wait(proxy.delay_seconds)
            self._pass_on(body, fault)

    def _pass_on(self, body: bytes, fault: str | None) -> None:
        try:
            status, headers, content = self._asked_upstream(body)
        except (OSError, http.client.HTTPException):
            self._reset()
            return
        if fault == "error_after":
            self._refuse(fault)
        elif fault == "reset_after":
            self._reset()
        elif fault == "short" and status in (200, 206):
            content = content[: len(content) // 2]
            self._send(status, headers | {"Content-Length": str(len(content))}, content)
        elif fault in ("cut", "cut_reset") and content:
            self._send(status, headers, content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            if fault == "cut_reset":
                self._reset()
        else:
            self._send(status, headers, content)

    def _asked_upstream(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = self.server.proxy.upstream
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=120)
        with contextlib.closing(connection):
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP_BY_HOP | {"content-length"}:
                    connection.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP}
            headers = {name: value for name, value in headers.items() if name.lower() != "content-length"} | {
                "Content-Length": answer.getheader("Content-Length") or str(len(content))
            }
            return answer.status, headers, content

    def _refuse(self, fault: str) -> None:
        status, code, message = ERRORS[fault]
        text = (
            f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message>'
            "<RequestId>0</RequestId></Error>"
        )
        self._send(status, {"Content-Type": "application/xml"}, text.encode())

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(content)
            with self.server.proxy._lock:
                self.server.proxy.sent_bytes += len(content)

    def _reset(self) -> None:
        """End the connection with a reset: what a client sees when the other side dies."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Without the duplicates that the handler's files hold, the reset would wait for them.
        self.rfile.close()
        with contextlib.suppress(OSError):
            self.wfile.close()
        self.connection.close()
        self.wfile = _Nowhere()

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


class _Nowhere:
    """Stands for the writer of a connection that was reset."""

    closed = True

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description="A proxy that breaks some answers of an S3 server.")
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--hang-seconds", type=float, default=60.0)
    parser.add_argument("--most-in-a-row", type=int, default=3)
    asked = parser.parse_args()
    proxy = FaultyProxy(
        asked.upstream,
        seed=asked.seed,
        rate=asked.rate,
        faults=tuple(asked.faults.split(",")),
        port=asked.port,
        hang_seconds=asked.hang_seconds,
        most_in_a_row=asked.most_in_a_row,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with proxy, contextlib.suppress(KeyboardInterrupt, SystemExit):
        print(proxy.port, flush=True)  # noqa: T201
        signal.pause()
    print(json.dumps(proxy.counts()), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
