"""An OpenAI-compatible server in a thread, that answers, refuses, waits and dies as a test tells it."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "stub-7b"
Answer = tuple[int, dict[str, str], str]


def completion(content: str | None, *, model: str = MODEL, finish: str = "stop") -> Answer:
    """A reply with this text."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content}}
    body = {"object": "chat.completion", "model": model, "choices": [choice]}
    return 200, {}, json.dumps(body)


def is_ping(body: dict[str, Any]) -> bool:
    """Whether a request is the small one that comes first."""
    return len(body["messages"]) == 1


@dataclass
class Stub:
    """What the server was asked, and `answer`, which a test may replace; None drops the connection."""

    url: str = ""
    answer: Callable[[dict[str, Any]], Answer | None] = lambda _: completion("{}")
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    @property
    def asked(self) -> list[dict[str, Any]]:
        """Requests but for pings."""
        return [body for body in self.bodies if not is_ping(body)]


@contextmanager
def serve(answer: Callable[[dict[str, Any]], Answer | None]) -> Iterator[Stub]:
    """A server on a free port; pings are answered unless `answer` is marked with `pings`."""
    stub = Stub(answer=answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.bodies.append(body)
            stub.headers.append(dict(self.headers))
            ping = is_ping(body) and not getattr(stub.answer, "pings", False)
            found = completion('{"ok": true}', model=body["model"]) if ping else stub.answer(body)
            if found is None:
                self.close_connection = True
                return
            status, headers, text = found
            data = text.encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):  # whoever asked may be dead
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
