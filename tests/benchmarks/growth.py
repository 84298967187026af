"""Measure the growth of peak memory with the number of inner steps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from online_meta.memory import bytes_of
from tests.benchmarks.contestants import CONTESTANTS
from tests.benchmarks.works import transformer
from tests.numerics.meter import MemoryMeter

STEPS = (8, 16, 32, 64, 128)
MOST_PER_STEP, MOST_EXPONENT = 1.1, 0.6


def measure_growth(programs: Path, log: Callable[[str], None], steps: Sequence[int] = STEPS) -> dict[str, Any]:
    """Return the peaks of the transformer by number of steps, the growth per step, and the exponent."""
    weights = transformer(1).weights()
    peaks: dict[str, list[int]] = {"ours, loop": [], "ours, rematerialised": []}
    for contestant, found in peaks.items():
        for count in steps:
            log(f"{contestant}, K = {count}")
            work = transformer(count)
            call = CONTESTANTS[contestant](work, weights, [work.task(0)], programs)
            with MemoryMeter() as meter:
                call()
            found.append(meter.peak)
    per_step = float(np.polyfit(steps, peaks["ours, loop"], 1)[0]) / bytes_of(weights)
    return {
        "steps": [*steps],
        "parameters": bytes_of(weights),
        "peaks": peaks,
        "per_step": per_step,
        "exponent": fit_exponent(steps, peaks["ours, rematerialised"]),
        "goals": {"per_step": MOST_PER_STEP, "exponent": MOST_EXPONENT},
    }


def fit_exponent(steps: Sequence[int], peaks: Sequence[int]) -> float:
    """Return p of the least-squares fit peak = a + b K^p, where a is the graph of one step."""

    def misfit(power: float) -> float:
        design = np.stack([np.ones(len(steps)), np.asarray(steps, float) ** power], 1)
        found, *_ = np.linalg.lstsq(design, np.asarray(peaks, float), rcond=None)
        return float(np.square(design @ found - peaks).sum())

    return float(min(np.arange(0.05, 1.5, 0.01), key=misfit))
