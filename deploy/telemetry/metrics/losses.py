"""Losses of the last task and of the whole run."""

from deploy.telemetry.metrics import Instruments, Metric, MetricState

METRICS = (
    Metric("online_meta_task_loss", "gauge", "Query loss of the last task scored.", ("stage",)),
    Metric(
        "online_meta_task_accuracy",
        "gauge",
        "Query accuracy of the last task scored, after adaptation, 0 to 1.",
        starts_unknown=True,
    ),
    Metric("online_meta_cumulative_loss", "gauge", "Query loss after adaptation, summed over rounds.", ("learner",)),
)


def update(instruments: Instruments, state: MetricState) -> None:
    """Set the scores of the last task, and each learner's sum."""
    line = state.view.last
    if line is not None and not line["skipped"]:
        instruments["task_loss"].labels(stage="before").set(line["loss_before"])
        instruments["task_loss"].labels(stage="after").set(line["loss_after"])
        if line["accuracy"] is not None:
            instruments["task_accuracy"].set(line["accuracy"])
    for name in state.view.ledger.learners:
        instruments["cumulative_loss"].labels(learner=name).set(state.view.ledger.cumulative_loss(name))
