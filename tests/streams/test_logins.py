"""Passwords and TLS on real brokers. A secret reaches only the broker that it is for."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from online_meta.types import Task
from streams.brokers.login import Login, LoginRefused
from streams.brokers.redis import connect
from streams.formats import wire
from streams.producers import SubmitError, open_producer
from streams.sources import kafka, nats, redis
from streams.types import TaskSource
from tests.support.brokers import MODULES, SPEC, running
from tests.support.certificate import write_certificate
from tests.support.daemon import wait_for
from tests.support.secure_servers import PASSWORD, USER, ClosedKafka, SecureKafka, SecureNats, SecureRedis, TokenNats
from tests.support.servers import Nats

KINDS = ("kafka", "nats", "redis")


class Secured(NamedTuple):
    """The stream's settings for a source and its address for a producer, with the files of the login."""

    kind: str
    settings: dict[str, Any]
    address: str
    files: dict[str, str]
    folder: Path

    def source(self, **other: Any) -> TaskSource:
        module = MODULES[self.kind]
        opened = module.create_source(module.Settings(**{**self.settings, **self.files, **other}), SPEC, "broker", 0)
        assert opened is not None
        return opened

    def refusal(self, **other: Any) -> str:
        """Return the errors of a source and of a producer, neither of which may get in."""
        with pytest.raises(LoginRefused) as caught:
            self.source(**other).lag(None)
        with pytest.raises(SubmitError) as submitting:
            self.produce({"a": b"x"}, **other)
        assert submitting.value.reason == "refused"
        return f"{caught.value} {submitting.value}"

    def produce(self, bodies: dict[str, bytes], **other: Any) -> None:
        given = {**self.files, **other}
        query = "&".join(f"{name}={value}" for name, value in given.items())
        producer = open_producer(f"{self.address}{'&' if '?' in self.address else '?'}{query}", retry_seconds=30)
        try:
            for id, body in bodies.items():
                producer.send(id, body)
        finally:
            producer.close()


@pytest.fixture(scope="module", params=KINDS)
def secured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp(f"secure-{request.param}")
    (folder / "password").write_text(f"{PASSWORD}\n")
    yield from {"redis": secure_redis, "nats": secure_nats, "kafka": secure_kafka}[request.param](folder)


def secure_redis(folder: Path) -> Iterator[Secured]:
    server = SecureRedis(folder)
    url = f"rediss://{USER}@127.0.0.1:{server.port}/0"
    files = {"password_file": "password", "ca_file": "cert.pem", "certificate_file": "cert.pem", "key_file": "key.pem"}
    paths = {name: str(folder / file) for name, file in files.items()}
    try:
        server.start()
        yield Secured("redis", {"url": url, "timeout_seconds": 5}, f"{url}?stream=tasks", paths, folder)
    finally:
        server.stop()


def secure_nats(folder: Path) -> Iterator[Secured]:
    server = SecureNats(folder)
    address = f"tls://127.0.0.1:{server.port}"
    files = {"user": USER, "password_file": str(folder / "password"), "ca_file": str(folder / "cert.pem")}
    try:
        server.start()
        server.ask(lambda stream: stream.add_stream(name="tasks", subjects=["tasks"]))
        yield Secured("nats", {"servers": address, "timeout_seconds": 5}, f"{address}/tasks", files, folder)
    finally:
        server.stop()


def secure_kafka(folder: Path) -> Iterator[Secured]:
    server = SecureKafka(folder)
    try:
        server.start()
        server.make_topic("tasks", 2)
        yield through_properties(server)
    finally:
        server.stop()


def through_properties(server: SecureKafka | ClosedKafka) -> Secured:
    files = {"properties_file": write_properties(server.folder, server.properties())}
    settings = {"brokers": server.brokers, "topic": "tasks", "timeout_seconds": 2}
    return Secured("kafka", settings, f"kafka://{server.brokers}/tasks", files, server.folder)


def write_properties(folder: Path, properties: dict[str, str]) -> str:
    file = folder / "properties"
    file.write_text("".join(f"{name} = {value}\n" for name, value in properties.items()))
    return str(file)


def test_tasks_are_produced_and_read_over_tls(
    secured: Secured, make_task: Callable[[int], Task], tmp_path: Path
) -> None:
    bodies = {f"task-{n}": wire.encode(make_task(n)) for n in range(5)}
    secured.produce(bodies)
    with running(tmp_path, secured.source()) as run:
        wait_for("all arrive", lambda: len(run.history) == 5)
        assert sorted(run.ids()) == list(bodies)
        assert secured.source().lag(run.cursor) in (0, 5), "Redis may not have the acknowledgement yet"


