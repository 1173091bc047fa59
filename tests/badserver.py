"""A real HTTP server on the loopback that misbehaves on demand.

A behaviour is a function of the handler and the request's JSON. `script` says which one each
request gets, by its number; whatever lies beyond its end gets `then`.
"""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Behaviour = Callable[["Handler", dict[str, Any]], None]


@dataclass(frozen=True)
class Request:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "BadServer"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        behaviour = self.server.note(Request(self.path, dict(self.headers), body, time.monotonic()))
        try:
            behaviour(self, body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.server.leave()

    def do_GET(self) -> None:
        send(self, 200, {"data": [{"id": name} for name in self.server.models]})

    def log_message(self, format: str, *args: Any) -> None:
        pass


@dataclass
class _State:
    script: list[Behaviour] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    active: int = 0
    most_active: int = 0


class BadServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script: Sequence[Behaviour] = (), then: Behaviour | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self._state = _State(list(script))
        self._lock = threading.Lock()
        self.then = then or ok()
        self.models = ["toy"]
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def requests(self) -> list[Request]:
        return self._state.requests

    @property
    def most_active(self) -> int:
        return self._state.most_active

    def note(self, request: Request) -> Behaviour:
        with self._lock:
            state = self._state
            state.requests.append(request)
            state.active += 1
            state.most_active = max(state.most_active, state.active)
            return state.script.pop(0) if state.script else self.then

    def leave(self) -> None:
        with self._lock:
            self._state.active -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that leave in the middle are what these tests are about

    def __enter__(self) -> "BadServer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()
        self.server_close()


def send(handler: Handler, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def completion(
    handler: Handler, body: dict[str, Any], text: str | None, model: str, reason: str | None
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
    if handler.path.split("?")[0].endswith("/chat/completions"):
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    return {
        "model": model,
        "choices": [choice],
        "usage": {"completion_tokens": len((text or "").split())},
    }


def ok(
    text: str | None = None, model: str = "toy", reason: str | None = "stop", **extra: Any
) -> Behaviour:
    """Answers with `text`, or with what was asked, in other words."""

    def behave(handler: Handler, body: dict[str, Any]) -> None:
        asked = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        said = f"You said {asked}" if text is None else text
        send(handler, 200, completion(handler, body, said, model, reason) | extra)

    return behave


def raw(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Behaviour:
    return lambda handler, request: send(handler, status, body, headers)


def error(status: int, message: str = "no", headers: dict[str, str] | None = None) -> Behaviour:
    return raw({"error": {"message": message}}, status, headers)


def slow(seconds: float, then: Behaviour | None = None) -> Behaviour:
    def behave(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(seconds)
        (then or ok())(handler, body)

    return behave


def dribble(seconds: float, pause: float = 0.02) -> Behaviour:
    """Sends something again and again, and never all of it."""

    def behave(handler: Handler, body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(pause)
        handler.close_connection = True

    return behave


def cut(handler: Handler, body: dict[str, Any]) -> None:
    """Promises more than it sends."""
    data = json.dumps(completion(handler, body, "half", "toy", "stop")).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True


def cut_silently(handler: Handler, body: dict[str, Any]) -> None:
    """Sends half of an answer in a form that does not say how long it is."""
    data = json.dumps(completion(handler, body, "half", "toy", "stop")).encode()
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True


def reset(handler: Handler, body: dict[str, Any]) -> None:
    """Breaks the connection without a word."""
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.connection.close()
    handler.close_connection = True


def ok_and_close(handler: Handler, body: dict[str, Any]) -> None:
    """Answers, and keeps no connection open for more."""
    ok()(handler, body)
    handler.close_connection = True


def hang_up(handler: Handler, body: dict[str, Any]) -> None:
    """Closes the connection instead of answering."""
    handler.close_connection = True


@contextmanager
def closed_port() -> Any:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]
