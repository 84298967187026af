"""The metric table as a Prometheus registry, fed from the run's files and the daemon."""

from collections.abc import Callable, Mapping
from math import nan
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

import online_meta
from deploy.efficiency import make_mean
from deploy.view import SKIPPED_STEPS, STEPS, RunView
from online_meta.metrics import METRICS, Metric
from trainers.json_lines import Line
from trainers.round_lines import list_steps

PREFIX = "online_meta_"
INITIALLY_UNKNOWN = (
    "checkpoint_last_success_timestamp_seconds",
    "comparator_cumulative_loss",
    "meta_gradient_norm",
    "task_accuracy",
)
Instruments = dict[str, Any]


def make_instruments(registry: CollectorRegistry) -> Instruments:
    """Make every metric of the table in ``registry``; return them by name without the prefix.

    A gauge that has no value yet is NaN, which is how Prometheus says "unknown"; 0 would be a claim.
    """
    instruments = {metric.name.removeprefix(PREFIX): _make(metric, registry) for metric in METRICS}
    for name in INITIALLY_UNKNOWN:
        instruments[name].set(nan)
    return instruments


def _make(metric: Metric, registry: CollectorRegistry) -> Any:
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.help, metric.labels, registry=registry, buckets=metric.buckets)
    kind = Counter if metric.kind == "counter" else Gauge
    return kind(metric.name, metric.help, metric.labels, registry=registry)


def set_constant_gauges(instruments: Instruments, engine: str) -> None:
    """Set what does not change while the daemon runs."""
    instruments["info"].labels(version=online_meta.__version__, torch=torch.__version__, engine=engine).set(1)
    for reason in ("not_finite",):
        instruments["skipped_steps_total"].labels(reason=reason)


def count_existing(instruments: Instruments, view: RunView) -> None:
    """Count what was summed before anybody followed the run; how long those rounds took is not known any more."""
    instruments["rounds_total"].inc(view.learned())
    instruments["meta_steps_total"].inc(view.total(STEPS))
    instruments["skipped_steps_total"].labels(reason="not_finite").inc(view.total(SKIPPED_STEPS))


def count_round(instruments: Instruments, line: Line) -> None:
    """Count a new round."""
    instruments["rounds_total"].inc()
    instruments["round_duration_seconds"].observe(line["seconds"])
    steps = list_steps(line)
    instruments["meta_steps_total"].inc(len(steps))
    for step in steps:
        if step["skipped"]:
            instruments["skipped_steps_total"].labels(reason=step["skipped"]).inc()
        elif step["norm"] is not None:
            instruments["meta_gradient_norm"].set(step["norm"])


def count_checkpoint(instruments: Instruments, line: Line) -> None:
    """Count a new checkpoint."""
    instruments["checkpoint_duration_seconds"].observe(line["seconds"])
    instruments["checkpoint_last_success_timestamp_seconds"].set(line["timestamp"])


def count_ranks(instruments: Instruments, restarts: int, done: Mapping[int, Mapping[str, float]]) -> None:
    """Count ``restarts``, and by rank what has been ``done``, since the last time."""
    instruments["restarts_total"].inc(restarts)
    for rank, amounts in done.items():
        for name, amount in amounts.items():
            instruments[f"rank_{name}_total"].labels(rank=rank).inc(amount)


def set_gauges(instruments: Instruments, view: RunView, pending: int, oldest: Callable[[], float | None]) -> None:
    """Set the gauges to what the run's files say now."""
    instruments["rounds_pending"].set(pending)
    instruments["oldest_pending_task_age_seconds"].set(oldest() or 0.0)
    line = view.last
    if line is not None and not line["skipped"]:
        instruments["task_loss"].labels(stage="before").set(line["loss_before"])
        instruments["task_loss"].labels(stage="after").set(line["loss_after"])
        if line["accuracy"] is not None:
            instruments["task_accuracy"].set(line["accuracy"])
    for name in view.ledger.learners:
        instruments["cumulative_loss"].labels(learner=name).set(view.ledger.cumulative_loss(name))
    set_efficiency_gauges(instruments, view)
    for against, regret in view.ledger.regret().items():
        instruments["regret"].labels(against=against).set(regret.value)
        instruments["regret_per_round"].labels(against=against).set(regret.value / regret.as_of_round)
        instruments["regret_standard_error"].labels(against=against).set(regret.standard_error)
        instruments["regret_rounds"].labels(against=against).set(regret.as_of_round)
    for kind, at in view.refreshed.items():
        instruments["comparator_timestamp_seconds"].labels(comparator=kind).set(at)
    hindsight = view.ledger.comparator("hindsight")
    if hindsight is not None:
        instruments["comparator_cumulative_loss"].set(hindsight.cumulative_loss)


def set_efficiency_gauges(instruments: Instruments, view: RunView) -> None:
    """Set the gauges of the learning efficiency: of the prefixes and the proficiency that are configured, if any."""
    efficiency = view.efficiency
    if not efficiency.prefixes:
        return
    mean = make_mean(view.last_100(), nan)
    for name in efficiency.learners:
        means = efficiency.means(name, mean)
        for after in means["prefixes"]:
            instruments["prefix_loss"].labels(learner=name, points=after["points"]).set(after["loss"])
        if efficiency.proficiency is not None:
            instruments["points_needed"].labels(learner=name).set(means["mean_points_needed"])
            instruments["proficiency_reached_ratio"].labels(learner=name).set(means["reached"])
