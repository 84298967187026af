"""Negative log-likelihood and calibration in reports: exact sums over a window of rounds."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deploy.telemetry.calibration import count_bins
from deploy.telemetry.facts import Facts, WindowFacts
from deploy.telemetry.health import judge
from deploy.telemetry.monitor import find_calibration
from deploy.telemetry.run_view import RunView
from deploy.telemetry.series import regret_series
from online_meta.outcomes import categorical, gaussian_of_noise, mse
from online_meta.prediction import point
from online_meta.regret.calibration import add, count_calibration, coverage, expected_calibration_error
from online_meta.regret.scoring import TaskAnswers, score_answers
from online_meta.types import Batch, Calibration, Outcome, Score, Task
from trainers.journal.round_records import score_to_json
from trainers.journal.run_files import RunFiles

ROUNDS = 140
NAMES = ("ftml", "other")


def count(outcome: Outcome, round: int, size: int = 7) -> Calibration:
    random = torch.Generator().manual_seed(round)
    outputs: dict[int, tuple[Tensor, Tensor]] = {
        20: (torch.randn(size, generator=random), torch.randn(size, generator=random)),
        45: (torch.randn(size, 4, generator=random), torch.randint(0, 4, (size,), generator=random)),
    }
    output, y = outputs[count_bins(outcome)]
    found = count_calibration(point(outcome, output), y)
    assert found is not None
    return found


def write_rounds(folder: Path, outcome: Outcome) -> RunFiles:
    files = RunFiles(folder)
    lines = []
    for round in range(ROUNDS):
        plain = {"loss_before": 2.0, "loss_after": 1.0, "accuracy": None}
        counts = {key: value for key, value in count(outcome, round)._asdict().items() if value}
        own = {"nll": 0.25 * round, "sharpness": 1.0 * round, "calibration": counts}
        learners = {"ftml": {**plain, **own}, "other": {**plain, "nll": None}}
        lines.append({"round": round, "id": f"t{round}", "skipped": None, "learners": learners, "steps": [], **plain})
    files.rounds.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


@pytest.mark.parametrize("outcome", [gaussian_of_noise.build(sigma=0.5), categorical.build()], ids=["pit", "classes"])
def test_figures_of_the_last_100_rounds_equal_those_of_their_counts(tmp_path: Path, outcome: Outcome) -> None:
    view = RunView(write_rounds(tmp_path, outcome), NAMES, calibration_bins=count_bins(outcome))
    view.refresh()
    found = view.learners()["ftml"]
    last = add(*(count(outcome, round) for round in range(ROUNDS - 100, ROUNDS)))
    whole = add(*(count(outcome, round) for round in range(ROUNDS)))
    assert found["mean_nll_last_100"] == 0.25 * (ROUNDS - 100 + ROUNDS - 1) / 2
    assert found["nll_rounds_last_100"] == 100
    assert found["calibration_error_last_100"] == expected_calibration_error(last) != expected_calibration_error(whole)
    if last.pit:
        assert found["coverage_last_100"] == {f"{level}": coverage(last, level) for level in (0.5, 0.8, 0.9)}
    else:
        assert "coverage_last_100" not in found
    other = view.learners()["other"]
    assert (other["mean_nll_last_100"], other["calibration_error_last_100"]) == (None, None), "nothing was counted"


@pytest.mark.parametrize("outcome", [gaussian_of_noise.build(sigma=0.5), categorical.build()], ids=["pit", "classes"])
def test_the_curves_of_the_page_are_the_figures_of_each_bucket(tmp_path: Path, outcome: Outcome) -> None:
    view = RunView(write_rounds(tmp_path, outcome), NAMES, calibration_bins=count_bins(outcome))
    view.refresh()
    found = regret_series(view, 0, None, 10)["learners"]["ftml"]["calibration"]
    for bucket in range(10):
        counts = add(*(count(outcome, round) for round in range(14 * bucket, 14 * bucket + 14)))
        assert found["error"][bucket] == pytest.approx(expected_calibration_error(counts), rel=1e-12)
        assert found["nll"][bucket] == pytest.approx(0.25 * (14 * bucket + 6.5))
        if counts.pit:
            for level in (0.5, 0.8, 0.9):
                assert found["coverage"][f"{level}"][bucket] == pytest.approx(coverage(counts, level))
            assert found["sharpness"][bucket] == pytest.approx(14 * bucket + 6.5)
    assert ("coverage" in found) == (count_bins(outcome) == 20)
    nothing = regret_series(view, 0, None, 10)["learners"]["other"]["calibration"]
    assert set(nothing["error"]) == set(nothing["nll"]) == {None}


def score_with_spread(sigma: float, round: int) -> Score:
    """Return the score of answers that know the function and claim noise of ``sigma``; the noise is 0.3."""
    random = torch.Generator().manual_seed(round)
    output = torch.randn(10, 1, generator=random, dtype=torch.float64)
    y = output + 0.3 * torch.randn(10, 1, generator=random, dtype=torch.float64)
    prediction = {"": point(gaussian_of_noise.build(sigma=sigma), output)}
    task = Task(Batch(output, y), Batch(output, y))
    return score_answers(TaskAnswers(prediction, prediction), task)[""]


@pytest.mark.parametrize(("share", "level"), [(1.0, "ok"), (0.5, "warn"), (2.0, "warn")])
def test_a_learner_whose_spread_is_halved_is_caught(tmp_path: Path, share: float, level: str) -> None:
    files = RunFiles(tmp_path)
    plain = {"round": 0, "id": "t", "skipped": None, "steps": [], "loss_before": 2.0, "loss_after": 1.0}
    lines = []
    for round in range(100):
        played = score_to_json(score_with_spread(0.3 * share, round), 1e9)
        lines.append({**plain, "round": round, "learners": {"ftml": played}})
    files.rounds.write_text("".join(json.dumps(line) + "\n" for line in lines))
    view = RunView(files, ("ftml",), calibration_bins=20)
    view.refresh()
    facts = Facts(last=WindowFacts(**find_calibration(view, view.last_100())))
    assert facts.last.targets == 1000
    found = next(check for check in judge(facts) if check.name == "calibration")
    assert found.level == level, found.evidence
    assert view.learners()["ftml"]["sharpness_last_100"] == pytest.approx(0.3 * share)


def test_an_outcome_without_a_distribution_has_no_such_figures(tmp_path: Path) -> None:
    assert count_bins(mse.build()) == count_bins(None) == 0
    view = RunView(write_rounds(tmp_path, gaussian_of_noise.build(sigma=0.5)), NAMES)
    view.refresh()
    assert not [key for key in view.learners()["ftml"] if "nll" in key or "calibration" in key]
