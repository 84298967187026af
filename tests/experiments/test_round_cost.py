"""The table of the cost of a round: fast-forwarded runs, and the command at a small size."""

import json
from dataclasses import asdict

import pytest
import torch
from click.testing import CliRunner
from online_meta.regret.ledger import MAIN_LEARNER
from streams.history.history import History
from trainers.journal.run_files import RunFiles

from tests.experiments.round_cost import __main__
from tests.experiments.round_cost.fast_forward import fast_forward, play
from tests.experiments.round_cost.loss import compare
from tests.experiments.round_cost.page import compute_growth, render
from tests.support.runs import SETTINGS, changed, fill, lines, opened, task

REPLAY = {
    "uniform": {},
    "reservoir": {"size": 8},
    "prioritised": {"size": 8},
    "coreset": {"size": 5, "width": 4},
}


def read_replay_state(folder, history, settings):
    """Return the state of the leader's replay policy, and the round of the run."""
    with opened(folder, history, settings) as run:
        saved = run.learners[MAIN_LEARNER].save()
        return {name: value for name, value in saved.items() if name.startswith("replay.")}, run.round


@pytest.mark.parametrize("policy", REPLAY)
def test_a_fast_forwarded_run_has_the_replay_state_of_a_played_run_and_continues(tmp_path, policy):
    """The replay state has the same shapes, and the same rounds if they do not depend on measurements."""
    settings = changed(SETTINGS, meta={"replay": policy, "replay_options": REPLAY[policy]}, regret={"baselines": ()})
    with History.open(tmp_path / "history", write=True) as history:
        fill(history, [task(seed) for seed in range(18)])
        for name, way in (("played", play), ("walked", fast_forward)):
            play(settings, RunFiles(tmp_path / name), history, 6)
            way(settings, RunFiles(tmp_path / name), history, 16)
        (played, at), (walked, same) = (
            read_replay_state(tmp_path / way, history, settings) for way in ("played", "walked")
        )
        assert at == same == 16
        assert {name: value.shape for name, value in played.items()} == {n: v.shape for n, v in walked.items()}
        if policy != "coreset":
            assert all(torch.equal(value, walked[n]) for n, value in played.items() if n != "replay.priorities")
        play(settings, RunFiles(tmp_path / "walked"), history, 18)
        records = lines(tmp_path / "walked")
        assert [line["round"] for line in records] == list(range(18))
        assert [line["id"] for line in records[5:7] + records[15:17]] == ["t5", "walked-6", "walked-15", "t16"]


def test_the_command_writes_its_table_and_reuses_finished_parts(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    asked = ["--quick", "--only", "uniform", "--only", "all", "--work", str(work), "--out", str(out)]
    first = CliRunner().invoke(__main__.main, asked, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    found = json.loads((out / "cost.json").read_text())
    assert [row["asked"]["policy"] for row in found["costs"]] == ["uniform", "all"]
    assert [[at["round"] for at in row["times"]] for row in found["costs"]] == [[4, 8]] * 2
    assert all(seconds > 0 for row in found["costs"] for at in row["times"] for seconds in at["cpu"])
    assert all(at["anonymous"] < at["resident"] for row in found["costs"] for at in row["memory"])
    assert [row["asked"]["policy"] for row in found["losses"]] == ["all", "uniform"]
    assert (out / "cost.png").read_bytes().startswith(b"\x89PNG")
    CliRunner().invoke(__main__.main, [*asked, "--finished"], catch_exceptions=False)
    again = json.loads((out / "cost.json").read_text())
    assert (again["costs"], again["losses"]) == (found["costs"], found["losses"])
    other = CliRunner().invoke(__main__.main, ["--quick", "--finished", "--only", "recent", "--work", str(work)])
    assert other.exit_code == 1
    assert "nothing is finished" in other.output


def make_costs(policy, *ratios):
    """Return costs that grow by these ratios, on a machine that is half as fast in the second turn."""
    seconds = [{"round": 10**n, "cpu": [r, 2 * r, r], "wall": [r, 2 * r, r]} for n, r in enumerate(ratios, 2)]
    memory = [{"resident": 1e8 * r, "anonymous": 9e7 * r, "peak": 1e8 * r} for r in ratios]
    return {"asked": {"policy": policy}, "times": seconds, "memory": memory}


def make_loss(policy, seed, value):
    return {"asked": {"policy": policy, "seed": seed}, "cumulative_loss": value}


def render_page(costs=(), losses=()):
    scale = asdict(__main__.Scale())
    return render({"command": "c", "commit": "d", "wall_seconds": 60, "scale": scale, "costs": costs, "losses": losses})


def test_the_page_states_whether_costs_grow():
    assert compute_growth(make_costs("uniform", 1.0, 1.5)["times"], "cpu") == ([1.0, 1.5], [0.0, 0.0])
    text = render_page(
        [
            make_costs("uniform", 1.0, 0.96, 1.05, 1.0),
            make_costs("recent", 1.0, 0.94, 1.05, 1.0),
            make_costs("all", 1.0, 9.0),
        ]
    )
    assert text.count("yes: 1.09") == 2  # for time and for memory
    assert text.count("NO: 1.117") == 2  # 1.05 / 0.94, although each is within 10 % of the first
    assert text.count("grows 9-fold, as it should") == 2
    assert render_page([make_costs("all", 1.0, 1.01)]).count("NO GROWTH") == 2


def test_the_page_states_the_excess_loss_of_the_best_bounded_policy():
    losses = [
        make_loss("all", 0, 100.0),
        make_loss("all", 1, 200.0),
        make_loss("recent", 0, 110.0),
        make_loss("recent", 1, 210.0),
    ]
    losses += [make_loss("uniform", 0, 101.0), make_loss("uniform", 1, 202.0), make_loss("coreset", 7, 1.0)]
    (above,) = [one["above_all"] for one in compare(losses) if one["policy"] == "recent"]
    assert above["mean"] == pytest.approx(0.075)
    assert above["error"] == pytest.approx(0.025)
    assert "uniform, is within 2% of `all`: +1.00%" in render_page(losses=losses)
    assert "recent, is NOT within 2% of `all`: +7.50%" in render_page(losses=losses[:4])
