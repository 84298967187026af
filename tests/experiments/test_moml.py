"""The table of MOML's protocol, at a small size."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from online_meta.learners import MemoryReplayBuffer
from online_meta.learners.ftml import FollowTheMetaLeader
from trainers.build import build_context, build_learners

from tests.experiments.common.playing import play_stream
from tests.experiments.moml import __main__
from tests.experiments.moml.__main__ import CHOSEN, Entry, make_settings, make_tasks, run_entry
from tests.experiments.moml.page import plot, render
from tests.experiments.moml.tuning import SEED, list_candidates


@pytest.fixture(scope="module")
def digits():
    return __main__.load_digits()


@pytest.fixture(autouse=True)
def load_digits_once(digits, monkeypatch):
    monkeypatch.setattr(__main__, "load_digits", lambda: digits)


@pytest.fixture
def quick(monkeypatch):
    """Run without recording a program, which takes longer than a few rounds, and score all tasks twice."""
    usual = __main__.make_settings

    def settings(label, seed):
        made = usual(label, seed)
        return replace(
            made, model=replace(made.model, args={"hidden": [8]}), engine=replace(made.engine, batching="loop")
        )

    monkeypatch.setattr(__main__, "make_settings", settings)
    monkeypatch.setattr(__main__, "CHECKS", (2,))
    return settings


def make_row(label, seed, losses, long_term, buffer=0):
    asked = {"label": label, "rounds": len(losses), "seed": seed, "chosen": CHOSEN[label]._asdict()}
    checks = [{"rounds": count, "loss": loss, "accuracy": loss / 10} for count, loss in long_term]
    costs = {"state_bytes": 1_500_000, "past_bytes": buffer, "seconds": 8.0, "checking": 2.0}
    found = {"losses": losses, "accuracies": [0.5] * len(losses)}
    tuned = {"tuned": {**found, "losses": [loss / 2 for loss in losses]}} if label == "ftml" else {}
    return {"asked": asked, **found, **tuned, "long_term": checks, **costs}


@pytest.mark.parametrize("label", CHOSEN)
def test_each_learner_is_built_with_its_choice_and_only_replay_learners_store_tasks(label):
    settings, buffer = make_settings(label, 3), MemoryReplayBuffer()
    learner = build_learners(settings, build_context(settings, buffer))[label]
    [task] = make_tasks(3, 1)
    learner.score(task)
    learner.learn(task)
    remembers = label in {"ftml", "online_reptile", "ftl_fine_tune", "train_on_everything"}
    assert isinstance(learner, FollowTheMetaLeader) == remembers
    if remembers:
        assert buffer[0] is task
    else:
        with pytest.raises(IndexError):
            buffer[0]


def test_all_learners_have_nine_candidates_that_include_the_chosen_one():
    for label, chosen in CHOSEN.items():
        assert len(list_candidates(label)) == 9
        assert chosen in list_candidates(label)
    assert SEED not in range(3)


@pytest.mark.parametrize("label", CHOSEN)
def test_scoring_past_tasks_does_not_change_a_learner(label, quick, tmp_path):
    found = run_entry(Entry(label, 4, 0), tmp_path)
    tasks = make_tasks(0, 4)
    played = list(play_stream(quick(label, 0), label, tasks, tmp_path))
    assert found["losses"] == [round.score.loss_after for round in played]
    assert [check["rounds"] for check in found["long_term"]] == [2, 4]
    if label == "ftml":
        assert [len(values) for values in found["tuned"].values()] == [4, 4]
        assert found["tuned"]["losses"] != found["losses"]
    else:
        assert "tuned" not in found
    last = found["long_term"][-1]["loss"]
    if label == "from_scratch":
        assert last == pytest.approx(sum(found["losses"]) / 4)
        assert found["state_bytes"] == found["past_bytes"] == 0
        return
    learner = played[-1].learner
    assert last == pytest.approx(sum(learner.score(task).loss_after for task in tasks) / 4)
    assert last != pytest.approx(sum(found["losses"]) / 4)
    parameters = 4 * (784 * 8 + 8 + 8 * 10 + 10)
    vectors = {"moml": 5, "aruba": 7, "c_maml": 4}.get(
        label, 3
    )  # The weights, Adam's two moments, and the learner's own vectors; ARUBA's are float64.
    assert parameters * vectors <= found["state_bytes"] < parameters * vectors + 1000
    a_task = 70 * (28 * 28 + 8)
    assert found["past_bytes"] == (0 if label in {"moml", "aruba", "c_maml"} else 4 * a_task)


def test_a_finished_run_is_loaded(quick, tmp_path, monkeypatch):
    found = run_entry(Entry("aruba", 2, 0), tmp_path)
    monkeypatch.setattr(__main__, "make_tasks", None)
    assert run_entry(Entry("aruba", 2, 0), tmp_path) == found
    monkeypatch.setitem(__main__.CHOSEN, "aruba", CHOSEN["aruba"]._replace(outer=0.5))
    with pytest.raises(TypeError):
        run_entry(Entry("aruba", 2, 0), tmp_path)


def test_the_page_compares_with_ftml_seed_by_seed():
    rows = [make_row("ftml", seed, [4.0, 2.0, 1.0, 1.0 + seed], [(2, 1.5), (4, 1.0)], 9_000_000) for seed in range(2)]
    rows += [make_row("moml", seed, [4.0, 2.0, 2.0, 2.0 + seed], [(2, 2.5), (4, 1.25)]) for seed in range(2)]
    result = {"command": "c", "commit": "abc", "iterations": 4, "rows": rows}
    lines = [line for line in render(result).splitlines() if line.startswith(("| FTML", "| MOML", "| learner"))]
    even, half = "0.500 ± 0.000", "1.250 ± 0.250"
    assert lines[1:3] == [
        f"| FTML | 2 | 2.125 ± 0.125 | {even} |  | {half} | {even} |  |",
        f"| MOML | 2 | 2.625 ± 0.125 | {even} | +0.500 ± 0.000 | 2.250 ± 0.250 | {even} | +1.000 ± 0.000 |",
    ]
    tuned = lines.pop(3).removeprefix("| FTML's start, trained as from scratch | 2 | ")
    assert tuned == f"1.062 ± 0.062 | {even} | -1.062 ± 0.062 | 0.625 ± 0.125 | {even} | -0.625 ± 0.125 |"
    assert lines[3:6] == [
        "| learner | 2 tasks | 4 tasks | against FTML |",
        "| FTML | 1.500 ± 0.000; 0.150 ± 0.000 | 1.000 ± 0.000; 0.100 ± 0.000 |  |",
        "| MOML | 2.500 ± 0.000; 0.250 ± 0.000 | 1.250 ± 0.000; 0.125 ± 0.000 | +0.250 ± 0.000 |",
    ]
    assert lines[7].startswith("| FTML | 1.50 | 9.00 | 2.0000 ± 0.0000 | ")
    assert lines[8].startswith("| MOML | 1.50 | 0.00 | 2.0000 ± 0.0000 | ")
    assert "40 seconds of one core" in render(result)
    assert plot(rows).startswith(b"\x89PNG")
    render({**result, "rows": rows[2:]})


def test_the_command_writes_the_table(quick, tmp_path, monkeypatch):
    def run_here(jobs, run, asked, write):
        write([run(*arguments) for arguments in asked])

    monkeypatch.setattr(__main__, "run_rows", run_here)
    arguments = ["--rounds", "3", "--seeds", "2", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    done = CliRunner().invoke(__main__.main, [*arguments, "--only", "aruba", "--only", "ftml"])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "moml_protocol.json").read_text())
    assert result["command"].split()[:3] == ["python", "-m", "tests.experiments.moml"]
    assert [(row["asked"]["seed"], row["asked"]["label"]) for row in result["rows"]] == [
        (0, "ftml"),
        (0, "aruba"),
        (1, "ftml"),
        (1, "aruba"),
    ]
    assert (tmp_path / "moml_protocol.md").read_text() in done.output
    assert (tmp_path / "moml_protocol.png").exists()
