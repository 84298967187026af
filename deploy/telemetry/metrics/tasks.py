"""Tasks: ingested, rejected, waiting."""

from deploy.telemetry.metrics import Instruments, Metric, MetricState

INGEST_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0, 5.0)

METRICS = (
    Metric("online_meta_tasks_ingested_total", "counter", "Tasks made durable.", ("source",)),
    Metric("online_meta_tasks_rejected_total", "counter", "Tasks refused.", ("source", "reason")),
    Metric("online_meta_source_lag", "gauge", "Entries at a source's broker that are not durable here.", ("source",)),
    Metric("online_meta_source_gaps_total", "counter", "Gaps in a broker's stream, deleted before read.", ("source",)),
    Metric("online_meta_source_lost_entries_total", "counter", "Entries in these gaps, where known.", ("source",)),
    Metric("online_meta_ingest_duration_seconds", "histogram", "From request to durable.", (), INGEST_SECONDS),
    Metric("online_meta_rounds_pending", "gauge", "Rounds that are durable and not yet learned."),
    Metric("online_meta_oldest_pending_task_age_seconds", "gauge", "Age of the oldest task not yet learned."),
    Metric("online_meta_history_bytes", "gauge", "Bytes of the task history on disk."),
)


def update(instruments: Instruments, state: MetricState) -> None:
    """Set the backlog and the size of the history."""
    instruments["rounds_pending"].set(state.pending)
    instruments["oldest_pending_task_age_seconds"].set(state.oldest_pending_age() or 0.0)
    instruments["history_bytes"].set(state.history_bytes)
