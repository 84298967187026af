"""The search for the largest model finds the largest, on a CPU with a limit that is made up."""

import time

import torch

from tests.benchmarks import large_models
from tests.benchmarks.large_models import Trial, largest, measure, render

SMALL = large_models.Scale((8, 16, 24), 1, 2, 6, 1, 3)
CPU = torch.device("cpu")


def test_bisection_finds_the_last_that_fits_from_any_guess(monkeypatch):
    scale = SMALL._replace(widths=range(1, 31))
    for most in (0, 1, 2, 17, 29, 30):
        for guess in (0, 11, 29):
            tried = []

            def trial(scale, way, width, device, most=most, tried=tried):
                tried.append(width)
                return Trial(width, width, width if width <= most else None, None)

            monkeypatch.setattr(large_models, "try_width", trial)
            found, done = largest(scale, "adjoint", CPU, time.monotonic() + 60, guess)
            assert done
            assert (found.width if found else 0) == most
            assert len(tried) == len(set(tried)) <= 12


def test_each_way_is_measured_and_told():
    found = measure(SMALL, CPU, 60)
    for way, row in found.items():
        assert row["width"] == 24, way
        assert row["estimate_error"] is None or abs(row["estimate_error"]) < 0.2
    same = large_models.compare(SMALL, 24, CPU)
    told = {"commit": "c", "device": "d", "torch": "t", "scale": SMALL._asdict(), "largest": found, "same_model": same}
    assert render(told).count("rematerialised") == 4
