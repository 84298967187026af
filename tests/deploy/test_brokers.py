"""A daemon that reads from a broker, the check of the broker, and submitting to targets other than a daemon."""

import sys
from pathlib import Path

import httpx
import pytest

from tests.deploy.conftest import Cli
from tests.deploy.test_commands import write_tasks
from tests.support.daemon import free_port, running_daemon, wait_for, write_sinusoid
from tests.support.secure_servers import PASSWORD, USER, SecureRedis
from tests.support.servers import Redis


def test_a_daemon_learns_tasks_submitted_to_its_broker(tmp_path: Path, cli: Cli) -> None:
    server = Redis(tmp_path / "redis")
    source = f'[[source]]\nkind = "redis"\nname = "queue"\nurl = "{server.url}"\n'
    config = write_sinusoid(tmp_path / "run", source)
    try:
        ended = cli("check", config)
        assert ended.code == 75
        assert f"{config}: [[source]] queue: its broker cannot be read now: " in ended.err
        assert "Connection refused" in ended.err
        server.start()
        address = f"{server.url}?stream=tasks"
        ended = cli("submit", *write_tasks(tmp_path, 0, 1, 2), "--url", address)
        assert (ended.code, ended.out) == (0, "3 sent, 0 refused\n")
        ended = cli("check", config)
        assert ended.code == 0
        assert "sources  queue (3 entries there)\n" in ended.out
        with running_daemon(config) as daemon:
            daemon.wait_until_learned(3)
            wait_for("the lag is 0", lambda: 'online_meta_source_lag{source="queue"} 0.0' in metrics(daemon.client))
            server.kill()
            wait_for("the failure is logged", lambda: "queue failed and will be read again" in daemon.log.read_text())
            server.start()
            assert cli("submit", *write_tasks(tmp_path, 2, 3), "--url", address).code == 0
            daemon.wait_until_learned(4)
            ids = [daemon.client.get(f"/v1/tasks/file-{t}").json()["round"] for t in range(4)]
            assert ids == [0, 1, 2, 3]
            assert daemon.drain() == 0
    finally:
        server.stop()


def test_a_wrong_login_is_reported_at_start(tmp_path: Path, cli: Cli) -> None:
    server = SecureRedis(tmp_path / "redis")
    files = {"password_file": tmp_path / "password", "ca_file": tmp_path / "redis" / "cert.pem"}
    files |= {"certificate_file": files["ca_file"], "key_file": tmp_path / "redis" / "key.pem"}
    address = f"rediss://{USER}@127.0.0.1:{server.port}/0"
    lines = "".join(f'{name} = "{file}"\n' for name, file in files.items())
    config = write_sinusoid(tmp_path / "run", f'[[source]]\nkind = "redis"\nurl = "{address}"\n{lines}')
    query = "".join(f"&{name}={file}" for name, file in files.items())
    submit = ("submit", *write_tasks(tmp_path, 0, 1), "--url", f"{address}?stream=tasks{query}")
    try:
        server.start()
        for message in ("password: No such file or directory", "refuses the login: invalid username-password"):
            for ended in (cli("check", config), cli(*submit)):
                assert ended.code == 78
                assert message in ended.err
                assert "hush-hush" not in ended.err
            files["password_file"].write_text("hush-hush")
        files["password_file"].write_text(PASSWORD)
        ended = cli(*submit)
        assert (ended.code, ended.out) == (0, "2 sent, 0 refused\n")
        assert "sources  redis (2 entries there)\n" in cli("check", config).out
    finally:
        server.stop()


def test_a_missing_client_library_is_a_configuration_error(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_sinusoid(tmp_path, '[[source]]\nkind = "redis"\n')
    monkeypatch.delitem(sys.modules, "streams.brokers.redis", raising=False)
    monkeypatch.setitem(sys.modules, "redis", None)
    for command in ("check", "serve"):
        ended = cli(command, config)
        assert ended.code == 78
        assert f"{config}: [[source]] redis: " in ended.err
        assert "pip install 'online-meta[redis]'" in ended.err


def metrics(client: httpx.Client) -> str:
    return client.get("/metrics").text


def test_submit_to_a_folder(cli: Cli, tmp_path: Path) -> None:
    files, spool = write_tasks(tmp_path, 0, 1), tmp_path / "spool"
    spool.mkdir()
    odd = tmp_path / "a b.safetensors"
    odd.write_bytes(b"x")
    ended = cli("submit", *files, odd, "--url", f"file://{spool}")
    assert (ended.code, ended.out) == (78, "2 sent, 1 refused\n")
    assert "bad_id" in ended.err
    assert sorted(file.name for file in spool.iterdir()) == sorted(file.name for file in files)
    ended = cli("submit", *files, "--url", f"file://{tmp_path}/none")
    assert (ended.code, ended.out) == (78, "0 sent, 0 refused, 2 not sent\n")


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("redis://127.0.0.1:{port}/0", 78, "--url 127.0.0.1:{port}: which stream?"),
        ("redis://127.0.0.1:{port}/0?stream=s", 75, "unreachable (no answer)"),
        ("nats://127.0.0.1:{port}/s", 75, "unreachable (no answer)"),
    ],
)
def test_submit_to_an_unreachable_broker(cli: Cli, tmp_path: Path, url: str, code: int, message: str) -> None:
    port = free_port()
    ended = cli("submit", *write_tasks(tmp_path, 0), "--url", url.format(port=port), "--patience", "0")
    assert ended.code == code
    assert message.format(port=port) in ended.err
    token = tmp_path / "token"
    token.write_text("secret")
    ended = cli("submit", *write_tasks(tmp_path, 0), "--url", "file:///x", "--token-file", token)
    assert (ended.code, "--token-file is only for a daemon" in ended.err) == (78, True)
