"""Read a Redis stream as a source, and connect sources and producers to Redis."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from streams.brokers.login import (
    Login,
    check_address,
    make_tls_context,
    next_fetch_count,
    read_secret,
    translate_login_errors,
)
from streams.brokers.settings import RedisSettings as Settings
from streams.types import Arrival

AUTH_ERRORS = (redis.AuthenticationError, redis.exceptions.NoPermissionError)
"""The errors of Redis for a refused login or a missing permission."""


def connect(url: str, login: Login, seconds: float) -> redis.Redis:
    """Create a client that connects on first use and never retries.

    Args:
        url: an address with redis:// or, for TLS, rediss://, a host and the number of a database. Other options are
            refused, because the library would prefer them to those of ``login``.
        login: the login; its files are read by this call.
        seconds: the timeout for answers.

    Raises:
        ValueError: if the address or a login file is invalid.
        OSError: if a login file cannot be read.
    """
    check_address("url", url, ("redis", "rediss"), "/?[0-9]*", () if urlsplit(url).path.strip("/") else ("db",))
    if urlsplit(url).password and login.password_file is not None:
        raise ValueError("the url contains a password, and password_file names another: remove one of them")
    options: dict[str, Any] = {}
    if login.password_file is not None:
        options["password"] = read_secret(login.password_file)
    if make_tls_context(login) is not None:
        if urlsplit(url).scheme != "rediss":
            raise ValueError("ca_file and certificate_file apply to TLS: the url must begin with rediss://")
        files = {"ca_certs": login.ca_file, "certfile": login.certificate_file}
        files["keyfile"] = login.key_file or login.certificate_file
        options |= {f"ssl_{name}": file for name, file in files.items() if file is not None}
    return redis.Redis.from_url(
        url,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=seconds,
        socket_connect_timeout=seconds,
        socket_keepalive=True,
        **options,
    )


def redact_url(url: str) -> str:
    """Return scheme, host and port of an address, without secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}:{parts.port or 6379}"


BLOCK_MILLISECONDS = 250


START = "0-0"


_log = logging.getLogger(__name__)


class _Entry(NamedTuple):
    """An entry: its id as text and as a pair of integers, and its fields (None if it was deleted)."""

    entry_id: str
    order: tuple[int, int]
    fields: dict[bytes, bytes] | None


