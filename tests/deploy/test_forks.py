"""Forks of a run: the same history, played with other settings from a round on."""

import shutil
from pathlib import Path

import pytest
import torch

from deploy import forks
from deploy.leader import read_leader
from streams.history.history import History
from streams.history.retention import RetentionSettings, compact, subsample
from tests.deploy.conftest import Cli
from tests.support.finished import ROUNDS, Finished, leader_hash, lines
from trainers.checkpoint import list_checkpoints
from trainers.journal.fork_log import Branches, Fork, oldest_checkpoint, read_branches


@pytest.fixture
def run(finished: Finished, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(finished.run, tmp_path / "run")


def losses(folder: Path) -> list[dict[str, object]]:
    return [line["learners"] for line in lines(folder / "rounds.jsonl")]


@pytest.mark.parametrize("at", [0, 5, 7, ROUNDS])
def test_a_fork_without_a_changed_setting_learns_the_same_bits(cli: Cli, run: Path, at: int) -> None:
    ended = cli("fork", run, "--at", at, "--name", "same", "--wait")
    assert ended.code == 0, ended.err
    assert ended.out.endswith(f"same: {ROUNDS} rounds are learned\n")
    fork = run / "forks" / "same"
    assert leader_hash(fork) == leader_hash(run)
    assert losses(fork) == losses(run)
    mine, parents = (read_leader(folder / "leader.safetensors") for folder in (fork, run))
    assert (mine.round, mine.learner) == (parents.round, parents.learner)
    assert all(torch.equal(mine.state[name], value) for name, value in parents.state.items())
    assert not (fork / "history.db").exists(), "tasks are not copied"


def test_a_fork_plays_the_rounds_before_with_its_parents_settings(cli: Cli, run: Path) -> None:
    assert cli("fork", run, "--at", 7, "--set", "meta.lr=0.1", "--name", "faster", "--wait").code == 0
    fork = run / "forks" / "faster"
    assert losses(fork)[:8] == losses(run)[:8], "round 7 is scored before it is learned at the other rate"
    assert losses(fork)[8:] != losses(run)[8:]
    (fork_event,) = read_branches(run).forks.values()
    assert (fork_event.at, fork_event.parent, fork_event.changes) == (7, "main", ("meta.lr=0.1",))
    assert [(one.first, one.settings["meta"]["lr"]) for one in fork_event.stages] == [(0, 0.001), (7, 0.1)]


def test_a_fork_begins_at_the_newest_checkpoint_before_its_round(cli: Cli, run: Path) -> None:
    assert list_checkpoints(run / "checkpoints") == [5, 10, 12]
    assert cli("fork", run, "--at", 11).code == 0
    assert list_checkpoints(run / "forks/fork-1/checkpoints") == [10]
    assert [line["round"] for line in lines(run / "forks/fork-1/rounds.jsonl")] == list(range(10))
    assert cli("fork", run, "--at", 4).code == 0
    assert not (run / "forks/fork-2/checkpoints").exists()


def test_a_fork_of_another_model_plays_from_round_0(cli: Cli, run: Path) -> None:
    change = ("--set", "model.args.hidden=[4]", "--set", "run.seed=3")
    ended = cli("fork", run, "--at", 5, *change)
    assert ended.code == 78
    assert "--at 5: this cannot change at a round of a run: model.args; run.seed." in ended.err.replace("\n", " ")
    assert "Play the whole history with the new settings: --at 0" in ended.err
    assert not [*(run / "forks").glob("*")], "nothing is left of it"
    assert cli("fork", run, "--at", 0, *change, "--wait").code == 0
    assert len(lines(run / "forks/fork-1/rounds.jsonl")) == ROUNDS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("inner.rule=meta_sgd", "the state of 'ftml', which has other tensors with these settings"),
        ("meta.optimizer=sgd", "the optimizer of 'ftml', whose state another one cannot read"),
        ('regret.baselines=["train_on_everything"]', "the learner 'train_on_everything', which plays from the first"),
        ("inner.answer_steps=[0]", "the experts of the pool, which weighs them by all their losses"),
        ("inner.answer_steps=[3]", "the experts of the pool, which weighs them by all their losses"),
        ("pool.aggregation=squint", "pool.aggregation"),
    ],
)
def test_what_learners_cannot_continue_with_is_refused_at_a_round(
    cli: Cli, run: Path, change: str, message: str
) -> None:
    ended = cli("fork", run, "--at", 5, "--set", change)
    assert (ended.code, message in ended.err.replace("\n", " ")) == (78, True), ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "inner.lrr=0.1"], "[inner] has no key 'lrr'"),
        (["--set", "inner.lr=-1"], "[inner] lr"),
        (["--set", "inner.rule=sgdd"], "sgdd"),
        (["--set", "serve.port=1"], "a fork changes how the run learns"),
        (["--set", "inner"], "write it as section.key=value"),
        (["--at", "13"], "the run has 12 rounds"),
        (["--name", "main"], "the run has had a branch of this name already"),
        (["--name", ".x"], "it must be letters, digits"),
    ],
)
def test_a_wrong_fork_says_what_is_wrong(cli: Cli, run: Path, arguments: list[str], message: str) -> None:
    ended = cli("fork", run, *arguments)
    assert (ended.code, message in ended.err.replace("\n", " ")) == (78, True), ended.err
    assert not read_branches(run).forks
    none = cli("fork", run.parent)
    assert (none.code, "is not the folder of a run" in none.err) == (78, True)


