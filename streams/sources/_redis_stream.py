"""Read a Redis stream by a consumer group whose truth is the position in the ledger."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import redis

from streams.arrivals import Arrival
from streams.login import naming_refusal
from streams.redis_connection import REFUSALS, connect, place_of
from streams.sources._broker_settings import RedisSettings as Settings
from streams.sources._client import count_that_fits

BLOCK_MILLISECONDS = 250
START = "0-0"
_log = logging.getLogger(__name__)


class _Entry(NamedTuple):
    """An entry: its id as text and as a number pair, and its fields (None: it was deleted)."""

    at: str
    place: tuple[int, int]
    fields: dict[bytes, bytes] | None


class RedisStream:
    """A ``TaskSource`` that ``Settles`` and ``Lags``.

    Its cursor is an entry id below which nothing is left: entries are given in order and so are committed in order,
    and the cursor is held back below what another consumer of the group was given and has not acknowledged.
    """

    def __init__(self, settings: Settings, consumer: str, name: str) -> None:
        """Read as ``consumer``; ``name`` is the source's."""
        self._settings, self._consumer, self._name = settings, consumer, name
        self._client: Any = None
        self._held: set[str] = set()  # given, and not settled
        self._count = 1
        self._claimed = 0.0

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield what is behind the position: first what was given before and not committed, then what is new.

        Raises:
            redis.RedisError: when the server cannot be reached or does not answer in time.
            LoginRefused: when it does not let us in.
            ValueError: if the position is none.
        """
        stream = self._settings.stream
        with self._connect() as client:
            self._client, self._held, self._claimed = client, set(), 0.0
            low, given = self._join(client, after)
            self._forget(client, low)
            while _place(low) < _place(given):
                page = self._measure(client.xrange(stream, f"({low}", given, self._count))
                if not page:
                    break
                for entry in page:
                    low = entry.at
                    yield from self._arrive([entry], low)
            low = max(low, given, key=_place)
            while True:
                yield from self._arrive(self._claim(client), low)
                new = self._read_new(client)
                others = self._oldest_of_others(client) if new else None
                for entry in new:
                    low = entry.at if others is None or entry.place < others else low
                    yield from self._arrive([entry], low)
                if not new:
                    yield None

    def settle(self, arrivals: Sequence[Arrival]) -> None:
        """Acknowledge entries, and delete them where the settings say so; both or neither."""
        self._acknowledge(self._client, [arrival.ticket for arrival in arrivals if arrival.ticket is not None])

    def lag(self, after: str | None) -> int | None:
        """Return how many entries were not given or not acknowledged; None where Redis cannot say (before 7.0)."""
        with self._connect() as client:
            if after is None or not client.exists(self._settings.stream):
                return int(client.xlen(self._settings.stream))
            group = self._find_group(client)
            if group is None or group.get("lag") is None:
                return None
            return int(group["lag"]) + int(group["pending"])

    @contextmanager
    def _connect(self) -> Iterator[Any]:
        settings = self._settings
        with (
            naming_refusal(place_of(settings.url), *REFUSALS),
            closing(connect(settings.url, settings, settings.timeout_seconds)) as client,
        ):
            yield client

    def _join(self, client: Any, after: str | None) -> tuple[str, str]:
        """Make the group if there is none; return from where to go on, and up to where the group was given entries."""
        stream, group, start = self._settings.stream, self._settings.group, after or START
        _place(start)
        try:
            client.xgroup_create(stream, group, start, mkstream=True)
        except redis.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        last = client.xinfo_stream(stream)["last-generated-id"].decode()
        if _place(last) < _place(start):
            _log.warning(
                "the source %s: the stream ends at %s, before the committed position %s, so it is not what it was: "
                "it is read from its start (a task that is known by its id is not kept twice)",
                *(self._name, last, start),
            )
            client.xgroup_setid(stream, group, START)
            return START, START
        found = self._find_group(client)
        return start, START if found is None else found["last-delivered-id"].decode()

    def _find_group(self, client: Any) -> dict[str, Any] | None:
        wanted = self._settings.group.encode()
        return next((one for one in client.xinfo_groups(self._settings.stream) if one["name"] == wanted), None)

    def _forget(self, client: Any, low: str) -> None:
        """Acknowledge what this consumer was given up to the position: it is durable."""
        stream, group = self._settings.stream, self._settings.group
        while known := client.xpending_range(stream, group, "-", low, 1000, self._consumer):
            self._acknowledge(client, [one["message_id"].decode() for one in known])

    def _acknowledge(self, client: Any, entries: list[str]) -> None:
        with client.pipeline(transaction=True) as both:
            both.xack(self._settings.stream, self._settings.group, *entries)
            if self._settings.delete:
                both.xdel(self._settings.stream, *entries)
            both.execute()
        self._held.difference_update(entries)

    def _read_new(self, client: Any) -> list[_Entry]:
        stream = self._settings.stream
        answer = client.xreadgroup(
            self._settings.group, self._consumer, {stream: ">"}, count=self._count, block=BLOCK_MILLISECONDS
        )
        return self._measure(answer[0][1] if answer else [])

    def _measure(self, answer: Any) -> list[_Entry]:
        """Return the entries of an answer; how large they are says how many are asked for next time."""
        found = _entries(answer)
        if found:
            sizes = [sum(map(len, entry.fields.values())) for entry in found if entry.fields]
            self._count = min(count_that_fits(self._settings.batch, sizes), 4 * self._count)
        return found

    def _oldest_of_others(self, client: Any) -> tuple[int, int] | None:
        """Return the oldest entry that another consumer was given and has not acknowledged."""
        stream, group = self._settings.stream, self._settings.group
        oldest = [
            client.xpending_range(stream, group, "-", "+", 1, one["name"])
            for one in client.xpending(stream, group)["consumers"]
            if one["name"] != self._consumer.encode()
        ]
        return min((_place(found[0]["message_id"].decode()) for found in oldest if found), default=None)

    def _claim(self, client: Any) -> Iterator[_Entry]:
        """Take over what other consumers have left lying, a page at a time; looks twice in ``claim_seconds``."""
        if time.monotonic() < self._claimed or self._oldest_of_others(client) is None:
            return
        idle = round(1000 * self._settings.claim_seconds)
        stream, group, at = self._settings.stream, self._settings.group, START
        while True:
            next_at, page, *_ = client.xautoclaim(stream, group, self._consumer, idle, at, count=self._count)
            yield from (entry for entry in self._measure(page) if entry.at not in self._held)
            at = next_at.decode()
            if at == START:
                break
        self._claimed = time.monotonic() + self._settings.claim_seconds / 2

    def _arrive(self, entries: Iterable[_Entry], low: str) -> Iterator[Arrival]:
        cursor = None if low == START else low
        for entry in entries:
            if entry.fields is None:  # deleted while it was pending: there is nothing left to keep
                self._acknowledge(self._client, [entry.at])
                continue
            self._held.add(entry.at)
            id = entry.fields.get(b"id", f"{self._settings.stream}:{entry.at}".encode()).decode(errors="replace")
            yield Arrival(id, entry.fields.get(b"body", b""), self._name, cursor, ticket=entry.at)


def _entries(found: Any) -> list[_Entry]:
    return [_Entry(at.decode(), _place(at.decode()), fields) for at, fields in found if at is not None]


def _place(at: str) -> tuple[int, int]:
    """Return an entry id as what it is ordered by; raises ``ValueError`` if it is none."""
    first, _, second = at.partition("-")
    if not (first.isdecimal() and (second or "0").isdecimal()):
        raise ValueError(f"the position {at!r} is no entry id of Redis, such as 1700000000000-0")
    return int(first), int(second or 0)
