"""Read a NATS JetStream stream as a source, and connect sources and producers to NATS."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo, DeliverPolicy
from nats.js.client import JetStreamContext

from streams.brokers.gaps import GapLog
from streams.brokers.login import (
    LoginRefused,
    NatsLogin,
    check_address,
    hide_secrets,
    make_tls_context,
    next_fetch_count,
    read_secret,
    translate_login_errors,
)
from streams.brokers.settings import NatsSettings as Settings
from streams.private_files import check_private
from streams.types import Arrival, Gap

Result = TypeVar("Result")


class EventLoopThread:
    """A thread with an event loop that runs coroutines for blocking callers and keeps connections alive meanwhile."""

    def __init__(self, name: str) -> None:
        """Start the thread ``name``."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result], seconds: float) -> Result:
        """Run a coroutine and return its result; after ``seconds``, cancel it and raise ``TimeoutError``."""
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, seconds), self._loop).result()

    def close(self) -> None:
        """Cancel all remaining coroutines and stop the thread."""
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


CLOSE_SECONDS = 1.0
"""How long to wait for a connection to close after a failed TLS handshake; the client library would wait forever."""


class _TlsOnlyClient(Client):
    """A client that logs in only over TLS; the library falls back to plain text if a server offers no TLS."""

    def _connect_command(self) -> bytes:
        if not self._server_info.get("tls_required"):
            raise LoginRefused("TLS is configured but the server does not require it: no credentials were sent")
        return super()._connect_command()


class Connection:
    """A connection to NATS within one event loop; it never reconnects, so its user must open a new one."""

    def __init__(self) -> None:
        """Create an unconnected client; ``open`` connects it."""
        self.client: Client = Client()
        self._closed = asyncio.Event()

    async def open(self, servers: str, seconds: float, login: NatsLogin) -> None:
        """Connect to a server.

        Args:
            servers: a nats:// or tls:// address, or several separated by commas.
            seconds: the timeout for connecting, and roughly for an unresponsive server.
            login: the login; its files are read by this call.

        Raises:
            LoginRefused: if the server refuses the login, or its certificate is not trusted.
            ValueError: if an address or a login file is invalid.
            OSError: if a login file cannot be read, or no server can be reached.
            nats.errors.Error: for any other error of the client library.
        """
        check_servers(servers, login)
        options = read_login(login)
        if "tls" in options or "tls://" in servers:
            self.client = _TlsOnlyClient()

        async def ignore_error(error: Exception) -> None:
            """Do nothing: the failing call raises the error."""

        async def mark_closed() -> None:
            self._closed.set()

        try:
            with translate_login_errors(hide_secrets(servers), nats.errors.AuthorizationError):
                await self._connect(
                    servers=servers.split(","),
                    allow_reconnect=False,
                    max_reconnect_attempts=1,  # also limits the first attempts; the library ignores smaller numbers
                    reconnect_time_wait=0,
                    connect_timeout=max(1, round(seconds)),
                    ping_interval=max(1, round(seconds / 2)),
                    max_outstanding_pings=1,  # detects a dead connection
                    error_cb=ignore_error,
                    closed_cb=mark_closed,
                    **options,
                )
        except BaseException:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.client.close(), CLOSE_SECONDS)
            raise

    async def _connect(self, **options: Any) -> None:
        """Connect; raise ``nats.errors.AuthorizationError`` where the library raises an unspecific error."""
        try:
            await self.client.connect(**options)
        except nats.errors.Error as error:
            if "authorization" in str(error).lower() or "authentication" in str(error).lower():
                raise nats.errors.AuthorizationError(str(error)) from error
            raise

    async def close(self) -> None:
        """Close the connection and wait for its end; a lost connection may still be closing itself."""
        await self.client.close()
        await self._closed.wait()


def check_servers(servers: str, login: NatsLogin) -> None:
    """Raise ``ValueError`` unless each of some addresses, separated by commas, is one of a NATS server."""
    for server in servers.split(","):
        check_address("servers", server, ("nats", "tls"), "/?")
        if "@" in server and (login.user or login.token_file or login.credentials_file):
            raise ValueError(f"{hide_secrets(server)}: the address contains a login, and the settings another one")


def read_login(login: NatsLogin) -> dict[str, Any]:
    """Return the options of the client library for a login.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is invalid, or only one of user and password is set.
    """
    if (login.user is None) != (login.password_file is None):
        raise ValueError("user and password_file belong together: one of them is missing")
    context = make_tls_context(login)
    options: dict[str, Any] = {} if context is None else {"tls": context}
    if login.user is not None and login.password_file is not None:
        options |= {"user": login.user, "password": read_secret(login.password_file)}
    if login.token_file is not None:
        options["token"] = read_secret(login.token_file)
    if login.credentials_file is not None:
        check_private(login.credentials_file)
        with open(login.credentials_file, "rb"):  # the errors of the library do not name the file
            options["user_credentials"] = login.credentials_file
    return options


WAIT_SECONDS = 0.25


Run = Callable[..., Any]
"""Runs a coroutine and returns its result."""


