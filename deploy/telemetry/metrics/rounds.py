"""Rounds and their meta-steps."""

from typing import get_args

from deploy.telemetry.metrics import Instruments, Metric, MetricState
from deploy.telemetry.run_view import SKIPPED_STEPS, STEPS, RunView
from trainers.journal.jsonl import Line
from trainers.journal.quarantine import Quarantine, Reason
from trainers.journal.round_records import list_steps

ROUND_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

METRICS = (
    Metric("online_meta_rounds_total", "counter", "Rounds scored and learned."),
    Metric("online_meta_quarantined_rounds_total", "counter", "Rounds in quarantine.", ("reason",)),
    Metric("online_meta_skipped_rounds", "gauge", "Rounds that count for no learner."),
    Metric("online_meta_round_duration_seconds", "histogram", "Scoring and learning a round.", (), ROUND_SECONDS),
    Metric("online_meta_meta_steps_total", "counter", "Meta-steps made, skipped ones included."),
    Metric("online_meta_skipped_steps_total", "counter", "Meta-steps that changed nothing.", ("reason",)),
    Metric(
        "online_meta_meta_gradient_norm",
        "gauge",
        "Global norm of the last meta-gradient before clipping.",
        starts_unknown=True,
    ),
)


def start(instruments: Instruments, engine: str) -> None:
    """Make the series of each reason, at 0."""
    for reason in get_args(Reason):
        instruments["quarantined_rounds_total"].labels(reason=reason)
    for reason in ("not_finite",):
        instruments["skipped_steps_total"].labels(reason=reason)


def count_existing(instruments: Instruments, view: RunView) -> None:
    """Count the rounds that were learned before; how long they took is not known any more."""
    instruments["rounds_total"].inc(view.learned())
    instruments["meta_steps_total"].inc(view.total(STEPS))
    instruments["skipped_steps_total"].labels(reason="not_finite").inc(view.total(SKIPPED_STEPS))


def count_quarantine(instruments: Instruments, quarantine: Quarantine) -> None:
    """Count a quarantined round."""
    instruments["quarantined_rounds_total"].labels(reason=quarantine.reason).inc()


def count_round(instruments: Instruments, line: Line) -> None:
    """Count a new round and its meta-steps."""
    instruments["rounds_total"].inc()
    instruments["round_duration_seconds"].observe(line["seconds"])
    steps = list_steps(line)
    instruments["meta_steps_total"].inc(len(steps))
    for step in steps:
        if step["skipped"]:
            instruments["skipped_steps_total"].labels(reason=step["skipped"]).inc()
        elif step["norm"] is not None:
            instruments["meta_gradient_norm"].set(step["norm"])


def update(instruments: Instruments, state: MetricState) -> None:
    """Set the number of skipped rounds."""
    instruments["skipped_rounds"].set(state.view.skipped + state.view.quarantined)
