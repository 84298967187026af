"""The server closes connections that hold a place without a request, over real sockets and the daemon's protocol."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import uvicorn
from fastapi.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from deploy.exits import ConfigError
from deploy.server.limits import allow_descriptors, make_bounded_protocol, resource
from streams.spec import Limits
from tests.support.daemon import wait_for

LONG, SHORT = 600, 1
REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"
EARLY = b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n"
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer at once on the path /early, otherwise after the whole body."""
    size, more = 0, scope["path"] != "/early"
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await PlainTextResponse(f"{size} bytes")(scope, receive, send)


def make_server(**limits: int) -> uvicorn.Server:
    """Return a server with the daemon's protocol; time limits that ``limits`` omits are long."""
    times = {"header_seconds": LONG, "keep_alive_seconds": LONG}
    made = Limits(**{**times, **limits})
    kept = made.keep_alive_seconds
    return uvicorn.Server(
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


@contextmanager
def serving(**limits: int) -> Iterator[Callable[[], socket.socket]]:
    """Serve on a free port; yield a function that connects."""
    server = make_server(**limits)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for("the server has started", lambda: server.started)
        yield lambda: socket.create_connection(listener.getsockname(), timeout=60)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def read_to_end(connection: socket.socket) -> bytes:
    """Return all bytes until the server closes the connection."""
    try:
        return b"".join(iter(lambda: connection.recv(65536), b""))
    except ConnectionResetError:  # closed with some of our bytes unread
        return b""


class ManualClockLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock that only the test advances."""

    def __init__(self) -> None:
        """Start the clock after zero."""
        self.now = 1000.0
        super().__init__()

    def time(self) -> float:
        return self.now

    def pass_seconds(self, seconds: float) -> None:
        """Advance the clock from another thread; return once the loop has run everything that was due."""
        done = threading.Event()

        def advance() -> None:
            self.now += seconds
            self.call_soon(self.call_soon, self.call_soon, done.set)

        self.call_soon_threadsafe(advance)
        assert done.wait(60)


@contextmanager
def serving_by(loop: ManualClockLoop, **limits: int) -> Iterator[Callable[[], socket.socket]]:
    """Serve like ``serving``, on the clock of ``loop``."""
    server = make_server(**limits)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(server.serve(sockets=[listener]))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        wait_for("the server has started", lambda: server.started)
        yield lambda: socket.create_connection(listener.getsockname(), timeout=60)
    finally:
        server.should_exit = True
        while thread.is_alive():  # The server checks every tenth of a second on this clock.
            loop.call_soon_threadsafe(setattr, loop, "now", loop.now + 0.1)
            thread.join(0.01)
        listener.close()


def is_open(connection: socket.socket) -> bool:
    """Return whether the server still holds a connection open; its answer stays unread."""
    connection.setblocking(False)
    try:
        seen = connection.recv(65536, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    finally:
        connection.settimeout(60)
    return bool(seen)


INCOMPLETE = {
    "a header a while": (HEAD, b"a", b"HTTP/1.1 408 Request Timeout"),
    "a method": (b"POST", b"", b"HTTP/1.1 408"),
    "blank lines": (b"", b"\r\n", b""),
    "nothing": (b"", b"", b""),
    "blank lines after": (REQUEST, b"\r\n", b"HTTP/1.1 200"),
    "a body that nobody reads": (EARLY, b"a", b"HTTP/1.1 200"),
    "a second request": (REQUEST + HEAD, b"a", b"HTTP/1.1 200"),
}


def take_answer(connection: socket.socket) -> None:
    """Read the answer to ``REQUEST``, which may come in pieces."""
    said = b""
    while not said.endswith(b"4 bytes"):
        came = connection.recv(65536)
        assert came, said
        said += came
    assert said.startswith(b"HTTP/1.1 200")


def ask(connect: Callable[[], socket.socket]) -> None:
    """Send a request and read its answer. By then the server has read everything sent before."""
    with connect() as connection:
        connection.sendall(REQUEST)
        take_answer(connection)


def test_an_incomplete_request_is_disconnected_and_an_active_one_is_not() -> None:
    loop = ManualClockLoop()
    with ExitStack() as stack:
        connect = stack.enter_context(serving_by(loop, header_seconds=SHORT))
        working = stack.enter_context(connect())
        held = {case: stack.enter_context(connect()) for case in INCOMPLETE}
        working.sendall(REQUEST[:-2])
        for case, (begin, piece, _) in INCOMPLETE.items():
            held[case].sendall(begin + piece)
        ask(connect)
        loop.pass_seconds(0.9 * SHORT)
        assert all(is_open(connection) for connection in held.values())
        for case, (_, piece, _) in INCOMPLETE.items():
            held[case].sendall(piece)  # sending more bytes gives no more time
        ask(connect)
        loop.pass_seconds(0.2 * SHORT)
        for case, (begin, _, said) in INCOMPLETE.items():
            answer = read_to_end(held[case])
            assert answer.startswith(said), case
            assert bool(answer) == bool(said), case
            assert (b"408" in answer) == (begin.endswith(HEAD) or begin == b"POST"), (
                "only a request that has begun gets a 408"
            )
        loop.pass_seconds(SHORT)  # a body has its own time limit
        working.sendall(REQUEST[-2:])
        take_answer(working)
        loop.pass_seconds(1.5 * SHORT)  # idle for less than keep_alive_seconds
        working.sendall(REQUEST)
        take_answer(working)


def test_an_idle_connection_is_closed() -> None:
    loop = ManualClockLoop()
    with serving_by(loop, keep_alive_seconds=SHORT) as connect, connect() as connection:
        connection.sendall(REQUEST)
        take_answer(connection)
        loop.pass_seconds(0.9 * SHORT)
        assert is_open(connection)
        loop.pass_seconds(0.2 * SHORT)
        assert read_to_end(connection) == b""


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
        step = 100  # after a body, the bytes that came with its end count towards the next headers
    with serving(header_bytes=2000) as connect, connect() as connection:
        for at in range(0, len(sent), step):
            try:
                connection.sendall(sent[at : at + step])
            except OSError:
                break
            if step == 100:
                time.sleep(0.002)
        said = read_to_end(connection)
        assert b"HTTP/1.1 431" in said or (step == 100 and not said), said
        assert not said or b"more than 2000 bytes" in said


def test_a_large_body_does_not_count_as_headers() -> None:
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


def test_the_number_of_connections_is_bounded() -> None:
    with serving(connections=3) as connect:
        held = [connect() for _ in range(3)]
        for connection in held:
            connection.sendall(REQUEST)
            assert b"4 bytes" in connection.recv(65536)
        with connect() as late:
            said = read_to_end(late)
        assert said.startswith(b"HTTP/1.1 503 Service Unavailable")
        assert b"Retry-After: 1\r\n" in said
        assert b"too_many_connections" in said
        held[0].sendall(REQUEST)
        assert b"4 bytes" in held[0].recv(65536), "open connections are still served"
        for connection in held:
            connection.close()

        def taken() -> bool:
            with connect() as again:
                try:
                    again.sendall(REQUEST)
                    return again.recv(65536).startswith(b"HTTP/1.1 200")
                except OSError:
                    return False

        wait_for("a connection is free again", taken)


def test_the_descriptor_limit_fits_the_number_of_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, bounds: asked.append(bounds))
    allow_descriptors(Limits(connections=50))
    assert asked == []
    allow_descriptors(Limits(connections=500))
    assert asked == [(700, 4096)]
    with pytest.raises(ConfigError, match=r"connections = 5000 needs 5200 open files, .*at most 3896"):
        allow_descriptors(Limits(connections=5000))
