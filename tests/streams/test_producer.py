import email.utils
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from streams.producers import SubmitError, connect, errors, http, submit
from streams.types import Receipt

Answer = tuple[int, dict[str, str], bytes]
BACKOFF_SECONDS = 0.001
KEPT: Answer = (201, {}, b'{"id": "a", "round": 7}')


class ScriptedServer:
    """A real HTTP server that returns scripted answers, repeats the last one, and records the requests."""

    def __init__(self, *script: Answer) -> None:
        self.script = list(script)
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.connections: set[tuple[str, int]] = set()
        daemon = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                daemon.asked.append((self.path, dict(self.headers), body))
                daemon.connections.add(self.client_address)
                status, headers, text = daemon.script.pop(0) if len(daemon.script) > 1 else daemon.script[0]
                if status == 0:
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *text: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ScriptedServer]]:
    monkeypatch.setattr(errors, "_BACKOFF", lambda state: BACKOFF_SECONDS)
    running: list[ScriptedServer] = []

    def start(*script: Answer) -> ScriptedServer:
        running.append(ScriptedServer(*script))
        return running[-1]

    yield start
    for daemon in running:
        daemon.stop()


def refused(status: int, **headers: str) -> Answer:
    text = {"reason": "because", "detail": "It is so."}
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(text).encode()


def test_a_task_is_posted_with_its_id_and_token(serve: Callable[..., ScriptedServer]) -> None:
    daemon = serve(KEPT)
    assert submit(daemon.url + "/", "a", b"body", token="secret") == Receipt("a", 7, duplicate=False)
    path, headers, body = daemon.asked[0]
    assert (path, body) == ("/v1/tasks", b"body")
    assert headers["Idempotency-Key"] == "a"
    assert headers["Authorization"] == "Bearer secret"


def test_a_duplicate_is_reported_as_one(serve: Callable[..., ScriptedServer]) -> None:
    daemon = serve((200, {}, b'{"id": "a", "round": 7}'))
    assert submit(daemon.url, "a", b"") == Receipt("a", 7, duplicate=True)
    assert "Authorization" not in daemon.asked[0][1]


@pytest.mark.parametrize("status", [0, 429, 500, 502, 503, 504, 507])
def test_a_temporary_failure_is_retried_with_the_same_id(serve: Callable[..., ScriptedServer], status: int) -> None:
    daemon = serve(refused(status), refused(status), KEPT)
    assert submit(daemon.url, "a", b"body").round == 7
    assert [(headers["Idempotency-Key"], body) for _, headers, body in daemon.asked] == [("a", b"body")] * 3


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422])
def test_a_permanent_failure_is_raised_at_once(serve: Callable[..., ScriptedServer], status: int) -> None:
    daemon = serve(refused(status), KEPT)
    with pytest.raises(SubmitError, match="because") as caught:
        submit(daemon.url, "a", b"body")
    assert (caught.value.status, caught.value.reason, caught.value.detail) == (status, "because", "It is so.")
    assert len(daemon.asked) == 1


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the seconds that a producer would sleep, without sleeping."""
    found: list[float] = []
    monkeypatch.setattr(errors, "_SLEEP", found.append)
    return found


def test_retry_after_is_obeyed(serve: Callable[..., ScriptedServer], slept: list[float]) -> None:
    daemon = serve(refused(429, Retry_After="30"), refused(503), KEPT)
    assert submit(daemon.url, "a", b"").round == 7
    assert slept == [30 + BACKOFF_SECONDS, BACKOFF_SECONDS]


def test_a_retry_after_beyond_the_time_limit_is_not_waited_for(serve: Callable[..., ScriptedServer]) -> None:
    daemon = serve(refused(429, Retry_After="3600"), KEPT)
    with pytest.raises(SubmitError) as caught:
        submit(daemon.url, "a", b"", retry_seconds=5)
    assert caught.value.status == 429
    assert len(daemon.asked) == 1


def test_retries_end_at_the_time_limit(serve: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """No attempt starts after ``retry_seconds``: the wait after the third attempt would be too long."""
    daemon = serve(refused(507))
    monkeypatch.setattr(errors, "_BACKOFF", lambda state: BACKOFF_SECONDS if state.attempt_number < 3 else 300.0)
    with pytest.raises(SubmitError) as caught:
        submit(daemon.url, "a", b"", retry_seconds=200)
    assert caught.value.status == 507
    assert len(daemon.asked) == 3
    with pytest.raises(SubmitError):
        submit(daemon.url, "a", b"", retry_seconds=0)
    assert len(daemon.asked) == 4


def test_a_missing_daemon_is_unreachable() -> None:
    with pytest.raises(SubmitError, match="no answer") as caught:
        submit("http://127.0.0.1:9", "a", b"", retry_seconds=0.05)
    assert (caught.value.status, caught.value.reason) == (None, "unreachable")


@pytest.mark.parametrize("id", ["a\r\nX-Evil: 1", "ä€"])
def test_an_id_that_is_invalid_in_a_header_is_refused_at_once(serve: Callable[..., ScriptedServer], id: str) -> None:
    daemon = serve(KEPT)
    with pytest.raises(SubmitError) as caught:
        submit(daemon.url, id, b"")
    assert caught.value.reason == "bad_request"
    assert daemon.asked == []


@pytest.mark.parametrize("answer", [(201, {}, b"<html>"), (201, {}, b"{}"), (404, {}, b"nothing"), (302, {}, b"")])
def test_another_server_on_the_port_is_detected(serve: Callable[..., ScriptedServer], answer: Answer) -> None:
    with pytest.raises(SubmitError) as caught:
        submit(serve(answer).url, "a", b"")
    assert (caught.value.status, caught.value.reason) == (answer[0], "unexpected_answer")


def test_a_client_reuses_its_connection(serve: Callable[..., ScriptedServer]) -> None:
    daemon = serve(KEPT)
    with connect(daemon.url, token="secret") as client:
        for _ in range(5):
            submit(daemon.url, "a", b"x", client=client)
    assert len(daemon.connections) == 1
    assert {headers["Authorization"] for _, headers, _ in daemon.asked} == {"Bearer secret"}


def test_retry_after_can_be_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000.0
    monkeypatch.setattr(http, "time", SimpleNamespace(time=lambda: now))
    assert http._retry_after_seconds(None) == 0
    assert http._retry_after_seconds("2.5") == 2.5
    assert http._retry_after_seconds("-3") == http._retry_after_seconds("soon") == 0
    assert http._retry_after_seconds(email.utils.formatdate(now + 60, usegmt=True)) == 60
    assert http._retry_after_seconds(email.utils.formatdate(now - 60, usegmt=True)) == 0
