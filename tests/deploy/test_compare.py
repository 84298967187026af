"""Comparing configurations on one history: what a comparison says, and what it survives."""

import contextlib
import io
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import pytest

from deploy.cli import group
from deploy.commands.compare import Failure, Replay, describe_failures, name_configurations
from deploy.config.config import read_config
from deploy.processes import child
from deploy.reports.comparison import Entry, Pair, compare_entries, describe_pair, read_entries, tabulate
from streams.history.history import History
from tests.deploy.conftest import Cli
from tests.deploy.mistakes import COMPARE_MISTAKES
from tests.experiments.common.histories import make_history
from tests.support.daemon import SECTIONS, sinusoid_config, wait_for
from tests.support.finished import leader_hash, lines
from trainers.checkpoint import load_latest

ROUNDS = 52
SEEDS = (0, 1)


class Compared(NamedTuple):
    """A finished comparison of ``slow.toml`` and ``fast.toml`` in ``folder``, with all its files."""

    folder: Path
    comparison: dict[str, Any]

    @property
    def arguments(self) -> tuple[str | Path, ...]:
        return "compare", self.folder / "run", self.folder / "slow.toml", self.folder / "fast.toml", "--seeds", "2"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """The history of 52 sinusoids, played by two configurations with two seeds in two processes."""
    folder = tmp_path_factory.mktemp("compared")
    make_history(folder / "run/history", "sinusoid", 0, ROUNDS)
    History.open(folder / "empty", write=True).close()
    for name, lr in (("slow", 0.001), ("fast", 0.01)):
        sections = SECTIONS.replace("[meta]", f"[meta]\nlr = {lr}").replace("[inner]", "[inner]\nanswer_steps = 1")
        sections += '[engine]\nbatching = "loop"\n'  # A busy machine measures, and records a program, for seconds.
        (folder / f"{name}.toml").write_text(sinusoid_config(folder / "run", 8780, sections=sections))
    made = Compared(folder, {})
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert group.main([*map(str, made.arguments), "--json"], standalone_mode=False) == 0
    return made._replace(comparison=json.loads(printed.getvalue()))


def copy_replays(compared: Compared, folder: Path) -> Path:
    """Copy all replays of a comparison to another folder, so that a test can go on with them."""
    shutil.copytree(compared.folder / "run/compare", folder)
    return folder


def read_losses(compared: Compared, name: str, seed: int, learner: str = "pool") -> list[float]:
    (folder,) = (compared.folder / "run/compare/replays" / name).glob(f"{seed}-*")
    played = lines(folder / "rounds.jsonl")
    assert [line["round"] for line in played] == [*range(ROUNDS)]
    return [line["learners"][learner]["loss_after"] for line in played]


def find_interval(differences: list[float]) -> tuple[float, float]:
    """Return the interval of ``confidence_sequence`` by its formula, at 95 %, narrowest at 500 rounds."""
    n, alpha = len(differences), 0.05
    scale = n * (math.log(1 / alpha**2) + math.log(1 + math.log(1 / alpha**2))) / 500
    width = stdev(differences) * math.sqrt(2 * (scale + 1) / (n * scale) * math.log(math.sqrt(scale + 1) / alpha))
    return fmean(differences) - width, fmean(differences) + width


def test_the_differences_are_those_of_the_recorded_losses(compared: Compared) -> None:
    losses = {name: [read_losses(compared, name, seed) for seed in SEEDS] for name in ("slow", "fast")}
    by_seed = [
        [own - other for own, other in zip(*both, strict=True)]
        for both in zip(losses["fast"], losses["slow"], strict=True)
    ]
    differences = [fmean(of_round) for of_round in zip(*by_seed, strict=True)]
    (found,) = compared.comparison["differences"]
    assert (found["name"], found["against"], found["rounds"]) == ("fast", "slow", ROUNDS)
    assert found["mean"] == pytest.approx(fmean(differences), rel=1e-12)
    assert found["cumulative"] == pytest.approx(math.fsum(differences), rel=1e-12)
    assert found["interval"] == pytest.approx(find_interval(differences), rel=1e-9)
    assert found["seeds"] == pytest.approx({str(seed): fmean(by_seed[seed]) for seed in SEEDS}, rel=1e-12)
    assert found["spread"] == pytest.approx(stdev(map(fmean, by_seed)), rel=1e-12)
    assert found["mean"] < 0, "a hundredth is the better learning rate"
    assert found["verdict"] == ("ahead" if found["interval"][1] < 0 else "too early")


