"""The pool and the verdict: regret with its bound, weights, whether meta-learning pays, what each learner costs."""

from math import nan
from typing import get_args

from deploy.telemetry.metrics import Instruments, Metric, MetricState
from online_meta.regret.verdict import VerdictState

METRICS = (
    Metric(
        "online_meta_pool_regret",
        "gauge",
        "The pool's cumulative loss minus its best expert's, as its bound counts them.",
        starts_unknown=True,
    ),
    Metric("online_meta_pool_regret_bound", "gauge", "What that regret never exceeds.", starts_unknown=True),
    Metric(
        "online_meta_pool_unclipped_regret",
        "gauge",
        "The same difference of the losses as they are, where the aggregation clips them.",
        starts_unknown=True,
    ),
    Metric("online_meta_pool_weight", "gauge", "The expert's share of the pool's weight, last round.", ("expert",)),
    Metric("online_meta_learner_round_seconds", "gauge", "Scoring and learning a round, last 100.", ("learner",)),
    Metric("online_meta_verdict", "gauge", "1 if meta-learning pays, does_not or too_early; else 0.", ("state",)),
    Metric(
        "online_meta_verdict_gain",
        "gauge",
        "Mean loss of the best that does not learn across tasks minus the pool's.",
        starts_unknown=True,
    ),
)


def update(instruments: Instruments, state: MetricState) -> None:
    """Set the pool's figures of the last round that had any, and the verdict on all rounds."""
    verdict, last = state.view.verdict(), state.view.last or {}
    if last.get("pool"):
        instruments["pool_regret"].set(last["pool"]["regret"])
        instruments["pool_regret_bound"].set(last["pool"]["bound"])
        instruments["pool_unclipped_regret"].set(last["pool"]["unclipped_regret"])
        for expert, weight in last["pool"]["weights"].items():
            instruments["pool_weight"].labels(expert=expert).set(weight)
    for learner, seconds in verdict["seconds_per_round"].items():
        instruments["learner_round_seconds"].labels(learner=learner).set(seconds)
    for name in get_args(VerdictState):
        instruments["verdict"].labels(state=name).set(name == verdict["state"])
    instruments["verdict_gain"].set(nan if verdict["gain"] is None else verdict["gain"])
