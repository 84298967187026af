"""Learning efficiency: losses after prefixes of the support set, and points to a proficiency."""

from math import nan

from deploy.telemetry.efficiency import make_mean
from deploy.telemetry.metrics import Instruments, Metric, MetricState

METRICS = (
    Metric("online_meta_prefix_loss", "gauge", "Loss after the first points, last 100 rounds.", ("learner", "points")),
    Metric("online_meta_points_needed", "gauge", "Points to the proficiency, where reached, last 100.", ("learner",)),
    Metric("online_meta_proficiency_reached_ratio", "gauge", "Share of the last 100 rounds, 0 to 1.", ("learner",)),
    Metric("online_meta_prefix_loss_rounds", "gauge", "Rounds that the prefix loss is over.", ("learner", "points")),
    Metric("online_meta_points_needed_rounds", "gauge", "Rounds that reached the proficiency, last 100.", ("learner",)),
    Metric("online_meta_proficiency_rounds", "gauge", "Rounds that the reached share is of.", ("learner",)),
)


def update(instruments: Instruments, state: MetricState) -> None:
    """Set the means over the last 100 rounds, if prefixes are configured."""
    view = state.view
    efficiency = view.efficiency
    if not efficiency.prefixes:
        return
    sums = view.last_100()
    mean = make_mean(sums, nan)
    for name in efficiency.learners:
        means = efficiency.means(name, mean, sums.__getitem__)
        for after in means["prefixes"]:
            instruments["prefix_loss"].labels(learner=name, points=after["points"]).set(after["loss"])
            instruments["prefix_loss_rounds"].labels(learner=name, points=after["points"]).set(after["rounds"])
        if efficiency.proficiency is not None:
            instruments["points_needed"].labels(learner=name).set(means["mean_points_needed"])
            instruments["proficiency_reached_ratio"].labels(learner=name).set(means["reached"])
            instruments["points_needed_rounds"].labels(learner=name).set(means["rounds_reached"])
            instruments["proficiency_rounds"].labels(learner=name).set(means["rounds"])
