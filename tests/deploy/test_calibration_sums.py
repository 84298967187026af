"""Negative log-likelihood and calibration in reports: exact sums over a window of rounds."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deploy.telemetry.calibration import count_bins
from deploy.telemetry.run_view import RunView
from online_meta.outcomes import categorical, gaussian_of_noise, mse
from online_meta.prediction import point
from online_meta.regret.calibration import add, count_calibration, coverage, expected_calibration_error
from online_meta.types import Calibration, Outcome
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
        learners = {"ftml": {**plain, "nll": 0.25 * round, "calibration": counts}, "other": {**plain, "nll": None}}
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


def test_an_outcome_without_a_distribution_has_no_such_figures(tmp_path: Path) -> None:
    assert count_bins(mse.build()) == count_bins(None) == 0
    view = RunView(write_rounds(tmp_path, gaussian_of_noise.build(sigma=0.5)), NAMES)
    view.refresh()
    assert not [key for key in view.learners()["ftml"] if "nll" in key or "calibration" in key]
