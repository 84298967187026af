"""The archive in the configuration: where it can be, and what the commands report about it."""

import time
from pathlib import Path

import pytest

from streams.history.history import History
from streams.history.retention import count_discarded
from streams.history.verify import verify
from tests.deploy.conftest import Cli
from tests.support.daemon import running_daemon, wait_for, write_sinusoid
from tests.support.object_store import BucketServer, free_port, running

SEALING = "[history.sealing]\nsegment_rounds = 5\nledger_bytes = 0\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> BucketServer:
    with running(tmp_path_factory.mktemp("s3") / "log") as bucketed:
        yield bucketed


def section(bucketed: BucketServer, **more: str) -> str:
    options = "".join(
        f"{name} = {value!r}\n" for name, value in {**bucketed.options, "allow_http": "true", **more}.items()
    )
    return f'[history]\narchive = "{bucketed.url}"\n[history.archive_options]\n{options}'


def test_check_reports_the_content_of_the_archive(cli: Cli, tmp_path: Path, server: BucketServer) -> None:
    ended = cli("check", write_sinusoid(tmp_path / "beside"))
    assert (ended.code, f"{tmp_path}/beside/run/history/archive holds 0 segments" in ended.out) == (0, True)
    ended = cli("check", write_sinusoid(tmp_path / "s3", section(server)))
    assert (ended.code, f"{server.url} holds 0 segments" in ended.out) == (0, True), ended.err


@pytest.mark.parametrize(
    ("lines", "code", "message"),
    [
        (
            '[history]\narchive = "ftp://server/x"',
            78,
            "[history] archive: the archive 'ftp://server/x' cannot be opened",
        ),
        ('[history]\narchive = ""', 78, "archive"),
        ('[history]\narchive_options = { region = "x" }\narchive = "here"', 78, "apply only to object stores"),
        ('[history]\narchive = "s3://b/c"\narchive_options = { regoin = "x" }', 78, "'regoin' is not valid"),
        ("[history]\nretension = { rounds = 3 }", 78, "retention"),
        ("[history.retention]\nrounds = 0", 78, "rounds"),
        ('[history.retention]\nthin = "often"', 78, "reservoir"),
        ("[history.sealing]\nsegment_rounds = 0", 78, "segment_rounds"),
    ],
)
def test_wrong_settings_are_refused(cli: Cli, tmp_path: Path, lines: str, code: int, message: str) -> None:
    ended = cli("check", write_sinusoid(tmp_path, lines))
    assert ended.code == code
    assert message in ended.err


def test_check_reports_an_unreachable_object_store(cli: Cli, tmp_path: Path, server: BucketServer) -> None:
    away = section(server, endpoint=f"http://127.0.0.1:{free_port()}") + "retry_config = { max_retries = 0 }\n"
    ended = cli("check", write_sinusoid(tmp_path, away))
    assert ended.code == 75
    assert f"[history] archive = '{server.url}' cannot be reached" in ended.err


def test_a_daemon_seals_into_an_object_store_and_learns_from_there(
    cli: Cli, tmp_path: Path, server: BucketServer
) -> None:
    config = write_sinusoid(tmp_path, section(server) + SEALING)
    with running_daemon(config, "regret.comparator=[]", "regret.baselines=[]") as daemon:
        daemon.submit(*range(12))
        daemon.wait_until_learned(12)
        wait_for("rounds are sealed", lambda: count_sealed_only(tmp_path / "run/history") == 10)
        daemon.submit(*range(12, 20))
        daemon.wait_until_learned(20)
    assert verify(tmp_path / "run/history").clean
    ended = cli("serve", config, "--set", "history.archive=elsewhere", "--set", "history.archive_options={}")
    assert ended.code == 78
    assert f"rounds of this history lie in '{server.url}': restore the former setting" in ended.err
    ended = cli("replay", config, "--out", tmp_path / "again")
    assert ended.code == 0, ended.err


def count_sealed_only(history: Path) -> int:
    """Return how many rounds are only in the archive."""
    with History.open(history, write=False) as opened:
        return len(opened) - int(opened.query("SELECT count(*) FROM payloads")[0][0])


def count_removed(history: Path) -> int:
    """Return how many rounds retention has removed."""
    with History.open(history, write=False) as opened:
        return count_discarded(opened.query)


def test_a_replay_of_discarded_rounds_is_refused(cli: Cli, tmp_path: Path) -> None:
    config = write_sinusoid(tmp_path, SEALING + "[history.retention]\nrounds = 5\n")
    with running_daemon(config, "regret.comparator=[]", "regret.baselines=[]", "checkpoint.every_rounds=1") as daemon:
        for task in range(1_000):  # until every checkpoint is newer than the retention decision, and a few rounds more
            daemon.submit(task)
            daemon.wait_until_learned(task + 1)
            if count_removed(tmp_path / "run/history"):
                break
            time.sleep(0.2)
        daemon.submit(1_000)
        assert daemon.wait_until_learned(task + 2)["rounds"]["learned"] == task + 2
    ended = cli("replay", config, "--out", tmp_path / "again")
    assert ended.code == 78
    assert "retention has removed" in ended.err
    assert verify(tmp_path / "run/history").clean
