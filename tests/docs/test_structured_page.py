"""The programs of the page on several inputs run as written, and its configuration takes the tasks that they send."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from deploy.config.config import read_config
from streams.formats import wire
from streams.spec import Limits
from tests.deploy.conftest import (
    Cli,
    cli,  # noqa: F401 - a fixture
)
from tests.docs.pages import blocks_of, read_page
from tests.support.daemon import free_port

PAGE = read_page("how-to/structured-tasks.md")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the page; its modules are forgotten afterwards."""
    for block in blocks_of(PAGE):
        if block.title:
            (tmp_path / block.title).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("masked", "send", "found"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_the_configuration_takes_the_tasks_that_are_sent(folder: Path, cli: Cli) -> None:  # noqa: F811
    ended = cli("check", "masked.toml", "--set", f"serve.port={free_port()}")
    assert (ended.code, ended.err) == (0, "")
    spec = read_config(folder / "masked.toml").task
    task = runpy.run_path("send.py")["make_task"](7)
    found = wire.decode(wire.encode(task), spec, Limits())
    assert torch.equal(found.query.x["tokens"], task.query.x["tokens"])
    assert list(wire.name_fields("support", found.support)) == [
        "support_x.mask",
        "support_x.tokens",
        "support_y",
        "support_weight",
    ]


def test_the_program_without_a_daemon_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    runpy.run_path(str(folder / "learn.py"))
    assert "accuracy" in capsys.readouterr().out


def test_the_loss_of_several_targets_has_a_value_for_each_row(folder: Path) -> None:
    found = runpy.run_path(str(folder / "found.py"))["found"]
    y = {"kind": torch.tensor([0, 2]), "box": torch.ones(2, 4)}
    rows = found({"kind": torch.zeros(2, 3), "box": torch.zeros(2, 4)}, y)
    torch.testing.assert_close(rows, torch.full((2,), 4 + float(torch.tensor(3.0).log())))
