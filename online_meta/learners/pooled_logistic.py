"""Logistic regression on all rounds so far, whatever the support set."""

from typing import Annotated

from annotated_types import Gt

from online_meta.learners import LearnerContext, PredictingLearner, TaskShape, logistic_head
from online_meta.learners._targets import CLASSES, fits_rows

META_LEARNS = False


def can_answer(tasks: TaskShape) -> bool:
    """Return whether the learner can answer such tasks in milliseconds a round: classes of at most 784 inputs."""
    return fits_rows(tasks, CLASSES, pooled=True)


def build(context: LearnerContext, strength: Annotated[float, Gt(0)] = 1.0) -> PredictingLearner:
    """Create the learner that is ``logistic_head`` with per = "pooled": one model of the rounds before.

    The support set is not read. W_0 = 0, so that the first answer is equal shares of the classes.

    Args:
        context: what all learners share.
        strength: how strongly W is pulled to 0, above 0, in squared units of the inputs.

    Raises:
        ValueError: if the outcome is not cross_entropy or categorical.
    """
    return logistic_head.build(context, strength, "pooled")
