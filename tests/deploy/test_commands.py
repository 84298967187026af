"""The command line, except for commands that have test files of their own."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from deploy.cli import group
from tests.deploy.conftest import Cli, Ended
from tests.support.daemon import Daemon, encode, free_port, sinusoid, write_request

COMMANDS = (
    "adapt",
    "check",
    "compare",
    "config",
    "demo",
    "export",
    "forget",
    "fork",
    "promote",
    "quarantine",
    "replay",
    "serve",
    "status",
    "submit",
    "tune",
    "verify",
)


def write_tasks(folder: Path, *tasks: int, prefix: str = "file") -> list[Path]:
    """Write tasks of the stream as files; return the files in order."""
    files = [folder / f"{prefix}-{t}.safetensors" for t in tasks]
    for t, file in zip(tasks, files, strict=True):
        file.write_bytes(sinusoid(t))
    return files


def test_the_documented_commands_exist(cli: Cli) -> None:
    ended = cli("--help")
    assert ended.code == 0
    assert tuple(re.findall(r"^  (\w+)  ", ended.out, re.MULTILINE)) == COMMANDS
    assert "64 wrong usage, 70 internal error or damaged data, 75 temporary failure" in " ".join(ended.out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_has_help(cli: Cli, command: str) -> None:
    ended = cli(command, "--help")
    assert ended.code == 0
    assert f"{command} [OPTIONS]" in ended.out
    made = group.get_command(group.make_context("x", [], resilient_parsing=True), command)
    assert made is not None
    assert len(made.help or "") > 40
    assert [option.name for option in made.params if option.param_type_name == "option" and not option.help] == []


def test_the_version(cli: Cli) -> None:
    assert cli("--version").out.startswith("online-meta, version ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serv", "x.toml"), "no command 'serv': did you mean 'serve'? known: adapt, check,"),
        (("zzz",), "no command 'zzz': known: adapt,"),
        (("serve",), "Missing argument 'CONFIG'"),
        (("serve", "x.toml", "--port", "1"), "No such option"),
        (("status",), "Missing option '--url'"),
        (("adapt", "--support", "a", "--query", "b"), "give either --url or --checkpoint"),
        (("adapt", "--support", "a", "--query", "b", "--url", "u", "--checkpoint", "c"), "give either --url"),
        (("replay", "x.toml", "--rounds", "0"), "0 is not in the range x>=1"),
        (("demo", "--rounds", "many"), "'many' is not a valid integer"),
        (("submit", "--url", "http://127.0.0.1:1"), "Missing argument 'FILES...'"),
    ],
)
def test_wrong_usage_is_a_usage_error(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    ended = cli(*arguments)
    assert (ended.code, ended.out) == (64, "")
    assert message in ended.err


def test_status_as_text_and_as_json(daemon: Daemon, cli: Cli) -> None:
    now = daemon.status()
    ended = cli("status", "--url", daemon.url, "--json")
    assert (ended.code, ended.err, ended.out.count("\n")) == (0, "", 1)
    printed = json.loads(ended.out)
    assert printed.keys() == now.keys()
    assert printed["rounds"]["ingested"] == now["rounds"]["ingested"]
    ended, verdict = status_with_verdict(daemon, cli)
    assert ended.code == 0
    for part in (
        f"of {now['rounds']['ingested']} ingested",
        "regret against from scratch",
        "alive, 1 rank, 0 restarts",
    ):
        assert part in ended.out
    words = " ".join(ended.out.replace("│", " ").split())
    assert f"verdict {verdict}" in words


def status_with_verdict(daemon: Daemon, cli: Cli) -> tuple[Ended, str]:
    """Return what ``status`` prints, and the verdict at that time: of a round that is not scored just then."""

    def read_verdict() -> str:
        sentence: str = daemon.status()["verdict"]["sentence"]
        return sentence

    while True:
        before, ended, after = read_verdict(), cli("status", "--url", daemon.url), read_verdict()
        if before == after:
            return ended, before


@pytest.mark.parametrize("command", [("status",), ("adapt",), ("submit", "--patience", "0")])
def test_an_unreachable_daemon_is_reported(cli: Cli, tmp_path: Path, command: tuple[str, ...]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    support, query = write_request(tmp_path, 0)
    more = {"adapt": ("--support", support, "--query", query), "submit": (support, query)}.get(command[0], ())
    ended = cli(*command, *more, "--url", url)
    assert ended.code == 75
    assert url in ended.err
    assert ("0 new, 0 already there, 0 refused, 2 not sent" in ended.out) == (command[0] == "submit")


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8780", "ftp://x", "http://", "http://127.0.0.1:99999", "http://127.0.0.1:x", ""]
)
@pytest.mark.parametrize("command", ["status", "submit"])
def test_an_invalid_address_is_refused(cli: Cli, tmp_path: Path, url: str, command: str) -> None:
    files = write_tasks(tmp_path, 0) if command == "submit" else []
    ended = cli(command, *files, "--url", url)
    assert ended.code == 78
    example = (
        " of a target, such as http://127.0.0.1:8780"
        if command == "submit"
        else ": write it like http://127.0.0.1:8780"
    )
    assert f"--url {url!r} is not an address{example}" in ended.err


def test_submit_counts_new_duplicate_and_refused_tasks(daemon: Daemon, cli: Cli, tmp_path: Path) -> None:
    files = write_tasks(tmp_path, 700, 701, 702)
    ended = cli("submit", *files, "--url", daemon.url)
    assert (ended.code, ended.out) == (0, "3 new, 0 already there, 0 refused\n")
    rounds = [daemon.client.get(f"/v1/tasks/file-{t}").json()["round"] for t in (700, 701, 702)]
    assert rounds == list(range(rounds[0], rounds[0] + 3))
    more = write_tasks(tmp_path, 703)
    broken, changed, odd = (
        tmp_path / "broken.safetensors",
        tmp_path / "file-701.safetensors",
        tmp_path / "a b.safetensors",
    )
    broken.write_bytes(b"no task")
    changed.write_bytes(sinusoid(709))
    odd.write_bytes(sinusoid(710))
    ended = cli("submit", *files, broken, odd, *more, "--url", daemon.url)
    assert (ended.code, ended.out) == (78, "1 new, 2 already there, 3 refused\n")
    errors = ended.err.splitlines()
    assert [line.split(": ")[0] for line in errors] == [str(changed), str(broken), str(odd)]
    assert [re.findall(r": (\w+) \(HTTP (\d+)\)", line) for line in errors] == [
        [("conflict", "409")],
        [("unreadable", "422")],
        [("bad_id", "422")],
    ]


def test_submit_of_a_missing_file(daemon: Daemon, cli: Cli, tmp_path: Path) -> None:
    before = daemon.status()["rounds"]["ingested"]
    for url in (daemon.url, "http://127.0.0.1:1"):
        ended = cli("submit", *write_tasks(tmp_path, 720), tmp_path / "none", "--url", url)
        assert (ended.code, ended.out) == (78, "")
        assert ended.err.strip() == f"error: {tmp_path}/none cannot be read: No such file or directory"
    assert daemon.status()["rounds"]["ingested"] == before


def test_adapt_prints_or_writes_the_daemons_predictions(daemon: Daemon, cli: Cli, tmp_path: Path) -> None:
    daemon.wait_until_learned(daemon.status()["rounds"]["ingested"])
    support, query = write_request(tmp_path, 800)
    ask = ("adapt", "--support", support, "--query", query, "--url", daemon.url)
    assert cli(*ask, "--out", tmp_path / "out").code == 0
    predictions = load((tmp_path / "out").read_bytes())["predictions"]
    printed = torch.tensor([[float(value) for value in line.split()] for line in cli(*ask).out.splitlines()])
    torch.testing.assert_close(printed, predictions, rtol=1e-5, atol=1e-5)
    refused = cli(*ask, "--samples", "3")
    assert (refused.code, "fixed_samples: ftml cannot answer with 3 samples" in refused.err) == (78, True)


def test_adapt_explains_unsuitable_files(daemon: Daemon, cli: Cli, tmp_path: Path) -> None:
    support, query = write_request(tmp_path, 800)
    text = tmp_path / "text"
    text.write_text("no tensors")
    for given, message in (
        ((tmp_path / "none", query), "none cannot be read: No such file"),
        ((text, query), f"{text} is not a safetensors file"),
        ((query, support), f"{query} has no support_x and no support_y; it has query_x"),
    ):
        ended = cli("adapt", "--support", given[0], "--query", given[1], "--url", daemon.url)
        assert (ended.code, message in ended.err) == (78, True), ended.err
    support.write_bytes(encode({"support_x": torch.zeros(2, 2), "support_y": torch.zeros(2, 1)}))
    ended = cli("adapt", "--support", support, "--query", query, "--url", daemon.url)
    assert ended.code == 78
    assert "the daemon answered 422: wrong_shape: support_x has shape (2, 2); it must be (n, 1)" in ended.err
