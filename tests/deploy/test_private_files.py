"""Only the user who runs the daemon can read a run, and a secret that others can read is refused."""

import os
import shlex
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streams.brokers import kafka, nats, redis
from streams.brokers.login import KafkaLogin, Login, NatsLogin
from streams.private_files import SecretExposed, check_private
from tests.deploy.conftest import Cli
from tests.support.certificate import write_certificate
from tests.support.daemon import running_daemon, wait_for, write_sinusoid


def exposed(folder: Path) -> list[str]:
    """Return the files and folders under ``folder``, itself included, to which other users have access."""
    found = [path for path in (folder, *folder.rglob("*")) if stat.S_IMODE(path.lstat().st_mode) & 0o077]
    return [str(path.relative_to(folder.parent)) for path in found]


@pytest.fixture
def usual_umask() -> Iterator[None]:
    """Have the umask that most systems set, under which others can read new files."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual_umask")
def test_everything_that_a_run_writes_is_private(tmp_path: Path, cli: Cli) -> None:
    config = write_sinusoid(tmp_path)
    run, archive = tmp_path / "run", tmp_path / "archive"
    sealed = (f"history.archive={archive}", "history.sealing.segment_rounds=4", "checkpoint.every_rounds=2")
    with running_daemon(config, *sealed) as daemon:
        daemon.submit(*range(9))
        assert daemon.post(b"no task").status_code == 422
        daemon.wait_until_learned(9)
        daemon.wait_until_compared(9)
        wait_for("rounds are sealed", lambda: archive.exists() and any(archive.iterdir()))
        assert exposed(run) == exposed(archive) == []
        assert daemon.drain() == 0
    replayed = tmp_path / "replayed"
    assert cli("replay", config, "--out", replayed, *(part for one in sealed for part in ("--set", one))).code == 0
    assert exposed(run) == exposed(archive) == exposed(replayed) == []
    written = {path.name for path in run.iterdir()}
    assert {"history", "checkpoints", "dead-letters", "report.html", "regret.png", "leader.safetensors"} <= written
    assert list((run / "dead-letters").iterdir())


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o666])
def test_a_secret_that_others_can_read_is_refused(cli: Cli, config: Path, mode: int) -> None:
    folder = config.parent
    write_certificate(folder)
    (folder / "the token").write_text("secret\n")
    token = ("--set", f"serve.token_file={folder / 'the token'}")
    tls = ("--set", f"serve.tls_cert={folder / 'cert.pem'}", "--set", f"serve.tls_key={folder / 'key.pem'}")
    for file, setting, options in (("the token", "token_file", token), ("key.pem", "tls_key", tls)):
        path = folder / file
        path.chmod(mode)
        mend = f"chmod 600 {shlex.quote(str(path))}"
        for command in ("serve", "check"):
            ended = cli(command, config, *options)
            assert ended.code == 78
            assert f"[serve] {setting} {path} contains a secret" in ended.err
            assert f"(its mode is {mode:04o}): run `{mend}`" in ended.err
        assert not (folder / "run").exists()
        subprocess.run(mend, shell=True, check=True)
    assert cli("check", config, *token, *tls).code == 0


def test_a_token_that_others_can_read_is_not_sent(cli: Cli, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    ended = cli("status", "--url", "http://127.0.0.1:9", "--token-file", token)
    assert ended.code == 78
    assert f"--token-file {token} contains a secret" in ended.err
    assert f"chmod 600 {token}" in ended.err


def read_redis(file: str) -> object:
    return redis.connect("redis://127.0.0.1/0", Login(password_file=file), 1)


def read_redis_key(file: str) -> object:
    return redis.connect("rediss://127.0.0.1/0", Login(certificate_file=f"{file}.cert", key_file=file), 1)


LOGINS: dict[str, Callable[[str], object]] = {
    "redis password": read_redis,
    "redis key": read_redis_key,
    "key within the certificate": lambda file: nats.read_login(NatsLogin(certificate_file=file)),
    "nats password": lambda file: nats.read_login(NatsLogin(user="me", password_file=file)),
    "nats token": lambda file: nats.read_login(NatsLogin(token_file=file)),
    "nats credentials": lambda file: nats.read_login(NatsLogin(credentials_file=file)),
    "kafka properties": lambda file: kafka.read_login(KafkaLogin(properties_file=file)),
}


@pytest.mark.parametrize("login", LOGINS)
def test_a_login_that_others_can_read_is_refused(tmp_path: Path, login: str) -> None:
    write_certificate(tmp_path)
    secret = tmp_path / "secret"
    if "key" in login:
        (tmp_path / "secret.cert").write_bytes((tmp_path / "cert.pem").read_bytes())
        secret.write_bytes((tmp_path / "key.pem").read_bytes() + (tmp_path / "cert.pem").read_bytes())
    else:
        secret.write_text("security.protocol = SSL\n" if "kafka" in login else "word")
    assert LOGINS[login](str(secret)) is not None
    secret.chmod(0o640)
    with pytest.raises(SecretExposed, match=f"chmod 600 {secret}"):
        LOGINS[login](str(secret))


def test_a_kafka_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a key")
    (tmp_path / "properties").write_text(f"ssl.key.location = {tmp_path / 'key'}\n")
    (tmp_path / "key").chmod(0o604)
    with pytest.raises(SecretExposed, match=f"chmod 600 {tmp_path / 'key'}"):
        kafka.read_login(KafkaLogin(properties_file=str(tmp_path / "properties")))


def test_a_secret_may_come_through_a_pipe(cli: Cli) -> None:
    """As the shell passes it for --token-file <(pass show token)."""
    reading, writing = os.pipe()
    os.write(writing, b"secret\n")
    os.close(writing)
    ended = cli("status", "--url", "http://127.0.0.1:9", "--token-file", f"/dev/fd/{reading}")
    os.close(reading)
    assert ended.code == 75, "the token was read, and no daemon answers"


@pytest.mark.parametrize(("mode", "accepted"), [(0o440, True), (0o640, True), (0o644, False), (0o660, False)])
def test_the_group_may_read_a_secret_of_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, accepted: bool
) -> None:
    """A process of another user cannot read it otherwise."""
    secret = tmp_path / "secret"
    secret.write_text("word")
    secret.chmod(mode)
    found = os.stat(secret)
    monkeypatch.setattr(os, "stat", lambda _: os.stat_result((*found[:4], 0, *found[5:])))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    if accepted:
        check_private(secret)
    else:
        with pytest.raises(SecretExposed):
            check_private(secret)
