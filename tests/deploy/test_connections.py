"""A connection that holds a place in vain is closed, over real sockets of a server with the daemon's protocol."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import uvicorn
from fastapi.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from deploy.exits import ConfigError
from deploy.server.limits import allow_descriptors, make_bounded_protocol, resource
from streams.spec import Limits
from tests.daemon import wait_for

LONG, SHORT = 600, 1
REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"
EARLY = b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n"
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer at once where the path is /early, else after the whole body."""
    size, more = 0, scope["path"] != "/early"
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await PlainTextResponse(f"{size} bytes")(scope, receive, send)


@contextmanager
def serving(**limits: int) -> Iterator[Callable[[], socket.socket]]:
    """Serve on a free port, with long times where ``limits`` has no others; give what connects."""
    times = {"header_seconds": LONG, "keep_alive_seconds": LONG}
    made = Limits(**{**times, **limits})
    kept = made.keep_alive_seconds
    server = uvicorn.Server(
        uvicorn.Config(
            echo,
            http=make_bounded_protocol(made),
            ws="none",
            timeout_keep_alive=kept,
            log_config=None,
            lifespan="off",
            workers=1,
        )
    )
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for("it serves", lambda: server.started)
        yield lambda: socket.create_connection(listener.getsockname(), timeout=60)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def rest(connection: socket.socket) -> bytes:
    """Return what comes until the server closes."""
    try:
        return b"".join(iter(lambda: connection.recv(65536), b""))
    except ConnectionResetError:  # closed while something of ours was unread
        return b""


def trickle(connection: socket.socket, piece: bytes) -> bytes:
    """Send a piece again and again until the server closes; return what it said."""
    connection.settimeout(0.05)
    said = b""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            connection.sendall(piece)
            if not (came := connection.recv(65536)):
                return said
            said += came
        except TimeoutError:
            continue
        except OSError:
            return said
    raise AssertionError("it is never closed")


IN_VAIN = {
    "a header a while": (HEAD, b"a", b"HTTP/1.1 408 Request Timeout"),
    "a method": (b"POST", b"", b"HTTP/1.1 408"),
    "blank lines": (b"", b"\r\n", b""),
    "nothing": (b"", b"", b""),
    "blank lines after": (REQUEST, b"\r\n", b"HTTP/1.1 200"),
    "a body that nobody reads": (EARLY, b"a", b"HTTP/1.1 200"),
    "a second request": (REQUEST + HEAD, b"a", b"HTTP/1.1 200"),
}


def test_who_does_not_come_to_the_end_of_a_request_is_let_go_and_who_is_at_work_is_not() -> None:
    def hold(case: str) -> bytes:
        begin, piece, _ = IN_VAIN[case]
        with connect() as connection:
            connection.sendall(begin)
            return trickle(connection, piece)

    with serving(header_seconds=SHORT) as connect, ThreadPoolExecutor(len(IN_VAIN)) as pool, connect() as working:
        answers = {case: pool.submit(hold, case) for case in IN_VAIN}
        working.sendall(REQUEST[:-2])
        for case, (begin, _, said) in IN_VAIN.items():
            answer = answers[case].result()
            assert answer.startswith(said), case
            assert bool(answer) == bool(said), case
            assert (b"408" in answer) == (begin.endswith(HEAD) or begin == b"POST"), "no answer to what is no request"
        time.sleep(SHORT)  # a body has its own time
        working.sendall(REQUEST[-2:])
        assert b"4 bytes" in working.recv(65536)
        time.sleep(1.5 * SHORT)  # at rest, for less than keep_alive_seconds
        working.sendall(REQUEST)
        assert b"4 bytes" in working.recv(65536)


def test_a_connection_without_requests_is_closed() -> None:
    with serving(keep_alive_seconds=SHORT) as connect, connect() as connection:
        connection.sendall(REQUEST)
        assert rest(connection).startswith(b"HTTP/1.1 200")


LONG_HEADERS = {
    "ends": HEAD + b"X: " + b"a" * 3000 + b"\r\n\r\n",
    "does not end": HEAD + b"X: " + b"a" * 3000,
    "address": b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\n\r\n",
    "many": HEAD + b"X: y\r\n" * 900 + b"\r\n",
    "extension": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * 3000,
    "trailer": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: " + b"a" * 3000,
}


@pytest.mark.parametrize("case", LONG_HEADERS)
@pytest.mark.parametrize("step", [100, 100_000], ids=["in pieces", "in one"])
def test_headers_are_bounded(case: str, step: int) -> None:
    sent = LONG_HEADERS[case]
    if case == "trailer":
        step = 100  # behind a body, what came with its end counts with what comes next
    with serving(header_bytes=2000) as connect, connect() as connection:
        for at in range(0, len(sent), step):
            try:
                connection.sendall(sent[at : at + step])
            except OSError:
                break
            if step == 100:
                time.sleep(0.002)
        said = rest(connection)
        assert b"HTTP/1.1 431" in said or (step == 100 and not said), said
        assert not said or b"more than 2000 bytes" in said


def test_a_large_body_counts_for_no_header() -> None:
    body = bytes(300_000)
    pieces = b"".join(b"%x\r\n%s\r\n" % (1000, body[:1000]) for _ in range(300))
    head = b"POST / HTTP/1.1\r\nHost: x\r\n"
    with serving(header_bytes=2000) as connect, connect() as connection:
        for request in (
            head + b"Content-Length: 300000\r\n\r\n" + body,
            head + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n",
        ):
            for _ in range(3):
                connection.sendall(request)
                assert b"300000 bytes" in connection.recv(65536)


def test_so_many_connections_and_no_more() -> None:
    with serving(connections=3) as connect:
        held = [connect() for _ in range(3)]
        for connection in held:
            connection.sendall(REQUEST)
            assert b"4 bytes" in connection.recv(65536)
        with connect() as late:
            said = rest(late)
        assert said.startswith(b"HTTP/1.1 503 Service Unavailable")
        assert b"Retry-After: 1\r\n" in said
        assert b"too_many_connections" in said
        held[0].sendall(REQUEST)
        assert b"4 bytes" in held[0].recv(65536), "who is there is served"
        for connection in held:
            connection.close()

        def taken() -> bool:
            with connect() as again:
                try:
                    again.sendall(REQUEST)
                    return again.recv(65536).startswith(b"HTTP/1.1 200")
                except OSError:
                    return False

        wait_for("there is room again", taken)


def test_as_many_descriptors_are_asked_for_as_there_may_be_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, bounds: asked.append(bounds))
    allow_descriptors(Limits(connections=50))
    assert asked == []
    allow_descriptors(Limits(connections=500))
    assert asked == [(700, 4096)]
    with pytest.raises(ConfigError, match=r"connections = 5000 needs 5200 open files, .*at most 3896"):
        allow_descriptors(Limits(connections=5000))