def test_every_learner_and_every_seed_is_in_the_json(compared: Compared) -> None:
    assert compared.comparison == json.loads((compared.folder / "run/compare/comparison.json").read_text())
    assert compared.comparison["rounds"] == ROUNDS
    assert compared.comparison["seeds"] == [*SEEDS]
    for name in ("slow", "fast"):
        found = compared.comparison["configurations"][name]
        assert found["answer"] == "pool"
        for learner in ("pool", "ftml", "ftml@1", "from_scratch"):
            losses = [read_losses(compared, name, seed, learner) for seed in SEEDS]
            figures = found["learners"][learner]
            assert figures["mean_loss"] == pytest.approx(fmean(map(fmean, losses)), rel=1e-12)
            assert figures["spread"] == pytest.approx(stdev(map(fmean, losses)), rel=1e-9)
            assert [one["cumulative_loss"] for one in figures["seeds"].values()] == [*map(math.fsum, losses)]
        assert {key: found[key] for key in found["learners"]["pool"]} == found["learners"]["pool"]
        between = [b - a for a, b in zip(*(read_losses(compared, name, seed) for seed in SEEDS), strict=True)]
        (seeds,) = found["seed_differences"]
        assert (seeds["name"], seeds["against"]) == (f"{name}, seed 1", f"{name}, seed 0")
        assert seeds["interval"] == pytest.approx(find_interval(between), rel=1e-9)


def test_the_answer_that_is_compared_is_that_of_the_configuration(cli: Cli, compared: Compared, tmp_path: Path) -> None:
    """What answers does not change what is learned, so no round is played again."""
    out = copy_replays(compared, tmp_path / "out")
    before = {file: file.read_bytes() for file in out.glob("replays/*/*/rounds.jsonl")}
    own = tmp_path / "slow.toml"
    own.write_text((compared.folder / "slow.toml").read_text() + 'answers = "ftml@1"\n')
    ask = ("compare", compared.folder / "run", own, compared.folder / "fast.toml", "--seeds", "1", "--out", out)
    ended = cli(*ask, "--json")
    assert (ended.code, ended.err) == (0, "")
    (found,) = json.loads(ended.out)["differences"]
    losses = [read_losses(compared, "fast", 0), read_losses(compared, "slow", 0, "ftml@1")]
    assert found["mean"] == pytest.approx(np.mean(np.subtract(*losses)), rel=1e-12)
    assert {file: file.read_bytes() for file in out.glob("replays/*/*/rounds.jsonl")} == before


def test_a_table_and_a_picture(cli: Cli, compared: Compared) -> None:
    ended = cli(*compared.arguments)
    assert ended.code == 0
    for part in ("slow", "fast", "pool", f"comparison: {compared.folder}/run/compare/comparison.md"):
        assert part in ended.out
    page = (compared.folder / "run/compare/comparison.md").read_text()
    (found,) = compared.comparison["differences"]
    interval = "{:+.4f} to {:+.4f}".format(*found["interval"])
    for row in (
        f"| fast | slow | {found['mean']:+.4f} | {interval} | {found['spread']:.4f} | {found['verdict']} |",
        f"{ROUNDS} rounds of `{compared.folder}/run/history`",
        "](comparison.png)",
    ):
        assert row in page
    assert (compared.folder / "run/compare/comparison.png").read_bytes().startswith(b"\x89PNG")


