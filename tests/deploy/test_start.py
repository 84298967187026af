"""A daemon that cannot start reports why and changes nothing."""

import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

from deploy.checks.preflight import check_learning
from deploy.commands.demo import choose_port
from deploy.config.config import ServeSettings, read_config
from deploy.exits import CommandError, ConfigError
from deploy.processes.join import main as join
from deploy.server.listener import bind
from streams.history.history import History
from tests.deploy.conftest import Cli
from tests.support.daemon import ROOT, Daemon, write_sinusoid
from tests.support.listeners import Listener, list_listeners


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_checks_before_a_start_do_not_import_torchs_compiler(config: Path) -> None:
    """Importing the compiler takes a second, during which the daemon answers nobody."""
    program = (
        "from pathlib import Path; from deploy.config.config import read_config; from deploy.checks.preflight import *;"
    )
    program += (
        f"check_learning(read_config(Path({str(config)!r}), ())); import sys; print('torch._dynamo' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (ended.stdout.strip(), ended.returncode) == ("False", 0), ended.stderr


def test_the_checks_use_the_threads_of_the_engine(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them would wait for one another, busily, where other processes work."""
    used: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    check_learning(read_config(config, ("engine.threads=3",)))
    assert used[:1] == [3]


def test_a_running_daemon_listens_at_its_own_address_only(daemon: Daemon) -> None:
    for name in ("trainer", "comparators"):
        daemon.child(name)
    url = httpx.URL(daemon.url)
    assert list_listeners(daemon.process.pid) == {Listener("online_meta", "tcp", url.host, url.port)}


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ('kind = "deepspeed"\nprocesses = 2', "[engine] nodes = [1, 1]: the run has one machine, the daemon's own"),
        ('kind = "deepspeed"\nnodes = [1, 2]\nrendezvous = "127.0.0.1:29400"', "set trusted_network = true"),
    ],
    ids=["one machine", "no trusted network"],
)
def test_a_machine_that_may_not_join(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str, message: str
) -> None:
    assert join(str(write_sinusoid(tmp_path, f"[engine]\n{engine}\n"))) == 78
    assert message in capsys.readouterr().err


def test_a_port_in_use(cli: Cli, config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for command in ("serve", "check"):
            ended = cli(command, config, "--set", f"serve.port={port}")
            assert ended.code == 75
            assert f"cannot listen on 127.0.0.1:{port}: Address already in use. Is another daemon" in ended.err
            assert "--set serve.port=PORT" in ended.err
        with pytest.raises(CommandError) as stopped:
            choose_port(port)  # otherwise the demo would send its tasks to an unrelated server
        assert stopped.value.code == 75
    assert choose_port(0) > 0


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
def test_an_address_of_another_machine(host: str) -> None:
    with pytest.raises(ConfigError, match=f"host = '{host}' is not an address of this machine"):
        bind(ServeSettings(host=host, port=0))


def test_a_second_daemon_on_the_same_run(daemon: Daemon, cli: Cli) -> None:
    config = daemon.log.with_suffix(".toml")
    ended = cli("serve", config, "--set", "serve.port=0")
    assert ended.code == 75
    assert "already has a writer" in ended.err
    assert "another daemon serves this run already" in ended.err
    trainer = daemon.status()["trainer"]
    assert (trainer["alive"], trainer["restarts"], trainer["world_size"]) == (True, 0, 1)
    assert cli("verify", config.parent / "run/history").code == 0, "reading needs no lock"


def make_history(config: Path) -> Path:
    """Create an empty history at the run's path; return its file."""
    folder = config.parent / "run/history"
    History.open(folder, write=True).close()
    return folder / "ledger.sqlite"


@pytest.mark.parametrize("command", ["serve", "check", "verify", "replay"])
@pytest.mark.parametrize("kind", ["newer", "stranger", "text"])
def test_a_history_of_another_kind_is_left_untouched(cli: Cli, config: Path, kind: str, command: str) -> None:
    file = make_history(config)
    if kind == "text":
        file.write_bytes(b"my notes, not a database" * 1000)
        message = "is not a history (not an SQLite database)"
    else:
        pragma, message = {
            "newer": ("user_version = 99", "has format 99; this version reads 1"),
            "stranger": ("application_id = 7", "is not a history (an SQLite database of another program)"),
        }[kind]
        with sqlite3.connect(file) as ledger:
            ledger.execute(f"PRAGMA {pragma}")
            ledger.execute("PRAGMA journal_mode=delete")
        ledger.close()
    before = contents(config.parent)
    ended = cli(command, file.parent if command == "verify" else config)
    assert ended.code == 78
    assert f"{file} {message}" in ended.err
    assert "it is left untouched" in ended.err
    assert contents(config.parent) == before


@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_run_path_below_a_file(cli: Cli, config: Path, command: str) -> None:
    ended = cli(command, config, "--set", f"run.path={config}/run")
    assert ended.code == 78
    assert f"{config}: [run] path = '{config}/run': " in ended.err
    assert "cannot be written (Not a directory); choose a folder in which this user may write" in ended.err


def can_mount() -> bool:
    """Return whether this user can make private mounts."""
    if shutil.which("unshare") is None:
        return False
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
    return subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="no private mounts here (unshare -rm)")
def test_an_unwritable_run_path(config: Path) -> None:
    (config.parent / "run").mkdir()
    script = 'mount -t tmpfs -o ro tmpfs "$1" && exec "$2" -m online_meta serve "$3"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", config.parent / "run", sys.executable, config]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 78
    assert f"{config}: [run] path = '{config.parent}/run'" in ended.stderr
    assert "cannot be written (Read-only file system)" in ended.stderr
    assert "Traceback" not in ended.stderr