class RedisStream:
    """A ``TaskSource`` that ``Acknowledges`` and ``ReportsLag``.

    Its cursor is an entry id up to which every entry is committed. Entries are delivered in order and therefore
    committed in order, and the cursor stays below entries that other consumers of the group received but have not
    acknowledged.
    """

    def __init__(self, settings: Settings, consumer: str, name: str) -> None:
        """Take the settings, the name of the consumer in its group, and the name of the source."""
        self._settings, self._consumer, self._name = settings, consumer, name
        self._client: Any = None
        self._unacked: set[str] = set()  # delivered but not acknowledged
        self._count = 1
        self._next_claim = 0.0

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the entries after the position: first those that were delivered but not committed, then new ones.

        Raises:
            redis.RedisError: if the server cannot be reached or does not answer in time.
            LoginRefused: if the server refuses the login, or its certificate is not trusted.
            ValueError: if the position is not an entry id.
        """
        stream = self._settings.stream
        with self._connect() as client:
            self._client, self._unacked, self._next_claim = client, set(), 0.0
            watermark, delivered = self._join_group(client, after)
            self._ack_committed(client, watermark)
            while _parse_id(watermark) < _parse_id(delivered):
                page = self._parse_page(client.xrange(stream, f"({watermark}", delivered, self._count))
                if not page:
                    break
                for entry in page:
                    watermark = entry.entry_id
                    yield from self._make_arrival([entry], watermark)
            watermark = max(watermark, delivered, key=_parse_id)
            while True:
                yield from self._make_arrival(self._claim(client), watermark)
                new = self._read_new(client)
                others = self._oldest_of_others(client) if new else None
                for entry in new:
                    watermark = entry.entry_id if others is None or entry.order < others else watermark
                    yield from self._make_arrival([entry], watermark)
                if not new:
                    yield None

    def ack(self, arrivals: Sequence[Arrival]) -> None:
        """Acknowledge entries and, if the settings say so, delete them in the same transaction."""
        self._ack(self._client, [arrival.ack_id for arrival in arrivals if arrival.ack_id is not None])

    def lag(self, after: str | None) -> int | None:
        """Return the number of undelivered and unacknowledged entries; None if Redis cannot count them (before 7.0)."""
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
            translate_login_errors(redact_url(settings.url), *AUTH_ERRORS),
            closing(connect(settings.url, settings, settings.timeout_seconds)) as client,
        ):
            yield client

    def _join_group(self, client: Any, after: str | None) -> tuple[str, str]:
        """Create the group if necessary; return the position to continue at and the last entry given to the group."""
        stream, group, start = self._settings.stream, self._settings.group, after or START
        _parse_id(start)
        try:
            client.xgroup_create(stream, group, start, mkstream=True)
        except redis.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        last = client.xinfo_stream(stream)["last-generated-id"].decode()
        if _parse_id(last) < _parse_id(start):
            _log.warning(
                "the source %s: the stream ends at %s, before the committed position %s, so it was recreated: "
                "it is read from its start (tasks with known ids are not stored twice)",
                *(self._name, last, start),
            )
            client.xgroup_setid(stream, group, START)
            return START, START
        found = self._find_group(client)
        return start, START if found is None else found["last-delivered-id"].decode()

    def _find_group(self, client: Any) -> dict[str, Any] | None:
        name = self._settings.group.encode()
        return next((one for one in client.xinfo_groups(self._settings.stream) if one["name"] == name), None)

    def _ack_committed(self, client: Any, watermark: str) -> None:
        """Acknowledge the entries that this consumer received up to the position, because they are durable."""
        stream, group = self._settings.stream, self._settings.group
        while known := client.xpending_range(stream, group, "-", watermark, 1000, self._consumer):
            self._ack(client, [one["message_id"].decode() for one in known])

    def _ack(self, client: Any, entries: list[str]) -> None:
        with client.pipeline(transaction=True) as pipeline:
            pipeline.xack(self._settings.stream, self._settings.group, *entries)
            if self._settings.delete:
                pipeline.xdel(self._settings.stream, *entries)
            pipeline.execute()
        self._unacked.difference_update(entries)

    def _read_new(self, client: Any) -> list[_Entry]:
        stream = self._settings.stream
        answer = client.xreadgroup(
            self._settings.group, self._consumer, {stream: ">"}, count=self._count, block=BLOCK_MILLISECONDS
        )
        return self._parse_page(answer[0][1] if answer else [])

    def _parse_page(self, answer: Any) -> list[_Entry]:
        """Return the entries of an answer, and set the next request's count according to their sizes."""
        found = _entries(answer)
        if found:
            sizes = [sum(map(len, entry.fields.values())) for entry in found if entry.fields]
            self._count = min(next_fetch_count(self._settings.batch, sizes), 4 * self._count)
        return found

    def _oldest_of_others(self, client: Any) -> tuple[int, int] | None:
        """Return the oldest entry that another consumer received but has not acknowledged."""
        stream, group = self._settings.stream, self._settings.group
        oldest = [
            client.xpending_range(stream, group, "-", "+", 1, one["name"])
            for one in client.xpending(stream, group)["consumers"]
            if one["name"] != self._consumer.encode()
        ]
        return min((_parse_id(found[0]["message_id"].decode()) for found in oldest if found), default=None)

    def _claim(self, client: Any) -> Iterator[_Entry]:
        """Claim entries that other consumers have left unacknowledged, page by page, twice per ``claim_seconds``."""
        if time.monotonic() < self._next_claim or self._oldest_of_others(client) is None:
            return
        idle = round(1000 * self._settings.claim_seconds)
        stream, group, entry_id = self._settings.stream, self._settings.group, START
        while True:
            next_at, page, *_ = client.xautoclaim(stream, group, self._consumer, idle, entry_id, count=self._count)
            yield from (entry for entry in self._parse_page(page) if entry.entry_id not in self._unacked)
            entry_id = next_at.decode()
            if entry_id == START:
                break
        self._next_claim = time.monotonic() + self._settings.claim_seconds / 2

    def _make_arrival(self, entries: Iterable[_Entry], watermark: str) -> Iterator[Arrival]:
        cursor = None if watermark == START else watermark
        for entry in entries:
            if entry.fields is None:  # deleted while it was pending: there is nothing left to store
                self._ack(self._client, [entry.entry_id])
                continue
            self._unacked.add(entry.entry_id)
            id = entry.fields.get(b"id", f"{self._settings.stream}:{entry.entry_id}".encode()).decode(errors="replace")
            yield Arrival(id, entry.fields.get(b"body", b""), self._name, cursor, ack_id=entry.entry_id)


def _entries(found: Any) -> list[_Entry]:
    return [
        _Entry(entry_id.decode(), _parse_id(entry_id.decode()), fields)
        for entry_id, fields in found
        if entry_id is not None
    ]


def _parse_id(entry_id: str) -> tuple[int, int]:
    """Parse an entry id into the pair that orders entries; raise ``ValueError`` if it is not an entry id."""
    first, _, second = entry_id.partition("-")
    if not (first.isdecimal() and (second or "0").isdecimal()):
        raise ValueError(f"the position {entry_id!r} is not an entry id of Redis, such as 1700000000000-0")
    return int(first), int(second or 0)
