"""Checkpoints."""

from deploy.telemetry.metrics import Instruments, Metric
from trainers.journal.jsonl import Line

CHECKPOINT_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 60.0)

METRICS = (
    Metric(
        "online_meta_checkpoint_last_success_timestamp_seconds",
        "gauge",
        "Unix time of the last checkpoint.",
        starts_unknown=True,
    ),
    Metric("online_meta_checkpoint_duration_seconds", "histogram", "Saving a checkpoint.", (), CHECKPOINT_SECONDS),
)


def count_checkpoint(instruments: Instruments, line: Line) -> None:
    """Count a new checkpoint."""
    instruments["checkpoint_duration_seconds"].observe(line["seconds"])
    instruments["checkpoint_last_success_timestamp_seconds"].set(line["timestamp"])
