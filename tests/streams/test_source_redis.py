"""Behaviour specific to Redis: groups, dead consumers, acknowledgement, and a stream that has been replaced."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import ResponseError

from online_meta.types import Task
from streams.formats import wire
from streams.sources import redis
from tests.support.brokers import SPEC, Broker, running
from tests.support.daemon import wait_for
from tests.support.ingesting import Faulty

GROUP = "online-meta"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    one = Broker("redis", tmp_path_factory.mktemp("redis"))
    yield one
    one.close()


@pytest.fixture
def client(broker: Broker) -> Iterator:
    with broker.server.client() as one:
        one.flushall()
        yield one


@pytest.fixture
def produce(broker: Broker, make_task: Callable[[int], Task]) -> Callable[[int, int], list[str]]:
    def make(first: int, end: int) -> list[str]:
        bodies = {f"task-{n:03}": wire.encode(make_task(n)) for n in range(first, end)}
        broker.produce("s", bodies)
        return list(bodies)

    return make


Produce = Callable[[int, int], list[str]]


def test_an_entry_is_acknowledged_only_when_its_task_is_durable(
    broker: Broker, client, produce: Produce, faulty: Faulty, open_ingest
) -> None:
    produce(0, 20)
    faulty.gate = threading.Event()
    open_ingest().pull("broker", broker.source("s"))
    wait_for("all are delivered", lambda: client.exists("s") and pending(client) == 20)
    assert len(faulty) == 0
    faulty.gate.set()
    wait_for("all are acknowledged", lambda: pending(client) == 0)
    assert len(faulty) == 20


def pending(client) -> int:
    try:
        return client.xpending("s", GROUP)["pending"]
    except ResponseError:  # the group does not exist yet
        return -1


def test_invalid_entries_are_acknowledged_and_a_clean_stop_leaves_none_pending(
    broker: Broker, client, produce: Produce, tmp_path: Path
) -> None:
    client.xadd("s", {"id": "poison", "body": b"nonsense"})
    produce(0, 5)
    with running(tmp_path, broker.source("s")) as run:
        wait_for("they are stored", lambda: len(run.history) == 5)
        wait_for("all are acknowledged", lambda: pending(client) == 0)
        produce(5, 9)
        wait_for("the others are stored", lambda: len(run.history) == 9)
    assert pending(client) == 0
    assert client.xlen("s") == 10, "entries stay unless deletion is configured"


def test_durable_entries_are_deleted_if_configured(broker: Broker, client, produce: Produce, tmp_path: Path) -> None:
    ids = produce(0, 12)
    source = broker.source("s", delete=True)
    with running(tmp_path, source) as run:
        wait_for("all are deleted", lambda: client.xlen("s") == 0)
        assert run.ids() == ids
        produce(12, 13)
        wait_for("the next is deleted", lambda: len(run.history) == 13 and client.xlen("s") == 0)
        assert source.lag(run.cursor) == 0


def add_held_by_dead_consumer(client, bodies: dict[str, bytes]) -> list[str]:
    """Add entries and give them to another consumer of the group in the same transaction; return their positions."""
    with client.pipeline(transaction=True) as both:
        for id, body in bodies.items():
            both.xadd("s", {"id": id, "body": body})
        both.xreadgroup(GROUP, "dead", {"s": ">"}, count=len(bodies))
        return [place.decode() for place in both.execute()[:-1]]


@pytest.fixture
def held(make_task: Callable[[int], Task]) -> dict[str, bytes]:
    return {f"held-{n}": wire.encode(make_task(900 + n)) for n in range(5)}


def test_entries_of_a_dead_consumer_are_claimed(
    broker: Broker, client, produce: Produce, held: dict[str, bytes], tmp_path: Path
) -> None:
    with running(tmp_path, broker.source("s", claim_seconds=0.3)) as run:
        first = produce(0, 5)
        wait_for("the first arrive", lambda: len(run.history) == 5)
        add_held_by_dead_consumer(client, held)
        later = produce(5, 8)
        wait_for("all arrive", lambda: len(run.history) == 13)
        wait_for("all are acknowledged", lambda: pending(client) == 0)
        assert sorted(run.ids()) == sorted([*first, *held, *later])
        last = produce(8, 9)
        wait_for("the position advances", lambda: run.cursor == client.xrevrange("s", count=1)[0][0].decode())
        assert run.ids()[-1:] == last
        assert run.counts.rejected == []


def test_nothing_is_lost_with_the_group(
    broker: Broker, client, produce: Produce, held: dict[str, bytes], tmp_path: Path
) -> None:
    with running(tmp_path, broker.source("s")) as run:
        first = produce(0, 5)
        wait_for("the first arrive", lambda: len(run.history) == 5)
        places = add_held_by_dead_consumer(client, held)
        later = produce(5, 8)
        wait_for("the other entries arrive", lambda: len(run.history) == 8)
        assert tuple(map(int, run.cursor.split("-"))) < tuple(map(int, places[0].split("-")))
        assert client.xgroup_destroy("s", GROUP)
        wait_for("all arrive", lambda: len(run.history) == 13)
        assert sorted(run.ids()) == sorted([*first, *held, *later])


def test_nothing_is_lost_with_the_consumer(broker: Broker, client, produce: Produce, tmp_path: Path) -> None:
    """Redis forgets the pending entries of a consumer when the consumer is removed."""
    ids = produce(0, 5)
    with running(tmp_path, broker.source("s")) as run:
        wait_for("the first arrive", lambda: len(run.history) == 5)
    ids += produce(5, 10)
    assert len(client.xreadgroup(GROUP, "broker", {"s": ">"}, count=3)[0][1]) == 3
    assert client.xgroup_delconsumer("s", GROUP, "broker") == 3
    with running(tmp_path, broker.source("s")) as run:
        wait_for("all arrive", lambda: len(run.history) == 10)
        assert run.ids() == ids


def test_entries_in_a_lost_reply_are_not_skipped(
    broker: Broker, client, make_task: Callable[[int], Task], produce: Produce, tmp_path: Path
) -> None:
    """Redis counts them as delivered, so a client that simply reads again gets the entries after them."""
    with running(tmp_path, broker.source("s")) as run:
        ids = produce(0, 3)
        wait_for("the first arrive", lambda: len(run.history) == 3)
        broker.network.lose_next_reply(least=200)
        for n in range(3, 9):
            ids.append(f"task-{n:03}")
            client.xadd("s", {"id": ids[-1], "body": wire.encode(make_task(n))})
        wait_for("all arrive", lambda: len(run.history) == 9)
        assert run.ids() == ids


def test_durable_entries_are_acknowledged_after_a_kill(broker: Broker, client, produce: Produce) -> None:
    produce(0, 10)
    client.xgroup_create("s", GROUP, "0")
    places = [place.decode() for place, _ in client.xreadgroup(GROUP, "broker", {"s": ">"}, count=10)[0][1]]
    stream = broker.source("s").read(places[5])
    assert next(stream).cursor == places[6]
    assert client.xpending("s", GROUP)["min"].decode() == places[6]
    stream.close()


def test_reading_continues_after_redis_lost_its_data(broker: Broker, client, produce: Produce, tmp_path: Path) -> None:
    with running(tmp_path, broker.source("s")) as run:
        produce(0, 5)
        wait_for("the first arrive", lambda: len(run.history) == 5)
        client.flushall()
        ids = produce(3, 9)
        wait_for("the others arrive", lambda: len(run.history) == 9)
        assert run.ids()[3:] == ids
        assert run.counts.rejected == []


def test_a_stream_that_ends_before_the_position_is_read_from_its_start(
    broker: Broker, client, make_task: Callable[[int], Task], produce: Produce, caplog: pytest.LogCaptureFixture
) -> None:
    produce(0, 1)
    after = client.xrevrange("s")[0][0].decode()
    client.delete("s")
    client.xadd("s", {"id": "old-clock", "body": wire.encode(make_task(1))}, id="7-1")
    stream = broker.source("s").read(after)
    assert next(stream).id == "old-clock"
    assert "ends at 7-1, before the committed position" in caplog.text
    stream.close()


def test_a_key_of_another_type_is_reported(broker: Broker, client) -> None:
    client.set("s", "text")
    with pytest.raises(Exception, match="WRONGTYPE"):
        next(broker.source("s").read(None))


def test_large_entries_are_requested_in_small_batches(broker: Broker, client) -> None:
    for _ in range(20):
        client.xadd("s", {"body": bytes(3 * 1024 * 1024)})
    source = broker.source("s")
    stream = source.read(None)
    for _ in range(8):
        next(stream)
    assert len(source._unacked) == 8
    assert pending(client) <= 12, "a request is for 16 MiB and one task"
    stream.close()


def test_a_password_file_and_the_address_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schemes"):
        redis.create_source(redis.Settings(url="http://127.0.0.1"), SPEC, "r", 0)
    secret = tmp_path / "secret"
    with pytest.raises(FileNotFoundError):
        redis.create_source(redis.Settings(password_file=str(secret)), SPEC, "r", 0)
    secret.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="must contain exactly one line"):
        redis.create_source(redis.Settings(password_file=str(secret)), SPEC, "r", 0)
    secret.write_text("s3cret\n")
    assert redis.create_source(redis.Settings(password_file=str(secret)), SPEC, "r", 0) is not None


def test_a_password_grants_access(broker: Broker, client, produce: Produce, tmp_path: Path) -> None:
    produce(0, 1)
    (tmp_path / "secret").write_text("s3cret\n")
    client.config_set("requirepass", "s3cret")
    try:
        with pytest.raises(Exception, match="Authentication required"):
            next(broker.source("s").read(None))
        stream = broker.source("s", password_file=str(tmp_path / "secret")).read(None)
        assert next(stream).id == "task-000"
        stream.close()
    finally:
        client.config_set("requirepass", "")
