"""What the learners of the regression streams are set to: the best of four tries by ``regression_tuning``."""

from deploy.experiments.regression_runs import COMPARATOR, LEARNERS, STREAMS, Choice

CHOSEN: dict[str, dict[str, Choice]] = {stream: {label: Choice(0.02) for label in LEARNERS} for stream in STREAMS}


def choice_of(stream: str, label: str) -> Choice:
    """Return what a learner is set to on a stream; the comparators adapt as FTML does."""
    return CHOSEN[stream]["ftml" if label == COMPARATOR else label]
