"""Read a JetStream stream from a position of our own."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo, DeliverPolicy
from nats.js.client import JetStreamContext

from streams.arrivals import Arrival
from streams.asynchronous import EventLoopThread
from streams.login import hide_secrets
from streams.nats_connection import Connection
from streams.sources._broker_settings import NatsSettings as Settings
from streams.sources._client import next_fetch_count

WAIT_SECONDS = 0.25
_log = logging.getLogger(__name__)

Run = Callable[..., Any]
"""Runs a coroutine and returns what it returns."""


class NatsStream:
    """A ``TaskSource`` that ``ReportsLag``; its cursor is the sequence number of a message in the stream."""

    def __init__(self, settings: Settings, name: str) -> None:
        """Connect only when it is read."""
        self._settings, self._name = settings, name

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the messages behind the position.

        Raises:
            ConnectionError: when the server cannot be reached; ``nats.errors.Error`` when it refuses, or is lost later.
            LoginRefused: when it does not let us in, or its certificate is not believed.
            ValueError: if the stream ends before the position, so that it is not the one that was read.
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
                for message in messages:
                    delivered += 1
                    yield self._make_arrival(message, delivered)

    def lag(self, after: str | None) -> int | None:
        """Return how many messages lie behind the position."""
        with self._stream("lag") as (run, stream):
            waiting: int = run(self._count(stream, _sequence(after)))
        return waiting

    @contextmanager
    def _stream(self, purpose: str) -> Iterator[tuple[Run, JetStreamContext]]:
        """Connect; give what waits for coroutines, and the server's JetStream."""
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
                with suppress(TimeoutError):  # the server need not know
                    run(connection.close())
        finally:
            loop.close()

    async def _subscribe(self, stream: JetStreamContext, position: int) -> JetStreamContext.PullSubscription:
        """Look whether the stream is the one that was read, and begin behind the position."""
        state = (await stream.stream_info(self._settings.stream)).state
        if state.last_seq < position:
            raise ValueError(
                f"the stream {self._settings.stream} ends at {state.last_seq}, before the committed position "
                f"{position}: was it made anew? Give the source another name to read it from its start"
            )
        if position and state.first_seq > position + 1:
            _log.error(
                "the source %s: the messages %d to %d of the stream %s were deleted before they were read; let it keep "
                "its messages for longer",
                *(self._name, position + 1, state.first_seq - 1, self._settings.stream),
            )
        consumer = await self._add_consumer(stream, position)
        return await stream.pull_subscribe_bind(consumer=consumer.name, stream=self._settings.stream)

    async def _add_consumer(self, stream: JetStreamContext, position: int) -> ConsumerInfo:
        """Make a consumer that the server forgets an hour after it was last asked, and that acknowledges nothing."""
        config = ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE if position else DeliverPolicy.ALL,
            opt_start_seq=position + 1 if position else None,
            ack_policy=AckPolicy.NONE,
            filter_subject=self._settings.subject,
            inactive_threshold=3600.0,
            mem_storage=True,
        )
        return await stream.add_consumer(self._settings.stream, config)

    async def _count(self, stream: JetStreamContext, position: int) -> int:
        consumer = await self._add_consumer(stream, position)
        await stream.delete_consumer(self._settings.stream, consumer.name)
        return consumer.num_pending or 0

    def _make_arrival(self, message: Msg, delivered: int) -> Arrival:
        """Return the message as what it is; raises ``ConnectionError`` if one before it was lost on its way."""
        number = message.metadata.sequence
        if number.consumer != delivered:
            raise ConnectionError(f"message {delivered} was lost on its way; {number.consumer} came")
        id = (message.headers or {}).get("id", f"{self._settings.stream}:{number.stream}")
        return Arrival(id, message.data, self._name, str(number.stream))


async def _fetch(subscription: JetStreamContext.PullSubscription, count: int) -> list[Msg]:
    """Return up to ``count`` messages, none if none came within ``WAIT_SECONDS``."""
    try:
        messages: list[Msg] = await subscription.fetch(count, timeout=WAIT_SECONDS)
    except TimeoutError:  # nats' own, or the built-in one if the deadline passes between its two requests
        return []
    return messages


def _sequence(cursor: str | None) -> int:
    """Return the position that a cursor stands for, 0 for none."""
    if cursor is None:
        return 0
    if not cursor.isdecimal():
        raise ValueError(f"the position {cursor!r} is no sequence number of a stream")
    return int(cursor)
