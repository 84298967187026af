"""A daemon whose own leader cuts a stream of samples into tasks."""

import json
from itertools import pairwise
from pathlib import Path

import torch

from online_meta.testing.segmented import draw_lines
from streams.history.history import History
from streams.history.verify import verify
from tests.deploy.conftest import Cli
from tests.support.daemon import running_daemon, wait_for, write_sinusoid

LENGTHS = [30, 22, 41, 35, 28, 25]
SOURCE = """
[[source]]
kind = "samples"
path = "{path}"
x = ["x"]
y = ["y"]
grows = false
change = "loss_jump"
change_options = {{ jump = 3.0 }}
likelihood = "leader"
most = 40
"""
SETS = ("regret.comparator=[]", "regret.baselines=[]", "inner.steps=10", "inner.lr=0.1")


def test_segmenting_uses_the_current_leader_and_a_kill_loses_no_row(tmp_path: Path, cli: Cli) -> None:
    rows = tmp_path / "rows.jsonl"
    text = [json.dumps({"x": float(x[0]), "y": float(y[0])}) + "\n" for x, y in draw_lines(0, LENGTHS)]
    rows.write_text("".join(text))
    config = write_sinusoid(tmp_path, SOURCE.format(path=rows))
    checked = cli("check", config, *(part for one in SETS for part in ("--set", one)))
    assert checked.code == 0, checked.err
    with running_daemon(config, *SETS) as daemon:
        daemon.wait_until_learned(2)
        daemon.process.kill()
        daemon.process.wait()
    with running_daemon(config, *SETS) as daemon:
        with History.open(tmp_path / "run/history", write=False) as history:
            wait_for("all rows are read", lambda: history.cursor("samples") == str(rows.stat().st_size))
            daemon.wait_until_learned(len(history))
        assert "cannot be read" not in daemon.log.read_text()
    assert verify(tmp_path / "run/history").clean
    ends = [sum(map(len, text[:count])) for count in range(len(text) + 1)]
    with History.open(tmp_path / "run/history", write=False) as history:
        entries = [history.entry(round) for round in range(len(history))]
        found = [torch.cat([task.support.x, task.query.x]) for task in map(history.__getitem__, range(len(history)))]
    begins = [ends.index(int(entry.id.removeprefix("samples-"))) for entry in entries]
    assert [len(x) for x in found] == [end - begin for begin, end in pairwise([*begins, len(text)])]
    assert sum(map(len, found)) == len(text), "each row is in one task"
    assert len(found) < len(text) / 5, "the tasks are not too short"
