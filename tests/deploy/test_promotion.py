"""A daemon plays forks in the background, and serves another branch without a pause."""

import contextlib
import json
import shutil
import statistics
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load

from deploy import promotion
from deploy.config.config import read_config
from deploy.exits import ConfigError
from deploy.forks import play_branch, stages_of
from deploy.leader import read_leader
from deploy.processes.branches import PairedLosses
from deploy.promotion import settle_branches, write_branches
from deploy.telemetry.facts import Facts, ProcessFacts
from deploy.telemetry.health import judge, list_failing
from online_meta.regret.differences import confidence_sequence
from streams.history.history import History
from tests.deploy.conftest import Cli
from tests.support.daemon import Daemon, encode, running_daemon, wait_for, write_request, write_sinusoid
from tests.support.finished import Finished, leader_hash, lines
from trainers.journal.fork_log import read_branches
from trainers.journal.run_files import RunFiles
from trainers.loop.stages import play_stages

TASKS = 12
MORE = 8


class Client(threading.Thread):
    """Adapts the same task again and again; ``answers`` are the statuses and bodies, ``ready`` those of /readyz."""

    def __init__(self, daemon: Daemon, body: bytes) -> None:
        super().__init__(daemon=True)
        self.daemon_url, self.body = daemon.url, body
        self.client = daemon.client
        self.answers: list[tuple[int, bytes]] = []
        self.ready: list[int] = []
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            answer = self.client.post("/v1/adapt", content=self.body)
            self.answers.append((answer.status_code, answer.content))
            self.ready.append(self.client.get("/readyz").status_code)

    def wait_for_more(self, count: int = 20) -> None:
        """Wait until there are ``count`` further answers."""
        wanted = len(self.answers) + count
        wait_for("further answers", lambda: len(self.answers) >= wanted)

    def distinct(self) -> list[bytes]:
        """Return the answers, without those that repeat the one before."""
        assert {status for status, _ in self.answers} == {200}
        assert {*self.ready} == {200}, "the daemon is ready all the time"
        found: list[bytes] = []
        for _, body in self.answers:
            if not found or found[-1] != body:
                found.append(body)
        return found


def branch(daemon: Daemon, name: str) -> dict[str, Any]:
    """Return what the daemon says of a branch."""
    found = daemon.client.get("/v1/forks").json()["forks"]
    return next((one for one in found if one["name"] == name), {"learned": 0, "alive": False})


def wait_until_played(daemon: Daemon, name: str, rounds: int) -> None:
    wait_for(f"{name} is played", lambda: branch(daemon, name)["learned"] >= rounds)


def evidence(daemon: Daemon, check: str) -> str:
    """Return the evidence of a check of the daemon's health."""
    found = daemon.client.get("/v1/health").json()["checks"]
    return next((one["evidence"] for one in found if one["name"] == check), "")