def test_an_unknown_certificate_is_refused(secured: Secured, tmp_path: Path) -> None:
    write_certificate(tmp_path)
    other = {"ca_file": str(tmp_path / "cert.pem")}
    if secured.kind == "kafka":
        said = {"security.protocol": "SSL", "ssl.ca.location": other["ca_file"]}
        other = {"properties_file": write_properties(tmp_path, said)}
    errors = secured.refusal(**other)
    assert "certificate" in errors
    assert "127.0.0.1" in errors
    assert PASSWORD not in errors


@pytest.fixture
def closed_kafka(tmp_path: Path) -> Iterator[Secured]:
    server = ClosedKafka(tmp_path / "kafka")
    try:
        server.start()
        yield through_properties(server)
    finally:
        server.stop()


def test_a_wrong_password_is_refused_at_once_and_not_shown(
    secured: Secured, request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wrong").write_text("not-the-password\n")
    other = {"password_file": str(tmp_path / "wrong")}
    if secured.kind == "kafka":
        secured, other = request.getfixturevalue("closed_kafka"), {}
    source = secured.source(**other)
    errors = secured.refusal(**other) + caplog.text
    answer = {"redis": "invalid username-password", "nats": "authorization failed", "kafka": "unknown-user"}
    assert answer[secured.kind] in errors
    assert "not-the-password" not in errors
    assert PASSWORD not in errors
    if secured.kind != "kafka":
        (tmp_path / "wrong").write_text(PASSWORD)
        assert source.lag(None) is not None, "the file is read again"


def test_a_password_is_not_sent_without_tls(tmp_path: Path) -> None:
    """An attacker in the network may remove TLS from the server's offer."""
    server = Nats(tmp_path / "nats")
    (tmp_path / "password").write_text(PASSWORD)
    try:
        server.start()
        login = {"user": USER, "password_file": str(tmp_path / "password")}
        source = nats.create_source(nats.Settings(servers=f"tls://127.0.0.1:{server.port}", **login), SPEC, "n", 0)
        with pytest.raises(LoginRefused, match="TLS is configured but the server does not require it"):
            source.lag(None)
    finally:
        server.stop()


def test_a_token_opens_a_server(tmp_path: Path) -> None:
    server = TokenNats(tmp_path / "nats")
    token = tmp_path / "token"
    settings = nats.Settings(servers=server.url, stream="tasks", token_file=str(token))
    try:
        server.start()
        server.ask(lambda stream: stream.add_stream(name="tasks", subjects=["tasks"]))
        token.write_text("not-the-token")
        with pytest.raises(LoginRefused, match="refuses the login"):
            nats.create_source(settings, SPEC, "n", 0).lag(None)
        token.write_text(f"{PASSWORD}\n")
        assert nats.create_source(settings, SPEC, "n", 0).lag(None) == 0
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (redis, {"url": "redis://:hush@127.0.0.1/0"}, "url contains a secret.*password_file"),
        (redis, {"url": "redis://127.0.0.1/0?password=hush"}, "url contains a secret.*password_file"),
        (redis, {"ca_file": "{cert}"}, "the url must begin with rediss://"),
        (redis, {"url": "rediss://127.0.0.1/0", "ca_file": "{none}"}, "No such file or directory: '{none}'"),
        (redis, {"url": "rediss://127.0.0.1/0", "ca_file": "{text}"}, "{text} contains no PEM certificates"),
        (redis, {"url": "rediss://127.0.0.1/0", "key_file": "{cert}"}, "set certificate_file, too"),
        (nats, {"servers": "nats://a:1,nats://me:hush@b:2"}, "servers contains a secret.*token_file"),
        (nats, {"servers": "nats://hush@b:2"}, "servers contains a secret.*token_file"),
        (nats, {"user": "me"}, "user and password_file belong together"),
        (
            nats,
            {"certificate_file": "{cert}", "key_file": "{text}"},
            "no certificate and key in {cert} and {text}",
        ),
        (nats, {"credentials_file": "{none}"}, "No such file or directory: '{none}'"),
        (nats, {"token_file": "{empty}"}, "{empty} must contain exactly one line"),
        (kafka, {"properties_file": "{none}"}, "No such file or directory: '{none}'"),
    ],
)
def test_an_invalid_login_is_refused_before_connecting(
    module: Any, settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    write_certificate(tmp_path)
    (tmp_path / "text").write_text("some text")
    (tmp_path / "empty").write_text("")
    files = {"cert": "cert.pem", "none": "none", "text": "text", "empty": "empty"}
    files = {name: str(tmp_path / file) for name, file in files.items()}
    for name, file in files.items():
        message = message.replace(f"{{{name}}}", file)
        settings = {key: value.replace(f"{{{name}}}", file) for key, value in settings.items()}
    with pytest.raises((ValueError, OSError), match=message) as caught:
        module.create_source(module.Settings(**settings), SPEC, "s", 0)
    assert "hush" not in str(caught.value)


OPTIONS = ("socket_timeout=1", "ssl_cert_reqs=none", "ssl_check_hostname=0", "username=a", "retry_on_timeout=1", "x=")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("module", "setting", "address"),
    [
        (redis, "url", "redis://127.0.0.1:1/0"),
        (redis, "url", "rediss://127.0.0.1:1"),
        (nats, "servers", "nats://127.0.0.1:1"),
        (nats, "servers", "nats://127.0.0.1:1,tls://127.0.0.1:2"),
    ],
)
def test_an_address_of_a_source_cannot_set_options_of_the_client(
    module: Any, setting: str, address: str, option: str
) -> None:
    with pytest.raises(ValueError, match=f"{setting}: .*unknown option {option.partition('=')[0]} in the address"):
        module.create_source(module.Settings(**{setting: f"{address}?{option}"}), SPEC, "s", 0)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    "address",
    ["redis://127.0.0.1:1/0?stream=s&", "kafka://127.0.0.1:1/t?", "nats://127.0.0.1:1/s?", "file:///tmp?"],
)
def test_an_address_of_a_producer_cannot_set_options_of_the_client(address: str, option: str) -> None:
    with pytest.raises(ValueError, match=f"unknown option {option.partition('=')[0]} in the address"):
        open_producer(f"{address}{option}")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "nats://127.0.0.1:1/s?pasword_file=x",
            "unknown option pasword_file in the address; the options are pass",
        ),
        ("redis://127.0.0.1:1/0?stream=a&stream=b", "the option stream in the address has several values"),
        ("redis://127.0.0.1:1/0?stream=a&password_file=", "the option password_file in the address has no value"),
        ("redis://127.0.0.1:1/0?stream=a&db=1", "unknown option db in the address"),
        ("redis://127.0.0.1:1/first?stream=a", "'/first' after the host is not read"),
        ("redis://127.0.0.1:1/0/1?stream=a", "'/0/1' after the host is not read"),
        ("redis://127.0.0.1:1/0?stream=a#part", "after the host is not read"),
        (
            "redis://:hush@127.0.0.1:1/0?stream=a&password_file=f",
            "the url contains a password, and password_file",
        ),
        ("nats://me:hush@127.0.0.1:1/s?token_file=f", "the address contains a login, and the settings another one"),
        (
            "kafka://me:hush@127.0.0.1:1/t",
            "brokers: '127.0.0.1:1' is not host:port; a login belongs into properties_file",
        ),
        ("http://me:hush@127.0.0.1:1", "http://127.0.0.1:1: the address of a daemon has no user, query or fragment"),
        ("http://127.0.0.1:1?token=hush", "the address of a daemon has no user, query or fragment"),
    ],
)
def test_an_ambiguous_address_of_a_producer_is_refused(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        open_producer(address)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (redis, {"url": "unix:///run/redis.sock"}, "the schemes are redis://, rediss://"),
        (redis, {"url": "redis:///0"}, "names no host and port"),
        (redis, {"url": "redis://127.0.0.1:99999"}, "is not an address"),
        (redis, {"url": "redis://127.0.0.1/db1"}, "'/db1' after the host is not read"),
        (nats, {"servers": "wss://127.0.0.1"}, "the schemes are nats://, tls://"),
        (nats, {"servers": "nats://127.0.0.1/stream"}, "'/stream' after the host is not read"),
        (nats, {"servers": "nats://127.0.0.1,"}, "names no host and port"),
        (kafka, {"brokers": "kafka://127.0.0.1:9092"}, "'kafka://127.0.0.1:9092' is not host:port"),
        (kafka, {"brokers": "127.0.0.1:9092?ssl.ca.location=x"}, "is not host:port"),
        (kafka, {"brokers": "me:hush@127.0.0.1:9092"}, "brokers: '127.0.0.1:9092' is not host:port"),
    ],
)
def test_an_invalid_address_of_a_source_is_refused(module: Any, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        module.create_source(module.Settings(**settings), SPEC, "s", 0)
    assert "hush" not in str(caught.value)


def test_the_database_is_the_path_or_an_option() -> None:
    for url in ("redis://127.0.0.1:1/3", "redis://127.0.0.1:1?db=3", "redis://me@127.0.0.1:1/?db=3"):
        with connect(url, Login(), 1.0) as client:
            assert client.connection_pool.connection_kwargs["db"] == 3
    assert nats.create_source(nats.Settings(servers="127.0.0.1:4222,nats://b"), SPEC, "n", 0) is not None
    brokers = "a-b.c:9092, SASL_SSL://[::1]:9093"
    assert kafka.create_source(kafka.Settings(brokers=brokers), SPEC, "k", 0) is not None
