"""Read a Redis stream as a source, and connect sources and producers to Redis."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from streams.brokers.gaps import GapLog
from streams.brokers.login import (
    Login,
    check_address,
    make_tls_context,
    next_fetch_count,
    read_secret,
    translate_login_errors,
)
from streams.brokers.settings import RedisSettings as Settings
from streams.types import Arrival, Gap

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


ADVICE = "let the stream keep its entries for longer (MAXLEN)"


_log = logging.getLogger(__name__)


class _Entry(NamedTuple):
    """An entry: its id as text and as a pair of integers, and its fields (None if it was deleted)."""

    entry_id: str
    order: tuple[int, int]
    fields: dict[bytes, bytes] | None


class _State(NamedTuple):
    """The state of a stream and of a group at one moment.

    Attributes:
        length: the number of entries.
        first: the id of the first entry, "0-0" if there is none.
        last: the id of the entry that was added last, even if it is gone.
        added: how many entries were ever added; None before Redis 7.
        delivered: the id of the last entry that was given to the group; "0-0" without a group.
        read: how many entries were added up to ``delivered``, by Redis' own account; None if it does not know.
        consumers: the number of consumers of the group.
    """

    length: int
    first: str
    last: str
    added: int | None
    delivered: str
    read: int | None
    consumers: int

    def count_waiting(self, page: Sequence[_Entry] = ()) -> int | None:
        """Return the number of entries after ``delivered``; None if an entry before the ``page`` still exists.

        Args:
            page: the entries up to ``delivered`` that were read last.
        """
        if self.last == self.delivered or self.length == 0:
            return 0
        first = _parse_id(self.first)
        if first > _parse_id(self.delivered):
            return self.length
        return None if not page or first < page[0].order else self.length - sum(one.order >= first for one in page)


class RedisStream:
    """A ``TaskSource`` that ``Acknowledges``, ``ReportsLag`` and ``ReportsGaps``.

    Redis does not report trimmed entries. How many are missing follows from the number of entries that were ever added,
    of those that exist, and of those that were read (``_ordinal``).

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
        self._ordinal: int | None = None  # how many entries were ever added before the next one to read, if known
        self._gaps = GapLog(name)

    def listen_for_gaps(self, listener: Callable[[Gap], None]) -> None:
        """Call ``listener`` with entries that were trimmed or deleted before they were read."""
        self._gaps.listen(listener)

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
            missing = self._list_pending(client, delivered)
            while _parse_id(watermark) < _parse_id(delivered):
                page = self._parse_page(client.xrange(stream, f"({watermark}", delivered, self._count))
                if not page:
                    break
                passed = {entry for entry in missing if entry <= page[-1].order}
                self._note_missing(client, passed - {entry.order for entry in page})
                missing -= passed
                for entry in page:
                    watermark = entry.entry_id
                    yield from self._make_arrival([entry], watermark)
            self._note_missing(client, missing)
            watermark = max(watermark, delivered, key=_parse_id)
            self._find_first_gap(client, after)
            while True:
                yield from self._make_arrival(self._claim(client), watermark)
                new = self._read_new(client, watermark)
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
            if group is None:
                return None
            waiting = group.get("lag")
            if waiting != 0:  # Redis counts trimmed entries, too, and cannot count after a deletion
                state = self._read_state(client)
                counted = state.count_waiting()
                waiting = counted if counted is not None or waiting is None else min(int(waiting), state.length)
            return None if waiting is None else int(waiting) + int(group["pending"])

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
        return self._choose_group(client.xinfo_groups(self._settings.stream)) or None

    def _choose_group(self, groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return this source's group; {} if there is none."""
        return next((one for one in groups if one["name"] == self._settings.group.encode()), {})

    def _read_state(self, client: Any) -> _State:
        """Return the state of the stream and the group; the server sends the first and the last entry with it."""
        with client.pipeline(transaction=True) as pipeline:
            pipeline.xinfo_stream(self._settings.stream)
            pipeline.xinfo_groups(self._settings.stream)
            stream, groups = pipeline.execute()
        group = self._choose_group(groups)
        return _State(
            length=int(stream["length"]),
            first=START if stream["first-entry"] is None else stream["first-entry"][0].decode(),
            last=stream["last-generated-id"].decode(),
            added=stream.get("entries-added"),
            delivered=group.get("last-delivered-id", START.encode()).decode(),
            read=group.get("entries-read"),
            consumers=int(group.get("consumers", 0)),
        )

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

    def _read_new(self, client: Any, before: str) -> list[_Entry]:
        """Return the next entries; note it if entries between ``before`` and them are gone."""
        stream, count = self._settings.stream, self._count
        answer = client.xreadgroup(
            self._settings.group, self._consumer, {stream: ">"}, count=count, block=BLOCK_MILLISECONDS
        )
        page = self._parse_page(answer[0][1] if answer else [])
        if page and self._may_have_gap(client, page, len(page) < count):
            self._find_gap(client, before, page)
        return page

    def _find_first_gap(self, client: Any, after: str | None) -> None:
        """Note the entries that are gone between the last one that was given to the group and the first that exists."""
        state = self._read_state(client)
        waiting, read = state.count_waiting(), state.read
        self._ordinal = read if waiting is None or state.added is None else state.added - waiting
        is_new = after is None and state.delivered == START
        if waiting is None or state.last == state.delivered or is_new:
            return  # an earlier entry still exists, so none was trimmed after it, or there is none to read
        if read is not None and self._ordinal is not None:
            self._note_between(client, state, state.delivered, state.first, self._ordinal - read)
        elif not self._settings.delete:  # otherwise this source has deleted the entries that it read
            self._note_between(client, state, state.delivered, state.first, None)

    def _may_have_gap(self, client: Any, page: Sequence[_Entry], was_last: bool) -> bool:
        """Return whether entries may be gone before a page, by numbers that are cheaper than ``_read_state``.

        Without a gap, the stream holds at least the page and the entries that wait after it. ``was_last`` says that
        none waited when the page was read.
        """
        with client.pipeline(transaction=True) as pipeline:
            pipeline.xlen(self._settings.stream)
            pipeline.xinfo_groups(self._settings.stream)
            length, groups = pipeline.execute()
        group = self._choose_group(groups)
        read, lag = group.get("entries-read"), group.get("lag")
        others = group.get("consumers", 0) > 1  # whose entries this source does not see
        self._ordinal = read if self._ordinal is None or others else self._ordinal + len(page)
        if self._ordinal is None or read is None or lag is None:
            return True
        waiting = read + lag - self._ordinal  # too many by the entries that are gone
        return read > self._ordinal or waiting < 0 or length < len(page) + waiting or (was_last and waiting > 0)

    def _find_gap(self, client: Any, before: str, page: Sequence[_Entry]) -> None:
        """Note the entries that are gone between ``before`` and a page that was read just now."""
        state = self._read_state(client)
        if state.delivered != page[-1].entry_id or state.added is None:
            return  # another consumer reads, too
        waiting, known = state.count_waiting(page), self._ordinal
        if waiting is not None:
            self._ordinal = state.added - waiting
        elif state.read is not None and known is not None and state.read > known:
            self._ordinal = state.read  # Redis noticed a deletion within the page
        if known is not None and self._ordinal is not None and self._ordinal > known:
            self._note_between(client, state, before, page[0].entry_id, self._ordinal - known)
        elif state.read is None:
            self._correct_count(client, state)

    def _note_between(self, client: Any, state: _State, before: str, found: str, entries: int | None) -> None:
        """Note that ``entries`` between two others are gone, and correct the group's own count of what was read."""
        if entries is not None and entries <= 0:
            return
        number = "some entries may have been" if entries is None else f"{entries} entries were"
        first, last = f"after {before}", "before the next entry" if found == START else f"before {found}"
        gap = Gap(f"the stream {self._settings.stream}", first, last, entries)
        message = f"{number} trimmed or deleted before they were read: those {first} and {last} of {gap.where}"
        self._gaps.note(gap, f"{message}; {ADVICE}")
        self._correct_count(client, state)

    def _correct_count(self, client: Any, state: _State) -> None:
        """Correct the group's count of entries, which Redis derives wrongly after a gap; a restart relies on it."""
        if self._ordinal is not None and state.consumers == 1:
            with suppress(redis.ResponseError):  # without the permission, the lag is too large
                client.xgroup_setid(
                    self._settings.stream, self._settings.group, state.delivered, entries_read=self._ordinal
                )

    def _list_pending(self, client: Any, delivered: str) -> set[tuple[int, int]]:
        """Return the ids of the entries up to ``delivered`` that this consumer received and has not acknowledged."""
        stream, group, first = self._settings.stream, self._settings.group, "-"
        found: set[tuple[int, int]] = set()
        while page := client.xpending_range(stream, group, first, delivered, 1000, self._consumer):
            found.update(_parse_id(one["message_id"].decode()) for one in page)
            first = f"({page[-1]['message_id'].decode()}"
        return found

    def _note_missing(self, client: Any, missing: Iterable[tuple[int, int]]) -> None:
        """Note and acknowledge entries that were given to a consumer and are gone before they were stored."""
        gone = [f"{first}-{second}" for first, second in sorted(missing)]
        if not gone:
            return
        gap = Gap(f"the stream {self._settings.stream}", gone[0], gone[-1], len(gone))
        message = f"{len(gone)} entries from {gone[0]} to {gone[-1]} of {gap.where} were trimmed or deleted before they"
        self._gaps.note(gap, f"{message} were stored; {ADVICE}")
        self._ack(client, gone)

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
            found = client.xautoclaim(stream, group, self._consumer, idle, entry_id, count=self._count)
            next_at, page, *deleted = found
            self._note_missing(client, [_parse_id(one.decode()) for one in (deleted[0] if deleted else ())])
            yield from (entry for entry in self._parse_page(page) if entry.entry_id not in self._unacked)
            entry_id = next_at.decode()
            if entry_id == START:
                break
        self._next_claim = time.monotonic() + self._settings.claim_seconds / 2

    def _make_arrival(self, entries: Iterable[_Entry], watermark: str) -> Iterator[Arrival]:
        cursor = None if watermark == START else watermark
        for entry in entries:
            if entry.fields is None:  # deleted while it was pending
                self._note_missing(self._client, [entry.order])
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