def test_finished_replays_are_not_played_again(cli: Cli, compared: Compared, tmp_path: Path) -> None:
    """Nor are they lost by a configuration that fails: the exit code says that something did."""
    out = copy_replays(compared, tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in out.glob("replays/*/*/*.*")}
    ended = cli(*compared.arguments, compared.folder / "no.toml", "--out", out, "--json")
    assert ended.code == 78
    assert ended.err == f"error: no, seeds 0, 1: {compared.folder}/no.toml cannot be read: No such file or directory\n"
    found = json.loads(ended.out)
    assert found["differences"] == compared.comparison["differences"]
    assert [(one["name"], one["seed"], one["code"]) for one in found["failures"]] == [("no", 0, 78), ("no", 1, 78)]
    assert {file: file.stat().st_mtime_ns for file in out.glob("replays/*/*/*.*")} == before


def test_of_one_configuration_the_seeds_are_compared(cli: Cli, compared: Compared, tmp_path: Path) -> None:
    out = copy_replays(compared, tmp_path / "out")
    slow = compared.folder / "slow.toml"
    ended = cli("compare", compared.folder / "run/history", slow, "--seeds", "2", "--out", out)
    assert (ended.code, ended.err) == (0, "")
    assert "slow, seed 1" in ended.out
    assert "| slow, seed 1 | slow, seed 0 |" in (out / "comparison.md").read_text()


def test_fewer_rounds_of_finished_replays(cli: Cli, compared: Compared, tmp_path: Path) -> None:
    out = copy_replays(compared, tmp_path / "out")
    ended = cli(*compared.arguments, "--rounds", "7", "--out", out, "--json")
    (found,) = json.loads(ended.out)["differences"]
    losses = [[read_losses(compared, name, seed)[:7] for seed in SEEDS] for name in ("fast", "slow")]
    assert found["mean"] == pytest.approx(np.mean(np.subtract(*losses)), rel=1e-12)
    assert (found["interval"], found["verdict"]) == (None, "too early")


def test_a_failing_or_changed_configuration_costs_the_others_nothing(
    cli: Cli, compared: Compared, tmp_path: Path
) -> None:
    out = copy_replays(compared, tmp_path / "out")
    slow = tmp_path / "slow.toml"
    slow.write_text((compared.folder / "slow.toml").read_text().replace("lr = 0.001", "lr = 0.003"))
    model = tmp_path / "model.toml"
    model.write_text((compared.folder / "slow.toml").read_text().replace("inputs = 1", "inputs = 3"))
    fast = compared.folder / "fast.toml"
    ask = ("compare", compared.folder / "run", model, slow, fast, "--seeds", "1", "--rounds", "9", "--out", out)
    ended = cli(*ask, "--json")
    assert ended.code == 78
    (earlier,) = compared.folder.glob("run/compare/replays/slow/0-*")
    warning, error = ended.err.splitlines()
    assert warning == (
        f"slow, seed 0: its settings are no longer those of the replay in {out}/replays/slow/{earlier.name}, which "
        "stays there; it is played again"
    )
    assert error.startswith(f"error: model, seed 0: {model}: [model] trainers.models:mlp with loss 'mse' does not")
    found = json.loads(ended.out)
    assert [*found["configurations"]] == ["slow", "fast"]
    assert found["differences"][0]["rounds"] == 9
    assert leader_hash(out / "replays/slow" / earlier.name) == leader_hash(earlier), "the earlier replay stays"


def test_another_history_in_the_same_folder_is_refused(cli: Cli, compared: Compared, tmp_path: Path) -> None:
    """Both number their tasks alike: only what is in them differs."""
    other = make_history(tmp_path / "history", "sinusoid", 1, ROUNDS)
    out = copy_replays(compared, tmp_path / "out")
    slow = compared.folder / "slow.toml"
    ended = cli("compare", other, slow, "--seeds", "1", "--out", out)
    assert ended.code == 78
    assert f"is a replay of another history than {other}: choose another --out" in ended.err


def test_a_second_comparison_in_the_same_folder_is_refused(
    cli: Cli, compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "LOCK_TIMEOUT_SECONDS", 0.1)
    with child.hold_lock(tmp_path / "compare.lock"):
        ended = cli(*compared.arguments, "--out", tmp_path)
    assert ended.code == 75
    assert f"another comparison writes to {tmp_path}: wait until it has ended, or choose another --out" in ended.err


