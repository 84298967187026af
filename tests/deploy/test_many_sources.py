"""A daemon with five sources: a folder, two growing files of rows, an iterator, and HTTP. Task sizes vary."""

import json
from pathlib import Path

import pytest

from deploy.checks.preflight import check_sources
from deploy.config.config import read_config
from deploy.exits import ConfigError
from streams.entities import find_entity
from streams.formats.wire import encode
from streams.ingest.dead_letters import read_letters
from tests.deploy.conftest import Cli
from tests.support.daemon import Daemon, running_daemon, wait_for, write_sinusoid
from tests.support.feeds import sequences

LENGTHS = [5, 2, 9]
SOURCES = """
[[source]]
kind = "http"
[[source]]
kind = "files"
folder = "{folder}/spool"
poll_seconds = 0.05
processed = "move"
[[source]]
kind = "samples"
path = "{folder}/rows.jsonl"
x = "x"
y = "y"
key = "key"
poll_seconds = 0.05
[[source]]
kind = "rows"
path = "{folder}/entities.jsonl"
x = "x"
y = "y"
group_by = "name"
max_rows = 4
support = "own past"
grows = true
poll_seconds = 0.05
[[source]]
kind = "python"
iterator = "tests.support.feeds:sequences"
args = {{ lengths = {lengths} }}
"""
SETS = ("regret.comparator=[]", "regret.baselines=[]")
TASK = 'x_shape = [-1, 3]\ny = "class"\nways = 4'
MODEL = 'build = "trainers.models:gru"\nargs = { inputs = 3, outputs = 4, hidden = 4 }\nloss = "cross_entropy"'


@pytest.fixture
def fed(tmp_path: Path) -> Path:
    """A configuration with these sources. The fixture is the path of its file."""
    (tmp_path / "spool").mkdir()
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "entities.jsonl").touch()
    config = write_sinusoid(tmp_path, SOURCES.format(folder=tmp_path, lengths=LENGTHS))
    text = config.read_text().replace('x_shape = [1]\ny = "real"\ny_shape = [1]', TASK)
    before, _, after = text.partition('build = "')
    config.write_text(f"{before}{MODEL}{after[after.index('[inner]') - 1 :]}")
    return config


def add_rows(folder: Path, first: int) -> None:
    """Append ten rows. After every fourth row the key changes, and so does the length of the sequences."""
    with (folder / "rows.jsonl").open("a") as file:
        for n in range(first, first + 10):
            x = [[n / 10, 0.0, 1.0]] * (2 + n // 4)
            file.write(json.dumps({"x": x, "y": n % 4, "key": n // 4}) + "\n")


def add_entities(folder: Path, first: int) -> None:
    """Append ten rows of two entities in turn."""
    with (folder / "entities.jsonl").open("a") as file:
        for n in range(first, first + 10):
            file.write(json.dumps({"x": [[n / 10, 0.0, 1.0]] * 3, "y": n % 4, "name": f"Store {n % 2}"}) + "\n")


def drop(folder: Path, name: str, body: bytes) -> None:
    (folder / f".{name}").write_bytes(body)
    (folder / f".{name}").rename(folder / "spool" / name)


def rounds_of(daemon: Daemon) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (daemon.log.parent / "run/rounds.jsonl").read_text().splitlines():
        played = json.loads(line)
        found.setdefault(played["source"], []).append(played["id"])
    return found


def test_each_source_resumes_at_its_position_after_a_kill(fed: Path, cli: Cli) -> None:
    folder = fed.parent
    one, two = sequences([4, 7])
    with running_daemon(fed, *SETS) as daemon:
        drop(folder, "first.safetensors", encode(one))
        drop(folder, "bad.safetensors", b"no task")
        add_rows(folder, 0)
        add_entities(folder, 0)
        daemon.wait_until_learned(len(LENGTHS) + 1 + 2 + 2, seconds=150)
        wait_for("the files are moved", lambda: not list((folder / "spool").glob("*.safetensors")))
        daemon.process.kill()
        daemon.process.wait()
    # Undo the move, like a kill just before it.
    (folder / "spool/done/first.safetensors").rename(folder / "spool/first.safetensors")
    add_rows(folder, 10)
    add_entities(folder, 10)
    with running_daemon(fed, *SETS) as daemon:
        assert daemon.post(encode(two), "posted").status_code == 201
        daemon.wait_until_learned(len(LENGTHS) + 1 + 4 + 4 + 1, seconds=150)
        wait_for("the file is moved", lambda: (folder / "spool/done/first.safetensors").exists())
        assert daemon.drain() == 0
        found = rounds_of(daemon)
        assert "Traceback" not in daemon.log.read_text()
    assert found["python"] == ["python-0", "python-1", "python-2"]
    assert found["files"] == ["first"]
    assert len(set(found["samples"])) == len(found["samples"]) == 4
    assert sorted(found["rows"]) == sorted({*found["rows"]})
    assert [find_entity(id) for id in found["rows"]] == ["Store 0", "Store 1"] * 2
    assert found["http"] == ["posted"]
    assert (folder / "spool/rejected/bad.safetensors").read_bytes() == b"no task"
    ((body, known),) = read_letters(folder / "run/dead-letters")
    assert (known["source"], known["id"], body.read_bytes()) == ("files", "bad", b"no task")
    assert "files 'bad': 7 bytes" in cli("dead-letters", folder / "run").out


def test_an_unreadable_file_of_a_source_is_reported_before_the_first_round(fed: Path) -> None:
    drop(fed.parent, "bad.npz", b"PK")
    with pytest.raises(ConfigError, match=r"\[\[source\]\] files: its task bad would be refused: unreadable: .*npz"):
        check_sources(read_config(fed))
