"""The command that lists a run's dead letters."""

import json
from pathlib import Path

from streams.ingest.dead_letters import DeadLetters
from streams.types import Arrival, Rejected
from tests.deploy.conftest import Cli


def test_letters_are_listed_with_their_reason_and_body_file(cli: Cli, tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path / "dead-letters", 10, 10_000, clock=lambda: 5.0)
    letters.put(Arrival("../\x1b[31m", b"12345", "broker", None), Rejected("bad_id", "not this one"))
    letters.put(Arrival("b", b"123", "http", None), Rejected("too_large", "much"), complete=False)
    ended = cli("dead-letters", tmp_path)
    assert ended.code == 0
    first, why, second, _ = ended.out.splitlines()
    assert "broker '../\\x1b[31m': 5 bytes" in first, "no sender writes to the terminal"
    assert Path(first.split()[0]).read_bytes() == b"12345"
    assert why == "    bad_id: not this one"
    assert second.endswith("http 'b': 3 bytes, 3 of them kept")
    lines = [json.loads(line) for line in cli("dead-letters", tmp_path, "--json").out.splitlines()]
    assert [line["reason"] for line in lines] == ["bad_id", "too_large"]
    assert Path(lines[1]["body"]).read_bytes() == b"123"


def test_a_run_without_letters_lists_none_and_a_missing_run_is_an_error(cli: Cli, tmp_path: Path) -> None:
    assert cli("dead-letters", tmp_path) == (0, "", "")
    ended = cli("dead-letters", tmp_path / "none")
    assert ended.code == 78
    assert "is not a folder" in ended.err
