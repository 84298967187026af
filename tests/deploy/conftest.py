"""Fixtures shared by the tests of this floor."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from deploy.cli import main
from tests.support.daemon import Daemon, running_daemon, write_sinusoid
from tests.support.finished import Finished, finish_once


class Ended(NamedTuple):
    """How a command ended: its exit code and what it wrote."""

    code: int
    out: str
    err: str


Cli = Callable[..., Ended]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process, because importing torch takes seconds. An uncaught exception fails the test."""

    def run(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["online-meta", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A small configuration whose run is under ``tmp_path``."""
    return write_sinusoid(tmp_path)


BODY_BYTES = 20_000


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that has learned the tasks sin-0 to sin-5. The tests share it and add tasks of their own."""
    folder = tmp_path_factory.mktemp("daemon")
    limits = f"limits = {{ body_bytes = {BODY_BYTES}, body_seconds = 4 }}\n"
    with running_daemon(write_sinusoid(folder, f'answers = "ftml"\n{limits}')) as running:
        assert [answer.status_code for answer in running.submit(*range(6))] == [201] * 6
        running.wait_until_learned(6)
        yield running
        assert running.drain() == 0
        assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Finished:
    """A drained run of a dozen rounds."""
    return finish_once(tmp_path_factory, worker_id)