class NatsStream:
    """A ``TaskSource`` that ``ReportsLag`` and ``ReportsGaps``; its cursor is a message's sequence number."""

    def __init__(self, settings: Settings, name: str) -> None:
        """Take the settings and the source's name; ``read`` connects."""
        self._settings, self._name = settings, name
        self._gaps = GapLog(name)

    def listen_for_gaps(self, listener: Callable[[Gap], None]) -> None:
        """Call ``listener`` with the messages that the server deleted before they were read."""
        self._gaps.listen(listener)

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the messages after the position.

        Raises:
            ConnectionError: if the server cannot be reached.
            nats.errors.Error: if the server refuses a request, or the connection is lost later.
            LoginRefused: if the server refuses the login, or its certificate is not trusted.
            ValueError: if the stream ends before the position, so that it is not the stream that was read before.
        """
        position = _sequence(after)
        with self._stream("source") as (run, stream):
            subscription = run(self._subscribe(stream, position))
            count, delivered = 1, 0
            while True:
                messages = run(_fetch(subscription, count))
                if not messages:
                    yield None
                    continue
                count = min(next_fetch_count(self._settings.batch, [len(one.data) for one in messages]), 4 * count)
                if position and self._settings.subject is not None and _sequence_of(messages[0]) > position + 1:
                    run(self._find_gap(stream, position))
                for message in messages:
                    delivered += 1
                    arrival = self._make_arrival(message, delivered)
                    if position and self._settings.subject is None and _sequence_of(message) > position + 1:
                        self._note_gap(position, _sequence_of(message))
                    position = _sequence_of(message)
                    yield arrival

    def lag(self, after: str | None) -> int | None:
        """Return the number of messages after the position."""
        with self._stream("lag") as (run, stream):
            waiting: int = run(self._count(stream, _sequence(after)))
        return waiting

    @contextmanager
    def _stream(self, purpose: str) -> Iterator[tuple[Run, JetStreamContext]]:
        """Connect, and yield a function that runs coroutines and the server's JetStream."""
        settings, loop = self._settings, EventLoopThread(f"{purpose}-{self._name}")
        run = partial(loop.run, seconds=3 * settings.timeout_seconds)
        try:
            connection = Connection()
            try:
                run(connection.open(settings.servers, settings.timeout_seconds, settings))
            except (NatsError, OSError, TimeoutError) as error:
                raise ConnectionError(
                    f"{hide_secrets(settings.servers)}: {str(error) or type(error).__name__}"
                ) from error
            try:
                yield run, connection.client.jetstream(timeout=settings.timeout_seconds)
            finally:
                with suppress(TimeoutError):  # the server need not notice
                    run(connection.close())
        finally:
            loop.close()

    async def _subscribe(self, stream: JetStreamContext, position: int) -> JetStreamContext.PullSubscription:
        """Check that the stream still contains the position, and subscribe after it."""
        state = (await stream.stream_info(self._settings.stream)).state
        if state.last_seq < position:
            raise ValueError(
                f"the stream {self._settings.stream} ends at {state.last_seq}, before the committed position "
                f"{position}: was it recreated? Give the source another name to read it from its start"
            )
        await self._find_gap(stream, position)
        consumer = await self._add_consumer(stream, position)
        return await stream.pull_subscribe_bind(consumer=consumer.name, stream=self._settings.stream)

    async def _add_consumer(self, stream: JetStreamContext, position: int) -> ConsumerInfo:
        """Create a consumer without acknowledgements, which the server deletes after an hour of inactivity."""
        config = ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE if position else DeliverPolicy.ALL,
            opt_start_seq=position + 1 if position else None,
            ack_policy=AckPolicy.NONE,
            filter_subject=self._settings.subject,
            inactive_threshold=3600.0,
            mem_storage=True,
        )
        return await stream.add_consumer(self._settings.stream, config)

    async def _find_gap(self, stream: JetStreamContext, position: int) -> None:
        """Note it if the stream begins after the message that follows a position."""
        first = (await stream.stream_info(self._settings.stream)).state.first_seq
        if position and first > position + 1:
            self._note_gap(position, first)

    def _note_gap(self, position: int, found: int) -> None:
        """Note that the messages between two sequence numbers are gone; of a subject, perhaps none were of this one."""
        count = found - position - 1 if self._settings.subject is None else None
        gap = Gap(f"the stream {self._settings.stream}", str(position + 1), str(found - 1), count)
        some = "" if count is not None else f" (and some may have been of the subject {self._settings.subject})"
        self._gaps.note(
            gap,
            f"the messages {gap.first} to {gap.last} of {gap.where} were deleted before they were read{some}; increase "
            "the stream's retention",
        )

    async def _count(self, stream: JetStreamContext, position: int) -> int:
        consumer = await self._add_consumer(stream, position)
        await stream.delete_consumer(self._settings.stream, consumer.name)
        return consumer.num_pending or 0

    def _make_arrival(self, message: Msg, delivered: int) -> Arrival:
        """Return a message as an arrival; raise ``ConnectionError`` if an earlier message was lost in transit."""
        number = message.metadata.sequence
        if number.consumer != delivered:
            raise ConnectionError(f"message {delivered} was lost in transit; {number.consumer} arrived")
        id = (message.headers or {}).get("id", f"{self._settings.stream}:{number.stream}")
        return Arrival(id, message.data, self._name, str(number.stream))


def _sequence_of(message: Msg) -> int:
    """Return the sequence number of a message in its stream."""
    return int(message.metadata.sequence.stream)


async def _fetch(subscription: JetStreamContext.PullSubscription, count: int) -> list[Msg]:
    """Return up to ``count`` messages; return [] if none arrives within ``WAIT_SECONDS``."""
    try:
        messages: list[Msg] = await subscription.fetch(count, timeout=WAIT_SECONDS)
    except TimeoutError:  # that of nats, or the built-in one if the deadline passes between its two requests
        return []
    return messages


def _sequence(cursor: str | None) -> int:
    """Parse the sequence number in a cursor; 0 if there is none."""
    if cursor is None:
        return 0
    if not cursor.isdecimal():
        raise ValueError(f"the position {cursor!r} is not a sequence number of a stream")
    return int(cursor)
