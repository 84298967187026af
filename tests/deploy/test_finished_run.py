"""A run that was drained: its report, its history, its checkpoints, and the same rounds again."""

import fcntl
import hashlib
import json
import math
import shutil
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from tests.daemon import encode, running_daemon, write_sinusoid
from tests.deploy.conftest import Cli
from tests.deploy.test_commands import write_request
from trainers.checkpoint import load_latest

ROUNDS = 12


class Finished(NamedTuple):
    """A drained run: its configuration, its folder, and the leader that the daemon gave at its end."""

    config: Path
    run: Path
    code: int
    predicted: bytes
    weights: bytes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Finished:
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "finished"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one test process makes it for all
        if not (folder / "code").exists():
            make_run(folder)
    answers = ((folder / name).read_bytes() for name in ("predicted", "weights"))
    return Finished(folder / "config.toml", folder / "run", int((folder / "code").read_text()), *answers)


def make_run(folder: Path) -> None:
    """Serve a run to its end; keep beside it what the daemon answered before it drained."""
    with running_daemon(write_sinusoid(folder)) as daemon:
        daemon.submit(*range(ROUNDS))
        daemon.wait_until_learned(ROUNDS)
        daemon.wait_until_compared(ROUNDS)
        support, query = write_request(folder, 50)
        body = {**load(support.read_bytes()), **load(query.read_bytes())}
        (folder / "predicted").write_bytes(daemon.client.post("/v1/adapt", content=encode(body)).content)
        (folder / "weights").write_bytes(daemon.client.get("/v1/weights").content)
        code = daemon.drain()
    assert "Traceback" not in daemon.log.read_text()
    (folder / "code").write_text(str(code))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def leader_hash(run: Path) -> str:
    """Return the SHA-256 of all that every learner is, in the newest checkpoint."""
    newest = load_latest(run / "checkpoints")
    assert newest is not None
    parts = [(learner, name, tensor) for learner, found in newest.learners.items() for name, tensor in found.items()]
    digest = hashlib.sha256(str(newest.rounds).encode())
    for learner, name, tensor in sorted(parts, key=lambda part: part[:2]):
        digest.update(f"{learner} {name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_sigterm_drains(finished: Finished) -> None:
    assert finished.code == 0
    assert (finished.run / "checkpoints/LATEST").read_text().strip() == str(ROUNDS)
    played = lines(finished.run / "rounds.jsonl")
    assert [line["round"] for line in played] == list(range(ROUNDS))
    assert [line["id"] for line in played] == [f"sin-{t}" for t in range(ROUNDS)]
    promised = {"round", "id", "source", "loss_before", "loss_after", "accuracy", "replayed", "seconds"}
    assert all(promised <= line.keys() for line in played)


def test_the_report_is_what_the_rounds_add_up_to(finished: Finished) -> None:
    report = json.loads((finished.run / "report.json").read_text())
    played = lines(finished.run / "rounds.jsonl")
    assert (report["rounds"], report["skipped"], list(report["learners"])) == (ROUNDS, 0, ["ftml", "from_scratch"])
    sums = {}
    for name, told in report["learners"].items():
        losses = [line["learners"][name]["loss_after"] for line in played]
        sums[name] = math.fsum(losses)
        assert told["cumulative_loss"] == pytest.approx(sums[name], rel=1e-12)
        assert told["mean_loss_last_100"] == pytest.approx(sums[name] / ROUNDS, rel=1e-12)
        assert told["mean_accuracy_last_100"] is None
    comparator = lines(finished.run / "comparators.jsonl")[-1]
    assert comparator["as_of_round"] == ROUNDS
    assert report["regret"]["hindsight"] == {
        "value": pytest.approx(sums["ftml"] - comparator["cumulative_loss"]),
        "standard_error": comparator["standard_error"],
        "as_of_round": ROUNDS,
        "kind": "hindsight",
    }
    ahead = pytest.approx(sums["ftml"] - sums["from_scratch"], rel=1e-9)
    baseline = {"value": ahead, "standard_error": 0.0, "as_of_round": ROUNDS, "kind": "baseline"}
    assert report["regret"]["from_scratch"] == baseline
    assert report["config"]["model"]["build"] == "trainers.models:mlp"
    assert report["versions"]["torch"] == torch.__version__


def test_the_report_for_people(finished: Finished) -> None:
    report = json.loads((finished.run / "report.json").read_text())
    page = (finished.run / "report.html").read_text()
    for name, told in report["learners"].items():
        assert f"<td>{'FTML' if name == 'ftml' else 'from scratch'}</td>" in page
        assert f"<td>{told['cumulative_loss']:.2f}</td>" in page
    for regret in report["regret"].values():
        assert f"<td>{regret['value']:+.2f}</td>" in page
    assert 'src="regret.png"' in page
    assert (finished.run / "regret.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_verify_reads_every_round(cli: Cli, finished: Finished) -> None:
    ended = cli("verify", finished.run / "history")
    assert (ended.code, ended.out) == (0, f"{finished.run}/history: {ROUNDS} rounds, all whole and in order\n")
    found = json.loads(cli("verify", finished.run / "history", "--json").out)
    assert (found["clean"], found["rounds"], found["damaged"]) == (True, ROUNDS, [])


def damage(history: Path, round: int) -> None:
    """Flip one bit of a payload behind SQLite's back."""
    with sqlite3.connect(history / "ledger.sqlite") as ledger:
        (payload,) = ledger.execute("SELECT payload FROM payloads WHERE round = ?", (round,)).fetchone()
        ledger.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ledger.close()
    whole = bytearray((history / "ledger.sqlite").read_bytes())
    at = whole.find(payload[-64:])
    assert at > 0, "the payload is not there in one piece"
    whole[at + 5] ^= 1
    (history / "ledger.sqlite").write_bytes(whole)


def test_verify_names_the_round_that_is_damaged(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    history = shutil.copytree(finished.run / "history", tmp_path / "history")
    damage(history, 7)
    ended = cli("verify", history)
    assert (ended.code, ended.out) == (70, f"{history}: {ROUNDS} rounds, DAMAGED\n  damaged: 7\n")
    ended = cli("verify", history, "--json")
    assert (ended.code, json.loads(ended.out)["damaged"], json.loads(ended.out)["clean"]) == (70, [7], False)
    ended = cli("replay", finished.config, "--history", history, "--out", tmp_path / "out")
    assert ended.code == 70
    assert "round 7 is not what was written" in ended.err


def test_verify_of_nothing(cli: Cli, tmp_path: Path) -> None:
    ended = cli("verify", tmp_path / "none")
    assert ended.code == 78
    assert f"{tmp_path}/none: there is no history here" in ended.err


def test_an_export_holds_the_weights_that_the_daemon_gave(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    ended = cli("export", finished.run / "checkpoints" / str(ROUNDS), file)
    assert (ended.code, ended.out) == (0, f"{file}: the meta-parameters after {ROUNDS} rounds\n")
    exported, served = load(file.read_bytes()), load(finished.weights)
    assert exported.keys() == served.keys()
    assert all(torch.equal(exported[name], served[name]) for name in served)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["round"] == str(ROUNDS)


def test_export_explains_what_it_cannot_read_or_write(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    checkpoints = finished.run / "checkpoints"
    for given, file, told in (
        (checkpoints, tmp_path / "x", f"{checkpoints} holds several checkpoints: give one of {checkpoints}/5, "),
        (tmp_path / "none", tmp_path / "x", "none/manifest.json cannot be read"),
        (checkpoints / str(ROUNDS), tmp_path / "no/x", "no/x cannot be written: No such file or directory"),
    ):
        ended = cli("export", given, file)
        assert (ended.code, told in ended.err) == (78, True), ended.err
    copy = shutil.copytree(checkpoints / str(ROUNDS), tmp_path / "copy")
    whole = bytearray((copy / "ftml.safetensors").read_bytes())
    whole[-1] ^= 1
    (copy / "ftml.safetensors").write_bytes(whole)
    ended = cli("export", copy, tmp_path / "x")
    assert (ended.code, "ftml.safetensors is damaged" in ended.err) == (78, True)


def test_a_checkpoint_adapts_as_the_daemon_does(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    support, query = write_request(tmp_path, 50)
    checkpoint = finished.run / "checkpoints" / str(ROUNDS)
    ask = ("adapt", "--support", support, "--query", query, "--checkpoint", checkpoint)
    assert cli(*ask, "--out", tmp_path / "out").code == 0
    alone, served = load((tmp_path / "out").read_bytes()), load(finished.predicted)
    assert alone.keys() == served.keys()
    assert torch.equal(alone["predictions"], served["predictions"])


def test_a_replay_comes_to_the_same_bits(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    history = ("--history", finished.run / "history")
    ended = cli("replay", finished.config, *history, "--out", tmp_path / "again", "--json")
    assert (ended.code, ended.out.count("\n")) == (0, 1)
    report = json.loads(ended.out)
    assert leader_hash(tmp_path / "again") == leader_hash(finished.run)
    served, again = lines(finished.run / "rounds.jsonl"), lines(tmp_path / "again/rounds.jsonl")
    assert [line["learners"] for line in again] == [line["learners"] for line in served]
    told = json.loads((finished.run / "report.json").read_text())
    assert report["learners"] == told["learners"]
    assert report == json.loads((tmp_path / "again/report.json").read_text())


def test_a_replay_in_two_parts_is_the_same(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    ask = ("replay", finished.config, "--history", finished.run / "history", "--out", tmp_path)
    assert cli(*ask, "--rounds", "7", "--set", "regret.comparator=[]").code == 0
    assert len(lines(tmp_path / "rounds.jsonl")) == 7
    ended = cli(*ask)
    assert ended.code == 0
    assert f"{ROUNDS} rounds of the same stream" in ended.out
    assert f"see {tmp_path}/report.html" in ended.out
    assert leader_hash(tmp_path) == leader_hash(finished.run)


def test_a_replay_by_another_algorithm(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    ask = ("replay", finished.config, "--history", finished.run / "history", "--out", tmp_path)
    assert cli(*ask, "--set", "meta.gradient=reptile").code == 0
    assert leader_hash(tmp_path) != leader_hash(finished.run)
    first, other = lines(finished.run / "rounds.jsonl"), lines(tmp_path / "rounds.jsonl")
    assert other[0]["learners"] == first[0]["learners"], "nothing is learned before the first score"
    assert other[-1]["loss_after"] != first[-1]["loss_after"]
    assert [line["learners"]["from_scratch"] for line in other] == [line["learners"]["from_scratch"] for line in first]
    ended = cli(*ask, "--set", "meta.gradient=first_order")
    assert ended.code == 78
    assert "meta.gradient was 'reptile' and is 'first_order'" in ended.err


def test_a_replay_of_more_than_there_is(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    ended = cli("replay", finished.config, "--rounds", ROUNDS + 1, "--out", tmp_path)
    assert ended.code == 75
    assert f"has {ROUNDS} rounds; {ROUNDS + 1} were asked for" in ended.err
    ended = cli("replay", finished.config, "--history", tmp_path / "none", "--out", tmp_path)
    assert (ended.code, "there is no history here" in ended.err) == (78, True)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("meta.lr=0.5", "meta.lr was 0.001 and is 0.5"),
        ("meta.gradient=reptile", "meta.gradient was 'exact' and is 'reptile'"),
        ("run.seed=9", "seed was 0 and is 9"),
        ("regret.baselines=[]", "regret.baselines was ['from_scratch'] and is []"),
        ("model.args.hidden=[9]", "model.args was"),
    ],
)
def test_serve_does_not_go_on_under_other_settings(
    cli: Cli, finished: Finished, tmp_path: Path, override: str, told: str
) -> None:
    run = shutil.copytree(finished.run, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.glob("*.*") if path.suffix != ".lock"}
    assert {"rounds.jsonl", "settings.json", "report.json"} <= {path.name for path in before}
    for _ in range(2):  # also before the first checkpoint
        ended = cli("serve", finished.config, "--set", f"run.path={run}", "--set", override)
        assert ended.code == 78
        assert told in ended.err
        assert "give the new run another run.path" in ended.err
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    assert {path: path.read_bytes() for path in before} == before


def test_serve_does_not_go_on_with_other_tasks(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    run = shutil.copytree(finished.run, tmp_path / "run")
    wider = ("task.x_shape=[2]", "model.args.inputs=2", f"run.path={run}")
    for command in ("serve", "check"):
        ended = cli(command, finished.config, *(part for one in wider for part in ("--set", one)))
        assert ended.code == 78
        assert f"[task] x_shape = (2,), but the tasks in {run}/history have (1,): set it back" in ended.err


def test_serve_does_not_go_on_from_damaged_checkpoints(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    run = shutil.copytree(finished.run, tmp_path / "run")
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    ended = cli("serve", finished.config, "--set", f"run.path={run}")
    assert ended.code == 78
    assert f"{run}/checkpoints/{ROUNDS}/manifest.json is damaged" in ended.err
