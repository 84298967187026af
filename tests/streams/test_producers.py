"""Producers for targets other than a daemon. The tests of the sources check that their tasks arrive."""

import os
import sys
from pathlib import Path

import pytest

from streams.producers import SubmitError, open_producer
from streams.sources import kafka, nats, redis
from tests.support.brokers import SPEC, Broker

ADDRESSES = {"redis": "redis://127.0.0.1:1?stream=s", "kafka": "kafka://127.0.0.1:1/t", "nats": "nats://127.0.0.1:1/s"}
MODULES = {"redis": "redis", "kafka": "confluent_kafka", "nats": "nats"}


def test_a_file_is_complete_and_durable_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    flush = os.fsync
    monkeypatch.setattr(os, "fsync", lambda one: (flushed.append(os.readlink(f"/proc/self/fd/{one}")), flush(one)))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda one, to: (flushed.append(f"-> {to.name}"), rename(one, to))[1])
    producer = open_producer(f"file://{tmp_path}")
    assert producer.send("task:1", b"body") is None
    part, renamed, folder = flushed
    assert Path(part).name.startswith(".task:1.")
    assert (renamed, folder) == ("-> task:1.safetensors", str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["task:1.safetensors"]
    assert (tmp_path / "task:1.safetensors").read_bytes() == b"body"
    producer.close()


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(one: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(SubmitError, match=r"cannot_write: .*none/a\.safetensors: No such file"):
        open_producer(f"file://{tmp_path}/none").send("a", b"")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SubmitError, match="No space left"):
        open_producer(f"file://{tmp_path}").send("a", b"")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://x", "is not an address of a target, such as http://127.0.0.1:8780, redis://"),
        ("kafka://", "is not an address"),
        ("nats://127.0.0.1:99999/s", "is not an address"),
        ("kafka://127.0.0.1:9092", "has no path: write it like kafka://127.0.0.1:9092/tasks"),
        ("nats://127.0.0.1:4222/", "has no path"),
        ("redis://127.0.0.1:6379/0", r"which stream\? End the address with \?stream=tasks"),
        ("file://host/folder", "names a host: write three slashes"),
    ],
)
def test_an_invalid_address_is_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_producer(url)


@pytest.mark.parametrize("kind", sorted(ADDRESSES))
def test_a_missing_target_is_unreachable(kind: str) -> None:
    producer = open_producer(ADDRESSES[kind], retry_seconds=0.1)
    with pytest.raises(SubmitError, match="no answer") as caught:
        producer.send("a", b"")
    assert (caught.value.status, caught.value.reason) == (None, "unreachable")
    with pytest.raises(SubmitError, match="bad_id"):
        producer.send("../a", b"")
    producer.close()


@pytest.mark.parametrize("kind", sorted(ADDRESSES))
def test_a_missing_client_library_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"redis": redis, "kafka": kafka, "nats": nats}[kind]
    lazy = (f"streams.brokers.{kind}", "streams.producers.", f"{MODULES[kind]}.")
    for name in [name for name in sys.modules if name.startswith(lazy)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, MODULES[kind], None)
    with pytest.raises(ImportError, match=rf"pip install 'online-meta\[{kind}\]'"):
        source.create_source(source.Settings(), SPEC, kind, 0)
    with pytest.raises(ImportError, match=rf"pip install 'online-meta\[{kind}\]'"):
        open_producer(ADDRESSES[kind])


def test_a_refusal_of_the_broker_is_reported(tmp_path: Path) -> None:
    broker = Broker("nats", tmp_path)
    try:
        producer = open_producer(f"nats://{broker.address}/nobody", retry_seconds=30)
        with pytest.raises(SubmitError, match="no response from stream") as caught:
            producer.send("a", b"")
        assert caught.value.reason == "refused"
        with pytest.raises(SubmitError) as caught:
            producer.send("a", bytes(2_000_000))
        assert caught.value.reason == "too_large"
        producer.close()
    finally:
        broker.close()
