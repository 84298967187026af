"""Curves of a run, thinned to as many points as a chart can show."""

from array import array
from itertools import pairwise
from typing import Any

from deploy.view import RunView


def regret_series(view: RunView, start: int, end: int | None, points: int) -> dict[str, Any]:
    """Return the ledger of the rounds ``start`` .. ``end`` - 1 in at most ``points`` buckets.

    Losses and accuracies are means over a bucket (null where nothing is known), cumulative losses those at
    its end; ``rounds`` holds the last round of each bucket.
    """
    total = view.learned()
    last = total if end is None else min(end, total)
    start = min(max(start, 0), last)
    count = min(points, last - start)
    edges = [start + (last - start) * k // count for k in range(count + 1)] if count else [start]
    spans = list(pairwise(edges))
    return {
        "from": start,
        "to": last,
        "rounds": [high - 1 for _, high in spans],
        "loss_before": _means(view.before, spans),
        "loss_after": _means(view.after, spans),
        "accuracy": _means(next(iter(view.accuracy.values())), spans),
        "learners": {
            name: {
                "loss": [(_upto(view, name, high) - _upto(view, name, low)) / (high - low) for low, high in spans],
                "accuracy": _means(view.accuracy[name], spans),
                "cumulative_loss": [_upto(view, name, high) for _, high in spans],
            }
            for name in view.ledger.learners
        },
        "comparators": [
            {**comparator._asdict(), "regret": view.ledger.regret_against(comparator).value}
            for comparator in view.comparators
            if start < comparator.as_of_round <= last
        ],
        "regret": view.regret(),
    }


def _upto(view: RunView, learner: str, rounds: int) -> float:
    return view.ledger.cumulative_loss(learner, rounds)


def _means(values: "array[float]", spans: list[tuple[int, int]]) -> list[float | None]:
    means: list[float | None] = []
    for low, high in spans:
        known = [value for value in values[low:high] if value == value]
        means.append(sum(known) / len(known) if known else None)
    return means
