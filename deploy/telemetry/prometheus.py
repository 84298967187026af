"""The metric table as a Prometheus registry, fed from the run's files and the daemon."""

from collections.abc import Callable, Mapping
from math import nan
from typing import Any, Literal, NamedTuple

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

import online_meta
from deploy.telemetry.efficiency import make_mean
from deploy.telemetry.run_view import SKIPPED_STEPS, STEPS, RunView
from trainers.journal.jsonl import Line
from trainers.journal.round_records import list_steps


class Metric(NamedTuple):
    """A Prometheus metric: full ``name``, ``kind``, ``help`` text, ``labels``, ``buckets`` of a histogram."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


ROUND_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


INGEST_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0, 5.0)


CHECKPOINT_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 60.0)


METRICS: tuple[Metric, ...] = (
    Metric("online_meta_tasks_ingested_total", "counter", "Tasks made durable.", ("source",)),
    Metric("online_meta_tasks_rejected_total", "counter", "Tasks refused.", ("source", "reason")),
    Metric("online_meta_source_lag", "gauge", "Entries at a source's broker that are not durable here.", ("source",)),
    Metric("online_meta_rounds_total", "counter", "Rounds scored and learned."),
    Metric("online_meta_rounds_pending", "gauge", "Rounds that are durable and not yet learned."),
    Metric("online_meta_round_duration_seconds", "histogram", "Scoring and learning a round.", (), ROUND_SECONDS),
    Metric("online_meta_meta_steps_total", "counter", "Meta-steps made, skipped ones included."),
    Metric("online_meta_skipped_steps_total", "counter", "Meta-steps that changed nothing.", ("reason",)),
    Metric("online_meta_meta_gradient_norm", "gauge", "Global norm of the last meta-gradient before clipping."),
    Metric("online_meta_task_loss", "gauge", "Query loss of the last task scored.", ("stage",)),
    Metric("online_meta_task_accuracy", "gauge", "Query accuracy of the last task scored, after adaptation, 0 to 1."),
    Metric("online_meta_cumulative_loss", "gauge", "Query loss after adaptation, summed over rounds.", ("learner",)),
    Metric("online_meta_prefix_loss", "gauge", "Loss after so many points, last 100 rounds.", ("learner", "points")),
    Metric("online_meta_points_needed", "gauge", "Points to the proficiency, where reached, last 100.", ("learner",)),
    Metric("online_meta_proficiency_reached_ratio", "gauge", "Share of the last 100 rounds, 0 to 1.", ("learner",)),
    Metric("online_meta_comparator_cumulative_loss", "gauge", "Hindsight estimate's loss, as of its own round."),
    Metric("online_meta_regret", "gauge", "Cumulative loss minus the comparator's.", ("against",)),
    Metric("online_meta_regret_per_round", "gauge", "Regret divided by its rounds.", ("against",)),
    Metric("online_meta_regret_standard_error", "gauge", "Of the regret, where rounds were sampled.", ("against",)),
    Metric("online_meta_regret_rounds", "gauge", "The rounds that the regret is over.", ("against",)),
    Metric("online_meta_comparator_timestamp_seconds", "gauge", "Unix time of the last refresh.", ("comparator",)),
    Metric("online_meta_ingest_duration_seconds", "histogram", "From request to durable.", (), INGEST_SECONDS),
    Metric("online_meta_oldest_pending_task_age_seconds", "gauge", "Age of the oldest task not yet learned."),
    Metric("online_meta_history_bytes", "gauge", "Bytes of the task history on disk."),
    Metric("online_meta_checkpoint_last_success_timestamp_seconds", "gauge", "Unix time of the last checkpoint."),
    Metric("online_meta_checkpoint_duration_seconds", "histogram", "Saving a checkpoint.", (), CHECKPOINT_SECONDS),
    Metric("online_meta_world_size", "gauge", "Ranks that play now; 0 while they are started again."),
    Metric("online_meta_restarts_total", "counter", "Restarts of the trainer or all its ranks since the daemon began."),
    Metric("online_meta_rank_steps_total", "counter", "Meta-steps that the rank took part in.", ("rank",)),
    Metric("online_meta_rank_step_seconds_total", "counter", "Scoring and learning, without waiting.", ("rank",)),
    Metric("online_meta_rank_waiting_seconds_total", "counter", "In collectives with the other ranks.", ("rank",)),
    Metric("online_meta_info", "gauge", "Always 1; what runs, in its labels.", ("version", "torch", "engine")),
)


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
