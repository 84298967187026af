"""Learning efficiency: losses after prefixes of the support set, and points to a proficiency."""

from math import nan

from deploy.telemetry.efficiency import make_mean
from deploy.telemetry.metrics import Instruments, Metric, MetricState

METRICS = (
    Metric("online_meta_prefix_loss", "gauge", "Loss after the first points, last 100 rounds.", ("learner", "points")),
    Metric("online_meta_points_needed", "gauge", "Points to the proficiency, where reached, last 100.", ("learner",)),
    Metric("online_meta_proficiency_reached_ratio", "gauge", "Share of the last 100 rounds, 0 to 1.", ("learner",)),
)


def update(instruments: Instruments, state: MetricState) -> None:
    """Set the means over the last 100 rounds, if prefixes are configured."""
    view = state.view
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
