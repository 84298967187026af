"""Regret against baselines and comparators."""

from typing import get_args

from deploy.telemetry.metrics import Instruments, Metric, MetricState
from online_meta.regret.differences import Verdict
from online_meta.regret.ledger import Comparator

METRICS = (
    Metric(
        "online_meta_comparator_cumulative_loss",
        "gauge",
        "Hindsight estimate's loss, as of its own round.",
        starts_unknown=True,
    ),
    Metric("online_meta_comparator_timestamp_seconds", "gauge", "Unix time of the last refresh.", ("comparator",)),
    Metric("online_meta_regret", "gauge", "Cumulative loss minus the comparator's.", ("against",)),
    Metric("online_meta_regret_per_round", "gauge", "Regret divided by its rounds.", ("against",)),
    Metric("online_meta_regret_standard_error", "gauge", "Standard error of the regret.", ("against",)),
    Metric("online_meta_regret_rounds", "gauge", "The rounds that the regret is over.", ("against",)),
    Metric(
        "online_meta_regret_interval",
        "gauge",
        "Confidence sequence (95 %, at all times) of the regret against a baseline.",
        ("against", "end"),
    ),
    Metric(
        "online_meta_regret_verdict",
        "gauge",
        "1 for what the interval shows: ahead, behind, level or too early; else 0.",
        ("against", "verdict"),
    ),
    Metric("online_meta_comparator_settled", "gauge", "1 if an estimate had settled, else 0.", ("comparator",)),
    Metric(
        "online_meta_comparator_gradient_norm",
        "gauge",
        "Norm of the mean meta-gradient where an estimate ended.",
        ("comparator",),
    ),
)


def update(instruments: Instruments, state: MetricState) -> None:
    """Set the regret against everything that it is known against."""
    for against, regret in state.view.ledger.regret().items():
        instruments["regret"].labels(against=against).set(regret.value)
        instruments["regret_per_round"].labels(against=against).set(regret.value / max(regret.rounds, 1))
        instruments["regret_standard_error"].labels(against=against).set(regret.standard_error)
        instruments["regret_rounds"].labels(against=against).set(regret.rounds)
        if regret.interval is not None:
            for end, value in zip(("low", "high"), regret.interval, strict=True):
                instruments["regret_interval"].labels(against=against, end=end).set(value)
        for verdict in get_args(Verdict) if regret.verdict is not None else ():
            instruments["regret_verdict"].labels(against=against, verdict=verdict).set(verdict == regret.verdict)
        _update_comparator(instruments, state.view.ledger.comparator(against))
    for kind, at in state.view.refreshed.items():
        instruments["comparator_timestamp_seconds"].labels(comparator=kind).set(at)
    hindsight = state.view.ledger.comparator("hindsight")
    if hindsight is not None:
        instruments["comparator_cumulative_loss"].set(hindsight.cumulative_loss)


def _update_comparator(instruments: Instruments, comparator: Comparator | None) -> None:
    if comparator is None:
        return
    instruments["comparator_settled"].labels(comparator=comparator.kind).set(comparator.settled)
    if comparator.gradient_norm is not None:
        instruments["comparator_gradient_norm"].labels(comparator=comparator.kind).set(comparator.gradient_norm)