def test_a_fork_of_removed_rounds_is_refused_and_later_ones_are_retained_for_it(cli: Cli, run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "5")
    with History.open(run / "history", write=True) as history:
        subsample(history, RetentionSettings(rounds=3))
        assert oldest_checkpoint(run) == 10
        assert compact(history, oldest_checkpoint(run), 4) == 0, "the decision is newer than the oldest checkpoint"
        assert cli("fork", run, "--at", 11, "--name", "late").code == 0
        shutil.rmtree(run / "checkpoints" / "10")
        assert oldest_checkpoint(run) == 10, "the fork has to play rounds that the run does not need any more"
        shutil.rmtree(run / "forks")
        assert compact(history, oldest_checkpoint(run), 4) > 0
    ended = cli("fork", run, "--at", 5)
    assert ended.code == 78
    assert "retention has removed" in ended.err
    assert "the earliest fork is at round 12: --at 12" in ended.err.replace("\n", " ")


@pytest.mark.parametrize("point", ["_copy_checkpoint", "sync_path", "log_fork"])
def test_a_fork_that_is_killed_on_the_way_leaves_no_fork(
    cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """The points are functions of ``deploy.forks``: before the folder appears, and before its event is logged."""

    class KilledError(BaseException):
        pass

    def kill(*_: object) -> None:
        raise KilledError

    monkeypatch.setattr(forks, point, kill)
    with pytest.raises(KilledError):
        forks.create_fork(run, 5, ["meta.lr=0.1"], "half")
    monkeypatch.undo()
    assert not read_branches(run).forks
    assert cli("fork", run, "--at", 5, "--name", "half").code == 0
    assert [entry.name for entry in (run / "forks").iterdir()] == ["half"]


def test_a_dropped_fork_is_removed_and_does_not_hold_rounds(cli: Cli, run: Path) -> None:
    assert cli("fork", run, "--at", 5, "--name", "a").code == 0
    assert oldest_checkpoint(run) == 5
    shutil.rmtree(run / "checkpoints" / "5")
    assert cli("fork", run, "--drop", "b").code == 78
    assert cli("fork", run, "--drop", "a").out == "a is dropped\n"
    assert not (run / "forks" / "a").exists()
    assert oldest_checkpoint(run) == 10
    branches = read_branches(run)
    assert (branches.list_names(), [*branches.dropped]) == (["main"], ["a"])
    assert cli("fork", run, "--at", 5, "--name", "a").code == 78, "events of two forks would have one name"


def test_branches_part_at_the_first_round_with_settings_of_their_own() -> None:
    parents = {"a": ("main", 5), "b": ("main", 8), "c": ("a", 7), "d": ("a", 3)}
    branches = Branches({name: Fork(name, parent, at, (), (), 0.0) for name, (parent, at) in parents.items()})
    expected = {("main", "a"): 5, ("a", "c"): 7, ("main", "c"): 5, ("b", "c"): 5, ("a", "d"): 3, ("main", "d"): 3}
    for (one, other), first in expected.items():
        assert branches.find_parting(one, other) == branches.find_parting(other, one) == first
    assert branches.find_parting("a", "a") == 0
