"""What a drained run leaves: its report, its history, and its checkpoints."""

import json
import math
import shutil
import sqlite3
from pathlib import Path
from statistics import stdev

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from online_meta.regret.verdict import display_name
from streams.history.history import History
from streams.history.sealing import SealingSettings, seal_next
from tests.deploy.conftest import Cli
from tests.support.daemon import write_request
from tests.support.finished import ROUNDS, Finished, lines


def test_sigterm_drains(finished: Finished) -> None:
    assert finished.code == 0
    assert (finished.run / "checkpoints/LATEST").read_text().strip() == str(ROUNDS)
    played = lines(finished.run / "rounds.jsonl")
    assert [line["round"] for line in played] == list(range(ROUNDS))
    assert [line["id"] for line in played] == [f"sin-{t}" for t in range(ROUNDS)]
    promised = {"round", "id", "source", "loss_before", "loss_after", "accuracy", "replayed", "seconds"}
    assert all(promised <= line.keys() for line in played)


def test_the_report_agrees_with_the_rounds(finished: Finished) -> None:
    report = json.loads((finished.run / "report.json").read_text())
    played = lines(finished.run / "rounds.jsonl")
    assert (report["rounds"], report["skipped"], [*report["learners"]]) == (ROUNDS, 0, [*played[0]["learners"]])
    assert {"ftml", "from_scratch", "pool"} <= report["learners"].keys()
    sums = {}
    for name, totals in report["learners"].items():
        losses = [line["learners"][name]["loss_after"] for line in played]
        sums[name] = math.fsum(losses)
        assert totals["cumulative_loss"] == pytest.approx(sums[name], rel=1e-12)
        assert totals["mean_loss_last_100"] == pytest.approx(sums[name] / ROUNDS, rel=1e-12)
        assert totals["mean_accuracy_last_100"] is None
    comparator = lines(finished.run / "comparators.jsonl")[-1]
    assert comparator["as_of_round"] == ROUNDS
    regret = report["regret"]["hindsight"]
    assert regret["value"] == pytest.approx(sums["ftml"] - comparator["cumulative_loss"])
    assert regret["standard_error"] == comparator["standard_error"]
    assert (regret["as_of_round"], regret["rounds"], regret["kind"], regret["exact"]) == (
        ROUNDS,
        ROUNDS,
        "hindsight",
        False,
    )
    regret = report["regret"]["from_scratch"]
    differences = [
        line["learners"]["ftml"]["loss_after"] - line["learners"]["from_scratch"]["loss_after"] for line in played
    ]
    assert regret["value"] == pytest.approx(math.fsum(differences), rel=1e-9)
    assert regret["standard_error"] == pytest.approx(math.sqrt(ROUNDS) * stdev(differences), rel=1e-9)
    assert (regret["as_of_round"], regret["rounds"], regret["kind"]) == (ROUNDS, ROUNDS, "baseline")
    assert (regret["interval"], regret["verdict"]) == (None, "too early")
    assert (report["verdict"]["state"], report["verdict"]["reference"]) == ("too_early", "pool")
    weights = [line["pool"]["weights"]["ftml@1"] for line in played]
    assert report["verdict"]["weights"]["ftml@1"] == pytest.approx(math.fsum(weights) / ROUNDS, rel=1e-12)
    seconds = math.fsum(line["seconds_by_learner"]["ftml"] for line in played) / ROUNDS
    assert report["verdict"]["seconds_per_round"]["ftml"] == pytest.approx(seconds, rel=1e-12)
    assert report["leaks"] == {"duplicates": 0, "overlaps": 0, "rounds": 0}
    assert report["config"]["model"]["build"] == "trainers.models:mlp"
    assert report["versions"]["torch"] == torch.__version__


