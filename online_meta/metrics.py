"""The one table of metrics; exporters, dashboards and alerts are made from it or checked against it."""

from typing import Literal, NamedTuple


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
