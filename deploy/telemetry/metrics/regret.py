"""Regret against baselines and comparators."""

from deploy.telemetry.metrics import Instruments, Metric, MetricState

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
    Metric("online_meta_regret_standard_error", "gauge", "Of the regret, where rounds were sampled.", ("against",)),
    Metric("online_meta_regret_rounds", "gauge", "The rounds that the regret is over.", ("against",)),
)


def update(instruments: Instruments, state: MetricState) -> None:
    """Set the regret against everything that it is known against."""
    for against, regret in state.view.ledger.regret().items():
        instruments["regret"].labels(against=against).set(regret.value)
        instruments["regret_per_round"].labels(against=against).set(regret.value / regret.as_of_round)
        instruments["regret_standard_error"].labels(against=against).set(regret.standard_error)
        instruments["regret_rounds"].labels(against=against).set(regret.as_of_round)
    for kind, at in state.view.refreshed.items():
        instruments["comparator_timestamp_seconds"].labels(comparator=kind).set(at)
    hindsight = state.view.ledger.comparator("hindsight")
    if hindsight is not None:
        instruments["comparator_cumulative_loss"].set(hindsight.cumulative_loss)