def test_the_report_as_html(finished: Finished) -> None:
    report = json.loads((finished.run / "report.json").read_text())
    page = (finished.run / "report.html").read_text()
    assert f"<strong>{report['verdict']['sentence']}</strong>" in page
    for name, totals in report["learners"].items():
        assert f"{display_name(name)}</td>" in page
        assert f"<td>{totals['cumulative_loss']:.2f}</td>" in page
    for regret in report["regret"].values():
        assert f"<td>{regret['value']:+.2f}</td>" in page
    assert 'src="regret.png"' in page
    assert (finished.run / "regret.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_verify_reads_every_round(cli: Cli, finished: Finished) -> None:
    ended = cli("verify", finished.run / "history")
    assert (ended.code, ended.out) == (0, f"{finished.run}/history: {ROUNDS} rounds, all intact and in order\n")
    found = json.loads(cli("verify", finished.run / "history", "--json").out)
    assert (found["clean"], found["rounds"], found["damaged"]) == (True, ROUNDS, [])


def damage(history: Path, round: int) -> None:
    """Flip one bit of a payload without going through SQLite."""
    with sqlite3.connect(history / "ledger.sqlite") as ledger:
        (payload,) = ledger.execute("SELECT payload FROM payloads WHERE round = ?", (round,)).fetchone()
        ledger.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ledger.close()
    whole = bytearray((history / "ledger.sqlite").read_bytes())
    at = whole.find(payload[-64:])
    assert at > 0, "the payload is not contiguous in the file"
    whole[at + 5] ^= 1
    (history / "ledger.sqlite").write_bytes(whole)


def test_verify_names_the_damaged_round(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    history = shutil.copytree(finished.run / "history", tmp_path / "history")
    damage(history, 7)
    ended = cli("verify", history)
    assert (ended.code, ended.out) == (70, f"{history}: {ROUNDS} rounds, DAMAGED\n  damaged: 7\n")
    ended = cli("verify", history, "--json")
    assert (ended.code, json.loads(ended.out)["damaged"], json.loads(ended.out)["clean"]) == (70, [7], False)
    ended = cli("replay", finished.config, "--history", history, "--out", tmp_path / "out")
    assert ended.code == 70
    assert "round 7 is not what was written" in ended.err


def test_verify_without_a_history(cli: Cli, tmp_path: Path) -> None:
    ended = cli("verify", tmp_path / "none")
    assert ended.code == 78
    assert f"{tmp_path}/none: there is no history here" in ended.err


def test_an_export_holds_the_daemons_weights(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    ended = cli("export", finished.run / "checkpoints" / str(ROUNDS), file)
    assert (ended.code, ended.out) == (0, f"{file}: the state of ftml after {ROUNDS} rounds\n")
    exported, served = load(file.read_bytes()), load(finished.weights)
    assert exported.keys() == served.keys()
    assert all(torch.equal(exported[name], served[name]) for name in served)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["round"] == str(ROUNDS)


def test_export_explains_unreadable_and_unwritable_files(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    checkpoints = finished.run / "checkpoints"
    for given, file, message in (
        (checkpoints, tmp_path / "x", f"{checkpoints} contains several checkpoints: choose one of {checkpoints}/5, "),
        (tmp_path / "none", tmp_path / "x", "none/manifest.json cannot be read"),
        (checkpoints / str(ROUNDS), tmp_path / "no/x", "no/x cannot be written: No such file or directory"),
    ):
        ended = cli("export", given, file)
        assert (ended.code, message in ended.err) == (78, True), ended.err
    copy = shutil.copytree(checkpoints / str(ROUNDS), tmp_path / "copy")
    whole = bytearray((copy / "ftml.0.safetensors").read_bytes())
    whole[-1] ^= 1
    (copy / "ftml.0.safetensors").write_bytes(whole)
    ended = cli("export", copy, tmp_path / "x")
    assert (ended.code, "ftml.0.safetensors is damaged" in ended.err) == (78, True)


def test_a_checkpoint_adapts_as_the_daemon_does(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    support, query = write_request(tmp_path, 50)
    checkpoint = finished.run / "checkpoints" / str(ROUNDS)
    ask = ("adapt", "--support", support, "--query", query, "--checkpoint", checkpoint)
    assert cli(*ask, "--out", tmp_path / "out").code == 0
    alone, served = load((tmp_path / "out").read_bytes()), load(finished.predicted)
    assert alone.keys() == served.keys()
    assert torch.equal(alone["predictions"], served["predictions"])
    plain, with_mean = cli(*ask).out.splitlines(), cli(*ask, "--part", "mean").out.splitlines()
    assert with_mean == [f"{line} {line}" for line in plain]
    refused = cli(*ask, "--level", "0.5")
    assert (refused.code, "have no quantiles: its loss does not say" in refused.err) == (78, True)
    refused = cli(*ask, "--samples", "3")
    assert (refused.code, "pool cannot answer with 3 samples" in refused.err) == (78, True)


def test_verify_repairs_what_has_a_second_copy(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    history = shutil.copytree(finished.run / "history", tmp_path / "history")
    with History.open(history, write=True) as opened:
        assert seal_next(opened, SealingSettings(segment_rounds=10)) is not None
    damage(history, 7)
    damage(history, 11)
    ended = cli("verify", history, "--repair")
    assert ended.code == 70
    assert ended.out.splitlines() == [
        "rounds whose copies in the ledger were damaged, now read from the archive: 7",
        f"{history}: {ROUNDS} rounds, DAMAGED",
        "  damaged: 11",
    ]
    with History.open(history, write=True) as running:
        ended = cli("verify", history, "--repair")
        assert ended.code == 75
        assert "already has a writer; stop it first" in ended.err
        assert len(running) == ROUNDS


def test_verify_rebuilds_a_lost_ledger(cli: Cli, finished: Finished, tmp_path: Path) -> None:
    history = shutil.copytree(finished.run / "history", tmp_path / "history")
    with History.open(history, write=True) as opened:
        assert seal_next(opened, SealingSettings(segment_rounds=ROUNDS)) is not None
    for file in history.glob("ledger.sqlite*"):
        file.unlink()
    ended = cli("verify", history)
    assert (ended.code, "there is no history here" in ended.err) == (78, True)
    ended = cli("verify", history, "--repair", "--json")
    assert (ended.code, json.loads(ended.out)["rebuilt"]) == (0, ROUNDS)
    ended = cli("replay", finished.config, "--history", history, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