def command_of(process: psutil.Process) -> list[str]:
    """Return the command line of a process; [] if it has just ended."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def trainer_of(daemon: Daemon, name: str, role: str = "background") -> psutil.Process:
    """Return the trainer of a branch."""

    def find() -> psutil.Process | None:
        children = psutil.Process(daemon.process.pid).children()
        wanted = ["deploy.processes.trainer", *([name, role] if role else [name])]
        return next((one for one in children if all(word in command_of(one) for word in wanted)), None)

    found: psutil.Process = wait_for(f"the trainer of {name} runs", find)
    return found


def request_body(folder: Path) -> bytes:
    support, query = write_request(folder, 50)
    return encode({**load(support.read_bytes()), **load(query.read_bytes())})


def same_weights(daemon: Daemon, leader: Path) -> bool:
    served, published = load(daemon.client.get("/v1/weights").content), read_leader(leader).without_pool().state
    return served.keys() == published.keys() and all(torch.equal(served[name], published[name]) for name in served)


@pytest.mark.timeout(1200)
def test_a_daemon_plays_forks_and_serves_another_branch_without_a_pause(cli: Cli, tmp_path: Path) -> None:
    config, run = write_sinusoid(tmp_path), tmp_path / "run"
    body = request_body(tmp_path)
    with running_daemon(config, "regret.comparator=[]") as daemon:
        daemon.submit(*range(TASKS))
        daemon.wait_until_learned(TASKS)
        made = cli("fork", run, "--at", 7, "--set", "meta.lr=0.1", "--name", "faster", "--wait")
        assert (made.code, "12 rounds are learned" in made.out) == (0, True), made.err
        trainer = trainer_of(daemon, "faster")
        assert trainer.nice() > psutil.Process(daemon.process.pid).nice()
        trainer.kill()
        wait_for("it is restarted", lambda: branch(daemon, "faster")["restarts"] == 1)
        wait_for("it is compared", lambda: (branch(daemon, "faster")["against_served"] or {}).get("rounds") == 5)
        shown = cli("status", "--url", daemon.url)
        assert "fork faster" in shown.out
        assert f"{TASKS} of {TASKS} rounds" in shown.out

        client = Client(daemon, body)
        client.start()
        client.wait_for_more()
        promoted = cli("promote", run, "faster", "--url", daemon.url)
        assert (promoted.code, promoted.out) == (0, "faster is served from now on, after 12 rounds\n"), promoted.err
        trainer_of(daemon, "main")
        client.wait_for_more()
        client.stop.set()
        client.join(60)
        before, after = client.distinct()
        assert before != after, "the answer switches once"
        assert same_weights(daemon, run / "forks" / "faster" / "leader.safetensors")
        assert (run / "leader.safetensors").readlink() == Path("forks/faster/leader.safetensors")
        again = cli("promote", run, "faster", "--url", daemon.url)
        assert (again.code, "409" in again.err) == (78, True)
        assert daemon.status()["forks"]["served"] == "faster"
        assert daemon.drain() == 0
        assert "Traceback" not in daemon.log.read_text()


@pytest.mark.timeout(1200)
def test_branches_survive_a_kill_around_a_promotion_and_are_replayed_bit_for_bit(cli: Cli, tmp_path: Path) -> None:
    config, run = write_sinusoid(tmp_path), tmp_path / "run"
    fork, plain = run / "forks" / "faster", ("--set", "regret.comparator=[]")
    with running_daemon(config, "regret.comparator=[]") as daemon:
        daemon.submit(*range(TASKS))
        daemon.wait_until_learned(TASKS)
        assert cli("fork", run, "--at", 7, "--set", "meta.lr=0.1", "--name", "faster", "--wait").code == 0
        assert cli("promote", run, "faster", "--url", daemon.url).code == 0
        kill(daemon)  # The processes are those of the branches before.
    with running_daemon(config, "regret.comparator=[]") as daemon:
        assert branch(daemon, "faster")["served"], "a restart serves what was promoted"
        assert same_weights(daemon, fork / "leader.safetensors")
        daemon.submit(*range(TASKS, TASKS + MORE))
        daemon.wait_until_learned(TASKS + MORE)
        wait_until_played(daemon, "main", TASKS + MORE)
        assert not same_weights(daemon, run / "forks" / "main" / "leader.safetensors")
        assert cli("promote", run, "main").code == 0
        wait_for("the daemon follows", lambda: branch(daemon, "main")["served"])
        assert same_weights(daemon, run / "forks" / "main" / "leader.safetensors")
        kill(daemon)
    with running_daemon(config, "regret.comparator=[]") as daemon:
        assert branch(daemon, "main")["served"]
        for check in ("trainer", "fork:faster"):
            wait_for(f"{check} waits for tasks", lambda check=check: evidence(daemon, check) == "waiting")
        assert cli("fork", run, "--at", 12, "--name", "brief").code == 0
        wait_until_played(daemon, "brief", TASKS + MORE)
        assert cli("fork", run, "--drop", "brief").code == 0
        wait_for("its folder is removed", lambda: not (run / "forks" / "brief").exists())
        wait_for("it is forgotten", lambda: not branch(daemon, "brief")["alive"])
        assert daemon.drain() == 0
        assert "Traceback" not in daemon.log.read_text()
    assert [one.name for one in read_branches(run).promotions] == ["faster", "main"]
    assert cli("replay", config, "--out", tmp_path / "main", *plain).code == 0
    assert leader_hash(tmp_path / "main") == leader_hash(run)
    assert cli("replay", config, "--out", tmp_path / "fork", "--fork", "faster", *plain).code == 0
    assert leader_hash(tmp_path / "fork") == leader_hash(fork)


def kill(daemon: Daemon) -> None:
    daemon.process.kill()
    daemon.process.wait()


@pytest.fixture
def run(finished: Finished, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(finished.run, tmp_path / "run")


@pytest.fixture
def forked(cli: Cli, run: Path) -> Path:
    """A finished run with a fork that is played."""
    assert cli("fork", run, "--at", 7, "--set", "meta.lr=0.1", "--name", "faster", "--wait").code == 0
    return run


def published(run: Path) -> dict[str, torch.Tensor]:
    return read_leader(run / "leader.safetensors").without_pool().state


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_stopped_run_serves_another_branch_from_its_next_start_on(
    cli: Cli, forked: Path, finished: Finished, tmp_path: Path
) -> None:
    main, fork = published(forked), published(forked / "forks" / "faster")
    assert cli("promote", forked, "faster").code == 0
    assert is_equal(published(forked), fork), "the leader's file is that of the fork at once"
    assert cli("export", forked, tmp_path / "exported").code == 0
    assert is_equal(read_leader(tmp_path / "exported").state, fork)
    assert cli("promote", forked, "main").code == 0
    assert is_equal(published(forked), main)
    first, second = read_branches(forked).promotions
    assert (first.name, first.round, first.instead_of) == ("faster", 12, "main")
    assert (second.name, second.round, second.instead_of) == ("main", 12, "faster")


def test_a_promoted_run_starts_with_its_own_or_the_forks_configuration(
    cli: Cli, forked: Path, finished: Finished
) -> None:
    assert cli("promote", forked, "faster").code == 0
    path = f"run.path={json.dumps(str(forked))}"
    for change in ("meta.lr=0.001", "meta.lr=0.1", "checkpoint.keep=7"):
        config = read_config(finished.config, (path, change))
        settled = settle_branches(config, read_branches(forked))
        assert settled.config.meta.lr == 0.1
        assert {name: one.meta.lr for name, one in settled.settings.items()} == {"main": 0.001, "faster": 0.1}
        assert settled.config.checkpoint.keep == config.checkpoint.keep, "what may change is that of the configuration"
    with pytest.raises(ConfigError, match=r"meta.lr was 0.001 and is 0.5"):
        settle_branches(read_config(finished.config, (path, "meta.lr=0.5")), read_branches(forked))


def test_a_replay_plays_the_branch_that_is_served(cli: Cli, forked: Path, finished: Finished, tmp_path: Path) -> None:
    ask = ("replay", finished.config, "--history", forked / "history", "--set", "regret.comparator=[]")
    assert cli("promote", forked, "faster").code == 0
    assert cli(*ask, "--out", tmp_path / "served").code == 0
    assert leader_hash(tmp_path / "served") == leader_hash(forked / "forks" / "faster")
    assert cli(*ask, "--out", tmp_path / "main", "--fork", "main").code == 0
    assert leader_hash(tmp_path / "main") == leader_hash(forked)
    assert cli(*ask, "--out", tmp_path / "other", "--set", "meta.lr=0.5").code == 0
    losses = [[line["loss_after"] for line in lines(tmp_path / name / "rounds.jsonl")] for name in ("main", "other")]
    assert losses[0][0] == losses[1][0]
    assert losses[0][2] != losses[1][2], "another algorithm plays all rounds"
    wrong = cli(*ask, "--out", tmp_path / "none", "--fork", "slower")
    assert (wrong.code, "the run has no such branch" in wrong.err) == (78, True)


@pytest.mark.parametrize(
    ("point", "served"), [("log_promotion", "main"), ("link_leader", "faster"), ("replace_file", "faster")]
)
def test_a_promotion_that_is_killed_on_the_way_is_whole_or_absent(
    forked: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch, point: str, served: str
) -> None:
    """The points are functions of ``deploy.promotion``: before the event, after it, and while the link changes."""

    class KilledError(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise KilledError

    main, fork = published(forked), published(forked / "forks" / "faster")
    monkeypatch.setattr(promotion, point, kill)
    with pytest.raises(KilledError):
        promotion.promote_branch(forked, "faster")
    monkeypatch.undo()
    config = read_config(finished.config, (f"run.path={json.dumps(str(forked))}",))
    settled = settle_branches(config, read_branches(forked))
    write_branches(settled)  # as a start does
    assert read_branches(forked).served == served
    assert settled.config.meta.lr == {"main": 0.001, "faster": 0.1}[served]
    assert is_equal(published(forked), {"main": main, "faster": fork}[served])


def test_a_fork_whose_folder_is_lost_is_played_again_from_its_event(forked: Path, finished: Finished) -> None:
    fork = forked / "forks" / "faster"
    before = leader_hash(fork)
    shutil.rmtree(fork)
    config = read_config(finished.config, (f"run.path={json.dumps(str(forked))}",))
    write_branches(settle_branches(config, read_branches(forked)))
    assert play_branch(forked, "faster", lambda _, __: None) == 12
    assert leader_hash(fork) == before


def test_a_fork_that_is_not_ready_is_not_served(cli: Cli, run: Path) -> None:
    unknown = cli("promote", run, "fastr")
    assert (unknown.code, "has no branch 'fastr'" in unknown.err) == (78, True)
    assert cli("promote", run, "main").code == 78
    assert cli("fork", run, "--at", 3, "--set", "meta.lr=0.1", "--name", "late").code == 0
    ended = cli("promote", run, "late")
    assert (ended.code, "late has not published anything" in ended.err) == (75, True)
    with History.open(run / "history", write=False) as history:
        for rounds, message in ((2, "plays the rounds before its own"), (6, "late has learned 6 rounds and main 12")):
            stages = stages_of(run, read_branches(run), "late")
            play_stages(stages, RunFiles(run, "late"), history, rounds, lambda _: None)
            ended = cli("promote", run, "late")
            assert (ended.code, message in ended.err.replace("\n", " ")) == (75, True), ended.err
        play_stages(stages, RunFiles(run, "late"), history, 7, lambda _: None)
    assert cli("promote", run, "late").code == 0


def test_losses_are_paired_over_the_rounds_that_both_have_scored(tmp_path: Path) -> None:
    losses = {name: [(i * k % 7) / 7 for i in range(90)] for name, k in (("a", 3), ("b", 5))}
    for name, count in (("a", 80), ("b", 90)):
        (tmp_path / name).mkdir()
        records = [{"round": i, "learners": {"ftml": {"loss_after": losses[name][i]}}} for i in range(count)]
        records[30]["learners"] = {}  # quarantined
        records[40]["learners"] = {"ftml": {"loss_after": None, "charged": 3.0}}
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name / "rounds.jsonl").write_text(text + '{"round": 99')
    pair = PairedLosses((RunFiles(tmp_path / "a"), RunFiles(tmp_path / "b")), ("ftml", "ftml"), 10)
    pair.refresh()
    pair.refresh()
    rounds = [i for i in range(10, 80) if i not in (30, 40)]
    mine, others = ([*(losses[name][i] for i in rounds), 3.0] for name in "ab")
    found = pair.describe()
    assert (found["from"], found["rounds"]) == (10, 69)
    assert found["mean_loss"] == pytest.approx(statistics.fmean(mine))
    assert found["mean_loss_served"] == pytest.approx(statistics.fmean(others))
    assert found["mean_difference"] == pytest.approx(statistics.fmean(mine) - statistics.fmean(others))
    assert found["interval"] == confidence_sequence(pair.differences)


def test_a_dead_fork_is_a_warning_and_no_failure() -> None:
    dead = ProcessFacts(alive=False, reported=False, seconds=70, last_words="no space")
    checks = judge(Facts(forks=(("faster", dead), ("slower", ProcessFacts()))))
    levels = {check.name: check.level for check in checks}
    assert (levels["fork:faster"], levels["fork:slower"]) == ("warn", "ok")
    assert not list_failing(checks)
