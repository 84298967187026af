"""Aggregate the curves of a run into a limited number of points, for charts."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.telemetry.pool import POOL_BOUND, POOL_REGRET, POOLED_ROUNDS, UNCLIPPED_REGRET, weight_column
from deploy.telemetry.run_view import (
    LOSS_BEFORE,
    QUARANTINED,
    ROUNDS_BEFORE,
    SKIPPED,
    RunView,
    accuracy_column,
    accuracy_count_column,
)
from online_meta.regret.ledger import charged_column, difference_columns, rounds_column
from online_meta.regret.running_sums import RunningSum
from trainers.comparators import describe_comparator


def regret_series(view: RunView, start: int, end: int | None, points: int) -> dict[str, Any]:
    """Return the regret ledger of the rounds ``start`` .. ``end`` - 1, in buckets of rounds.

    Args:
        view: of the run.
        start: first round.
        end: one past the last round; None for all rounds.
        points: maximum number of buckets.

    Returns:
        The answer of ``/v1/regret``. Losses and accuracies are means over a bucket (None where no round counts);
        ``rounds`` of a learner are those that count in it. Cumulative losses, and the ``regret`` of the ``leader``
        against a baseline, are those at its end. ``rounds`` has the last round of each bucket. If prefixes of the
        support set are scored, ``efficiency`` describes them, and the ``efficiency`` of each learner has one value per
        bucket.
    """
    total = view.learned()
    last = total if end is None else min(end, total)
    start = min(max(start, 0), last)
    count = min(points, last - start)
    edges = [start + (last - start) * k // count for k in range(count + 1)] if count else [start]
    sums = dict(zip(view.sums.columns, view.sums.windows(edges).T, strict=True))
    learners = {
        name: {
            "loss": _means(sums[name], sums[rounds_column(name)]),
            "rounds": _counts(sums[rounds_column(name)]),
            "charged_rounds": _counts(sums[charged_column(name)]),
            "accuracy": _means(sums[accuracy_column(name)], sums[accuracy_count_column(name)]),
            "accuracy_rounds": _counts(sums[accuracy_count_column(name)]),
            "cumulative_loss": _accumulate(view.ledger.cumulative_loss(name, start), sums[name]),
            **_regret(view, name, start, sums),
            **_efficiency(view, name, sums),
            **_calibration(view, name, sums),
        }
        for name in view.ledger.learners
    }
    return {
        "from": start,
        "to": last,
        "rounds": [edge - 1 for edge in edges[1:]],
        "skipped_rounds": _counts(sums[SKIPPED] + sums[QUARANTINED]),
        "loss_before": _means(sums[LOSS_BEFORE], sums[ROUNDS_BEFORE]),
        "loss_after": learners[view.ledger.leader]["loss"],
        "accuracy": learners[view.ledger.leader]["accuracy"],
        "leader": view.ledger.leader,
        "learners": learners,
        **view.efficiency.describe(),
        **_pool(view, edges, sums),
        "comparators": [
            {**comparator._asdict(), **describe_comparator(comparator, regret), "regret": regret.value}
            for comparator, regret in zip(view.comparators, view.comparator_regrets, strict=True)
            if start < comparator.as_of_round <= last
        ],
        "regret": view.regret(),
    }


def _regret(view: RunView, name: str, start: int, sums: dict[str, NDArray[np.float64]]) -> dict[str, list[float]]:
    """Return the leading learner's regret against a baseline at the end of each bucket."""
    if name == view.ledger.leader:
        return {}
    (_, difference, _), before = difference_columns(name), view.ledger.differences(name, start)
    return {"regret": _accumulate(before.total, sums[difference])}


def _pool(view: RunView, edges: list[int], sums: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
    """Return the pool's weights, means over each bucket, and its regret and bound at the end of each."""
    pool = view.pool
    if pool.pool is None:
        return {}
    ends = view.sums.rows([edge - 1 for edge in edges[1:]])
    last = dict(zip(view.sums.columns, ends.T.tolist(), strict=True))
    known = last[POOLED_ROUNDS]
    at_end = {
        key: [value if has else None for value, has in zip(last[column], known, strict=True)]
        for key, column in (("regret", POOL_REGRET), ("bound", POOL_BOUND), ("unclipped_regret", UNCLIPPED_REGRET))
    }
    weights = {name: _means(sums[weight_column(name)], sums[POOLED_ROUNDS]) for name in pool.experts()}
    return {"pool": {"name": pool.pool, **at_end, "weights": weights}}


def _efficiency(view: RunView, name: str, sums: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
    if not view.efficiency.prefixes:
        return {}
    means = view.efficiency.means(name, lambda what, of: _means(sums[what], sums[of]), lambda of: _counts(sums[of]))
    return {"efficiency": means}


def _calibration(view: RunView, name: str, sums: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
    """Return the coverage of each level, or of classes the calibration error, and the sharpness in each bucket."""
    if not view.calibration.bins:
        return {}
    curves = view.calibration.curves(name, sums)
    calibration: dict[str, Any] = {"error": _or_none(curves.error), "nll": _or_none(curves.nll)}
    if curves.coverage is not None:
        calibration["coverage"] = {f"{level:g}": _or_none(share) for level, share in curves.coverage.items()}
        calibration["sharpness"] = _or_none(curves.sharpness)
    return {"calibration": calibration}


def _or_none(values: NDArray[np.float64]) -> list[float | None]:
    """Return a list with None in the place of NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def _means(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> list[float | None]:
    """Return the mean in each bucket; None where nothing is counted."""
    return [total / count if count else None for total, count in zip(sums.tolist(), counts.tolist(), strict=True)]


def _counts(sums: NDArray[np.float64]) -> list[int]:
    return [int(count) for count in sums.tolist()]


def _accumulate(before: float, sums: NDArray[np.float64]) -> list[float]:
    """Return ``before`` plus the sums up to and with each bucket."""
    total, found = RunningSum(before), []
    for one in sums.tolist():
        total = total.plus(one)
        found.append(total.value())
    return found