@pytest.mark.parametrize("mistake", COMPARE_MISTAKES)
def test_a_mistake_is_explained(cli: Cli, compared: Compared, mistake: str, tmp_path: Path) -> None:
    arguments, code, message = COMPARE_MISTAKES[mistake]
    ended = cli("compare", *arguments.format(folder=compared.folder).split(), "--out", tmp_path)
    assert (ended.code, ended.out) == (code, "")
    assert message.format(folder=compared.folder) in ended.err


def test_a_killed_comparison_continues_to_the_same_bits(cli: Cli, compared: Compared, tmp_path: Path) -> None:
    """It was killed with one process at a time, and continues with two; the other one was not killed."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "online_meta", *map(str, compared.arguments), "--out", str(out)]
    process = subprocess.Popen([*command, "--jobs", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def count_lines() -> list[int]:
        return [len(file.read_bytes().splitlines()) for file in out.glob("replays/*/*/rounds.jsonl")]

    wait_for("the second replay has begun", lambda: process.poll() is not None or any(sorted(count_lines())[:-1]))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = {file: file.stat().st_mtime_ns for file in out.glob("replays/*/*/report.json")}
    assert 0 < len(finished) < 4
    ended = cli(*compared.arguments, "--out", out, "--json")
    assert (ended.code, ended.err) == (0, "")
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    folders = sorted(folder.relative_to(out) for folder in out.glob("replays/*/*"))
    assert len(folders) == 4
    for folder in folders:
        again, whole = out / folder, compared.folder / "run/compare" / folder
        assert leader_hash(again) == leader_hash(whole)
        assert [line["learners"] for line in lines(again / "rounds.jsonl")] == [
            line["learners"] for line in lines(whole / "rounds.jsonl")
        ]
    assert json.loads(ended.out)["differences"] == compared.comparison["differences"]


def test_a_killed_replay_fails_alone(cli: Cli, compared: Compared, tmp_path: Path) -> None:
    """Whatever ends the process of a replay, such as the kernel when the memory is full, the others are compared."""
    (tmp_path / "deadly.py").write_text("import os, signal\ndef mlp():\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    deadly = tmp_path / "deadly.toml"
    text = (compared.folder / "slow.toml").read_text().replace('build = "trainers.models:mlp"', 'build = "deadly:mlp"')
    deadly.write_text(text.replace("args = { inputs = 1, outputs = 1, hidden = [8] }", ""))
    out = copy_replays(compared, tmp_path / "out")
    fast = compared.folder / "fast.toml"
    ended = cli("compare", compared.folder / "run", deadly, fast, "--seeds", "1", "--out", out, "--json")
    assert ended.code == 70
    assert ended.err == (
        "error: deadly, seed 0: its process was killed by SIGKILL: was the memory full? Try fewer --jobs\n"
    )
    assert [*json.loads(ended.out)["configurations"]] == ["fast"]


def test_modules_next_to_two_configurations_may_have_one_name(cli: Cli, compared: Compared, tmp_path: Path) -> None:
    text = (compared.folder / "slow.toml").read_text()
    for name, width in (("a", 4), ("b", 16)):
        (tmp_path / name).mkdir()
        code = f"from trainers.models import mlp\n\ndef build():\n    return mlp(1, 1, ({width},))\n"
        (tmp_path / name / "own_model.py").write_text(code)
        own = text.replace('build = "trainers.models:mlp"', 'build = "own_model:build"')
        own = own.replace("args = { inputs = 1, outputs = 1, hidden = [8] }", "")
        (tmp_path / name / f"{name}.toml").write_text(own)
    files = [tmp_path / name / f"{name}.toml" for name in "ab"]
    ended = cli("compare", compared.folder / "run", *files, "--seeds", "1", "--rounds", "2", "--out", tmp_path / "out")
    assert (ended.code, ended.err) == (0, "")
    for name, width in (("a", 4), ("b", 16)):
        (folder,) = (tmp_path / "out/replays" / name).iterdir()
        newest = load_latest(folder / "checkpoints")
        assert newest is not None
        shapes = [tuple(value.shape) for value in newest.learners["ftml"].values()]
        assert (width, 1) in shapes


def test_configurations_of_one_name_get_numbers() -> None:
    files = [Path(text) for text in ("a/x.toml", "b/x.toml", "x-2.toml", "c/x.toml", "y.toml")]
    assert dict(zip(files, name_configurations(files), strict=True)) == dict(
        zip(files, ("x", "x-2", "x-2-2", "x-3", "y"), strict=True)
    )


def test_failures_that_are_alike_are_one_sentence() -> None:
    def fail(name: str, seed: int, message: str) -> Failure:
        return Failure(Replay(name, seed, Path("x"), (), Path("h"), 1, Path("o")), 70, message)

    failures = [fail("a", 0, "no"), fail("b", 0, "no"), fail("a", 1, "other"), fail("a", 2, "no")]
    assert describe_failures(failures) == ["a, seeds 0, 2: no", "b, seed 0: no", "a, seed 1: other"]


def write_rounds(folder: Path, losses: list[float | None], skipped: tuple[int, ...] = ()) -> Path:
    """Write the records of rounds with these losses; None is one that is not finite."""
    folder.mkdir(parents=True)
    text = ""
    for at, loss in enumerate(losses):
        scores = {} if at in skipped else {"ftml": {"loss_after": loss, "accuracy": None}}
        line = {"round": at, "skipped": "quarantined" if at in skipped else None, "learners": scores}
        text += json.dumps(line) + "\n"
    (folder / "rounds.jsonl").write_text(text)
    return folder


def test_rounds_that_do_not_count_and_losses_that_are_not_finite(compared: Compared, tmp_path: Path) -> None:
    """A configuration gains nothing by a loss that is not finite: the highest of the round is above the cap here."""
    config = read_config(compared.folder / "slow.toml", ("regret.loss_cap=10.0", "serve.answers=ftml"))
    a = write_rounds(tmp_path / "a", [1.0, None, None, 4.0, 5.0], skipped=(4,))
    b = write_rounds(tmp_path / "b", [2.0, 20.0, 3.0, 8.0, 6.0], skipped=(0,))
    entries = read_entries({"b": (config, {0: b}), "a": (config, {0: a})}, 5)
    losses = [entry.answers()[0] for entry in entries]
    assert np.array_equal(losses[1], [1.0, 20.0, 10.0, 4.0, math.nan], equal_nan=True)
    assert np.array_equal(losses[0], [math.nan, 20.0, 3.0, 8.0, 6.0], equal_nan=True)
    (found,) = compare_entries(entries)["differences"]
    assert (found["rounds"], found["mean"]) == (3, pytest.approx((0 + 7 - 4) / 3))


def test_a_history_in_which_no_round_counts(compared: Compared, tmp_path: Path) -> None:
    config = read_config(compared.folder / "slow.toml")
    folders = {seed: write_rounds(tmp_path / str(seed), [None, None], skipped=(0, 1)) for seed in SEEDS}
    entries = read_entries({"a": (config, folders)}, 2)
    comparison = {"rounds": 2, **compare_entries(entries)}
    assert comparison["configurations"]["a"]["mean_loss"] is None
    assert next(iter(tabulate(comparison))).columns == ("configuration", "answer", "seeds", "cumulative")


def test_pairs_have_the_seeds_that_both_have_played() -> None:
    def make(name: str, **losses: float) -> Entry:
        found = {int(seed[1:]): {"ftml": np.full(60, loss)} for seed, loss in losses.items()}
        return Entry(name, "ftml", 0.01, found, found, {})

    found = compare_entries([make("a", s0=1.0, s1=3.0), make("b", s1=2.5, s2=9.0), make("c", s2=8.0)])
    assert [(one["name"], one["against"], one["mean"]) for one in found["differences"]] == [
        ("b", "a", -0.5),
        ("c", "b", -1.0),
    ]


@pytest.mark.parametrize(("step", "verdict"), [(-0.5, "ahead"), (0.5, "behind"), (0.005, "behind"), (0.0, "level")])
def test_what_a_difference_shows(step: float, verdict: str) -> None:
    noise = np.tile([0.001, -0.001], 200)
    found = describe_pair(Pair("a", "b", {0: step + noise, 1: step - noise}, margin=0.01))
    assert (found["verdict"], found["mean"]) == (verdict, pytest.approx(step))
