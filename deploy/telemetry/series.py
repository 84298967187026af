"""Aggregate the curves of a run into a limited number of points, for charts."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.telemetry.run_view import LOSS_BEFORE, SKIPPED, RunView, accuracy_column, accuracy_count_column
from online_meta.regret.ledger import MAIN_LEARNER


def regret_series(view: RunView, start: int, end: int | None, points: int) -> dict[str, Any]:
    """Return the regret ledger of the rounds ``start`` .. ``end`` - 1, in buckets of rounds.

    Args:
        view: of the run.
        start: first round.
        end: one past the last round; None for all rounds.
        points: maximum number of buckets.

    Returns:
        The answer of ``/v1/regret``. Losses and accuracies are means over a bucket (None where unknown). Cumulative
        losses are those at its end. ``rounds`` has the last round of each bucket. If prefixes of the support set are
        scored, ``efficiency`` describes them, and the ``efficiency`` of each learner has one value per bucket.
    """
    total = view.learned()
    last = total if end is None else min(end, total)
    start = min(max(start, 0), last)
    count = min(points, last - start)
    edges = [start + (last - start) * k // count for k in range(count + 1)] if count else [start]
    sums = dict(zip(view.sums.columns, view.sums.read(edges).T, strict=True))
    rounds = np.diff(edges)
    scored = rounds - np.diff(sums[SKIPPED])
    learners = {
        name: {
            "loss": (np.diff(sums[name]) / rounds).tolist(),
            "accuracy": _means(sums[accuracy_column(name)], np.diff(sums[accuracy_count_column(name)])),
            "cumulative_loss": sums[name][1:].tolist(),
            **_efficiency(view, name, sums),
        }
        for name in view.ledger.learners
    }
    return {
        "from": start,
        "to": last,
        "rounds": [edge - 1 for edge in edges[1:]],
        "loss_before": _means(sums[LOSS_BEFORE], scored),
        "loss_after": _means(sums[MAIN_LEARNER], scored),
        "accuracy": learners[MAIN_LEARNER]["accuracy"],
        "learners": learners,
        **view.efficiency.describe(),
        "comparators": [
            {**comparator._asdict(), "regret": view.ledger.regret_against(comparator).value}
            for comparator in view.comparators
            if start < comparator.as_of_round <= last
        ],
        "regret": view.regret(),
    }


def _efficiency(view: RunView, name: str, sums: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
    if not view.efficiency.prefixes:
        return {}
    means = view.efficiency.means(name, lambda what, count: _means(sums[what], np.diff(sums[count])))
    return {"efficiency": means}


def _means(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> list[float | None]:
    """Return the mean in each bucket from running sums at its edges; None where nothing is counted."""
    return [total / count if count else None for total, count in zip(np.diff(sums).tolist(), counts, strict=True)]
