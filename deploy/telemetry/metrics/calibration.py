"""Calibration: how probable the targets were, and how often they lay where they were expected."""

from math import nan

from deploy.telemetry.metrics import Instruments, Metric, MetricState

METRICS = (
    Metric("online_meta_nll_nats", "gauge", "Negative log-likelihood of a query row, last 100 rounds.", ("learner",)),
    Metric("online_meta_nll_rounds", "gauge", "Rounds that the calibration is over.", ("learner",)),
    Metric("online_meta_coverage_ratio", "gauge", "Share of targets in their interval, 0 to 1.", ("learner", "level")),
    Metric("online_meta_calibration_error_ratio", "gauge", "Shares against probabilities, 0 to 1.", ("learner",)),
    Metric("online_meta_sharpness", "gauge", "Mean standard deviation of predictions, units of y.", ("learner",)),
)


def update(instruments: Instruments, state: MetricState) -> None:
    """Set the figures of the last 100 rounds, if predictions are distributions."""
    view = state.view
    if not view.calibration.bins:
        return
    last = view.last_100()
    for name in view.calibration.learners:
        found = view.calibration.measure(name, last)
        instruments["nll_rounds"].labels(learner=name).set(found.rounds)
        instruments["nll_nats"].labels(learner=name).set(_or_nan(found.nll))
        instruments["calibration_error_ratio"].labels(learner=name).set(_or_nan(found.error))
        if found.coverage is not None:
            instruments["sharpness"].labels(learner=name).set(_or_nan(found.sharpness))
            for level, share in found.coverage.items():
                instruments["coverage_ratio"].labels(learner=name, level=f"{level:g}").set(_or_nan(share))


def _or_nan(value: float | None) -> float:
    return nan if value is None else value
