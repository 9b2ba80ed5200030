"""A small HTTP server that speaks the chat protocol, and fails in the ways that real ones do.

As a program it answers `good` requests and then ends itself: python chat_server.py PORT GOOD
"""

import base64
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "small-reader"
PROBE_WORDS = "What colour is the square?"


@dataclass
class Reply:
    """What is sent back.

    Attributes:
        cut_after: bytes of the body after which the connection is closed; None sends all.
        is_dropped: close the connection without a word.
    """

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    cut_after: int | None = None
    is_dropped: bool = False
    content_type: str = "application/json"

    def raw(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


@dataclass
class Seen:
    """One chat request, as it came."""

    body: dict[str, Any]
    headers: dict[str, str]
    arrived: float

    @property
    def prompt(self) -> str:
        return next(part["text"] for part in self.body["messages"][0]["content"] if part["type"] == "text")

    @property
    def pictures(self) -> list[tuple[str, bytes]]:
        """Media type and file of each picture."""
        urls = [part["image_url"]["url"] for part in self.body["messages"][0]["content"] if part["type"] == "image_url"]
        pairs = [url.removeprefix("data:").split(";base64,") for url in urls]
        return [(media_type, base64.b64decode(data, validate=True)) for media_type, data in pairs]

    @property
    def is_probe(self) -> bool:
        return self.prompt.startswith(PROBE_WORDS)


def completion(text: str | None = "read", finish_reason: str | None = "stop", **message: Any) -> dict[str, Any]:
    return {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, **message},
                "finish_reason": finish_reason,
            }
        ],
        "usage": {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15},
    }


def models(*names: str, owner: str = "tests") -> Reply:
    return Reply({"object": "list", "data": [{"id": name, "object": "model", "owned_by": owner} for name in names]})


class ChatServer:
    """Serves on loopback from a thread; `answer` makes the reply to each request that is no probe."""

    def __init__(self, answer: Callable[[Seen], Reply] | None = None, port: int = 0) -> None:
        self.answer = answer or (lambda seen: Reply(completion()))
        self.probe_reply = Reply(completion("red"))
        self.models_reply = models(MODEL)
        self.seen: list[Seen] = []
        self.probes = 0
        self.most_at_once = 0
        self.other_paths: list[str] = []
        self._at_once = 0
        self._lock = threading.Lock()
        self._http = _Quiet(("127.0.0.1", port), _handler(self))
        self._http.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def serve(self) -> None:
        self._http.serve_forever()

    def reply_to(self, seen: Seen) -> Reply:
        if seen.is_probe:
            self.probes += 1
            return self.probe_reply
        with self._lock:
            self.seen.append(seen)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            reply = self.answer(seen)
            time.sleep(reply.delay_seconds)
            return reply
        finally:
            with self._lock:
                self._at_once -= 1


class _Quiet(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that went away are part of the tests."""


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path != "/v1/models":
                server.other_paths.append(self.path)
            self._send(server.models_reply if self.path == "/v1/models" else Reply({}, 404))

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/v1/chat/completions":
                server.other_paths.append(self.path)
                self._send(Reply({"error": "no such path"}, 404))
                return
            self._send(server.reply_to(Seen(json.loads(data), dict(self.headers), time.monotonic())))

        def _send(self, reply: Reply) -> None:
            if reply.is_dropped:
                self.close_connection = True
                return
            body = reply.raw()
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.content_type)
            self.send_header("Content-Length", str(len(body)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if reply.cut_after is None else body[: reply.cut_after])
            self.close_connection = self.close_connection or reply.cut_after is not None

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def main() -> None:
    port, good = int(sys.argv[1]), int(sys.argv[2])
    count = 0
    lock = threading.Lock()

    def answer(seen: Seen) -> Reply:
        nonlocal count
        with lock:
            count += 1
            if count > good:
                os._exit(9)
        return Reply(completion(f"answer with {len(seen.pictures)} pictures"))

    server = ChatServer(answer, port)
    sys.stdout.write(server.url + "\n")
    sys.stdout.flush()
    server.serve()


if __name__ == "__main__":
    main()
