"""The search for the largest model finds it, on a CPU with an artificial memory limit."""

import time

import torch

from tests.benchmarks import large_models
from tests.benchmarks.large_models import Trial, find_largest, measure, render

SMALL = large_models.Scale((8, 16, 24), 1, 2, 6, 1, 3)
CPU = torch.device("cpu")


def test_bisection_finds_the_largest_width_that_fits_from_any_guess(monkeypatch):
    scale = SMALL._replace(widths=range(1, 31))
    for most in (0, 1, 2, 17, 29, 30):
        for guess in (0, 11, 29):
            tried = []

            def trial(scale, way, width, device, most=most, tried=tried):
                tried.append(width)
                return Trial(width, width, width if width <= most else None, None)

            monkeypatch.setattr(large_models, "try_width", trial)
            found, done = find_largest(scale, "adjoint", CPU, time.monotonic() + 60, guess)
            assert done
            assert (found.width if found else 0) == most
            assert len(tried) == len(set(tried)) <= 12


def test_every_method_is_measured_and_rendered():
    found = measure(SMALL, CPU, 60)
    for way, row in found.items():
        assert row["width"] == 24, way
        assert row["estimate_error"] is None or abs(row["estimate_error"]) < 0.2
    same = large_models.compare(SMALL, 24, CPU)
    result = {
        "commit": "c",
        "device": "d",
        "torch": "t",
        "scale": SMALL._asdict(),
        "largest": found,
        "same_model": same,
    }
    assert render(result).count("rematerialised") == 4
