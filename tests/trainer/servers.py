"""A server as OpenAI's, of this process: what it answers follows from the request alone."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "fake/chatty"


def words(*of: object) -> str:
    """A few words that these values, and no others, give."""
    digest = hashlib.sha256(repr(of).encode()).hexdigest()
    return " ".join(digest[i : i + 4] for i in range(0, 16, 4))


class FakeServer:
    """Answers on a port of its own until it dies; it may come back on the same one.

    Args:
        fault: of a request's number and body: None, a status, or one of the names below.
        n: what it does with that field: takes, ignores or refuses it.
        delay: of a request's number: seconds (or None) before it is answered.

    Attributes:
        asked: bodies of all requests that were posted.
        keys: what stood in their header Authorization.
        retry_after: what it says beside 429.
        dies_at: the number of the request that it dies of.
    """

    def __init__(
        self,
        fault: Callable[[int, dict], object] = lambda number, body: None,
        n: str = "takes",
        delay: Callable[[int], float | None] = lambda number: None,
    ) -> None:
        self.fault, self.n, self.delay = fault, n, delay
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.models: dict = {"data": [{"id": MODEL}]}
        self.port, self.dies_at, self.retry_after = 0, -1, "0.01"
        self.released = threading.Event()
        self.live()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.die()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def live(self) -> None:
        owner = self

        class Handler(_Handler):
            server_of = owner

        self.released.clear()
        self.http = _Quiet(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def die(self) -> None:
        """End at once, in the middle of what is under way."""
        self.released.set()
        self.http.shutdown()
        for connection in list(self.http.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self.http.server_close()

    def answer(self, path: str, body: dict) -> tuple[int, bytes]:
        prompt = body.get("prompt") or json.dumps(body.get("messages"))
        if "n" in body and self.n == "refuses":
            return 422, b'{"detail": "Unexpected fields in the request: {\'n\'}"}'
        if "REFUSED" in prompt:
            return 400, b'{"error": {"message": "too long \\u001b[2J for me", "code": 400}}'
        choices = []
        for i in range(body.get("n", 1) if self.n == "takes" else 1):
            text, end = f" {words(prompt, body.get('seed'), i, body['temperature'])} ", "stop"
            if "EMPTY" in prompt and i == 0:
                text = " \n"
            if "CUT" in prompt and i == 0:
                end = "length"
            if "FILTERED" in prompt and i == 0:
                end = "content_filter"
            if "STOPS" in prompt:
                text, end = f"{text}\n\nHuman: more", "length"
            if "CONTROL" in prompt:
                text = f"\u0000\u001b[31m\u2028{text}"
            said = {"text": text} if path.endswith("/completions") and "prompt" in body else {
                "message": {"role": "assistant", "content": text}
            }  # fmt: skip
            choices.append({"index": i, "finish_reason": end, **said})
        choices.reverse()  # nothing promises their order
        usage = {"completion_tokens": 4 * len(choices)}
        return 200, json.dumps({"choices": choices, "usage": usage}).encode()


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, *args: object) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request, client_address) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def handle_error(self, request, client_address) -> None:
        """A client that goes away is none of ours."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: FakeServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(200, json.dumps(self.server_of.models).encode())

    def do_POST(self) -> None:
        owner = self.server_of
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            number = len(owner.asked)
            owner.asked.append(body)
            owner.keys.append(self.headers.get("Authorization"))
        if number == owner.dies_at:
            return owner.die()
        time.sleep(owner.delay(number) or 0)
        fault = owner.fault(number, body)
        if isinstance(fault, int):
            key = owner.keys[-1]
            said = json.dumps({"error": {"message": f"no, {key}: go away"}}).encode()
            return self.reply(
                fault, said, {"Retry-After": owner.retry_after} if fault == 429 else {}
            )
        status, answer = owner.answer(self.path, body)
        if fault == "hangs":
            owner.released.wait(20)
        elif fault == "breaks off":
            self.reply(status, answer, cut=len(answer) // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        return self.reply(status, _SPOILT.get(fault, lambda answer: answer)(answer))

    def reply(
        self, status: int, answer: bytes, headers: dict | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        try:
            self.wfile.write(answer[:cut])
        except OSError:
            self.close_connection = True


_LONE = {"choices": [{"text": "\ud800", "message": {"content": "\udfff"}}]}
_SPOILT = {  # what becomes of a right answer
    "floods": lambda answer: b'{"choices": "' + b"x" * 10_000_000 + b'"}',
    "raw control characters": lambda answer: answer.replace(b"index", b"in\x00dex\x1b"),
    "not UTF-8": lambda answer: answer.replace(b"stop", b"st\xffp"),
    "a lone surrogate": lambda answer: json.dumps(_LONE).encode(),
    "another form": lambda answer: b'{"choices": [3]}',
    "deep": lambda answer: b"[" * 100_000,
}
FAULTS = (429, 500, 503, "breaks off", *_SPOILT)
