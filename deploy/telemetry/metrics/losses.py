"""Losses of the last task and of the whole run."""

from math import nan

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
    Metric("online_meta_scored_rounds", "gauge", "Rounds in which the learner has a loss.", ("learner",)),
    Metric("online_meta_charged_rounds", "gauge", "Of these, rounds whose loss was not finite.", ("learner",)),
    Metric("online_meta_mean_loss", "gauge", "Query loss after adaptation, mean of the last 100 rounds.", ("learner",)),
    Metric("online_meta_mean_loss_rounds", "gauge", "Rounds that the mean loss is over.", ("learner",)),
    Metric("online_meta_leaked_rounds", "gauge", "Rounds whose query set may have been seen before.", ("kind",)),
)


def update(instruments: Instruments, state: MetricState) -> None:
    """Set the scores of the last task, and each learner's sum."""
    view, line = state.view, state.view.last
    if line is not None and not line["skipped"]:
        for stage in ("before", "after"):
            loss = line[f"loss_{stage}"]
            instruments["task_loss"].labels(stage=stage).set(nan if loss is None else loss)
        if line["accuracy"] is not None:
            instruments["task_accuracy"].set(line["accuracy"])
    for name, learner in view.learners().items():
        mean = learner["mean_loss_last_100"]
        instruments["cumulative_loss"].labels(learner=name).set(learner["cumulative_loss"])
        instruments["scored_rounds"].labels(learner=name).set(learner["rounds"])
        instruments["charged_rounds"].labels(learner=name).set(learner["charged_rounds"])
        instruments["mean_loss"].labels(learner=name).set(nan if mean is None else mean)
        instruments["mean_loss_rounds"].labels(learner=name).set(learner["rounds_last_100"])
    leaks = view.leaks()
    for kind in ("duplicates", "overlaps"):
        instruments["leaked_rounds"].labels(kind=kind).set(leaks[kind])
