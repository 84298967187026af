"""Ranks: how many play, what each does, how often they were started again."""

from collections.abc import Mapping

from deploy.telemetry.metrics import Instruments, Metric, MetricState

METRICS = (
    Metric("online_meta_world_size", "gauge", "Ranks that play now; 0 while they are started again."),
    Metric("online_meta_restarts_total", "counter", "Restarts of the trainer or all its ranks since the daemon began."),
    Metric("online_meta_rank_steps_total", "counter", "Meta-steps that the rank took part in.", ("rank",)),
    Metric("online_meta_rank_step_seconds_total", "counter", "Scoring and learning, without waiting.", ("rank",)),
    Metric("online_meta_rank_waiting_seconds_total", "counter", "In collectives with the other ranks.", ("rank",)),
)


def count_ranks(instruments: Instruments, restarts: int, done: Mapping[int, Mapping[str, float]]) -> None:
    """Count ``restarts``, and for each rank the steps and seconds it has ``done``."""
    instruments["restarts_total"].inc(restarts)
    for rank, amounts in done.items():
        for name, amount in amounts.items():
            instruments[f"rank_{name}_total"].labels(rank=rank).inc(amount)


def update(instruments: Instruments, state: MetricState) -> None:
    """Set the number of ranks."""
    instruments["world_size"].set(state.world_size)
