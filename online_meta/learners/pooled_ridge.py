"""Ridge regression on all rounds so far, whatever the support set."""

from typing import Annotated

from annotated_types import Gt

from online_meta.learners import LearnerContext, PredictingLearner, TaskShape, ridge_head
from online_meta.learners._targets import CLASSES, MEANS, fits_rows

META_LEARNS = False


def can_answer(tasks: TaskShape) -> bool:
    """Return whether the learner can answer such tasks in milliseconds a round: they have at most 784 inputs."""
    return fits_rows(tasks, {*CLASSES, *MEANS}, pooled=True)


def build(
    context: LearnerContext, strength: Annotated[float, Gt(0)] = 1.0, temperature: Annotated[float, Gt(0)] = 0.2
) -> PredictingLearner:
    """Create the learner W_t = argmin_W sum_{k<t} sum_i w_i |z_i W - y_i|^2 + strength |W|^2, which answers z W_t.

    It is ``ridge_head`` with per = "pooled": one linear model of all samples, support and query, of the rounds before.
    The support set is not read. W_0 = 0, so that the first answer is 0, or equal shares of the classes. The running
    sums of z z' and z y are kept, and solved once a round.

    Args:
        context: what all learners share.
        strength: how strongly W is pulled to 0, above 0, in squared units of the inputs.
        temperature: of classes, the logits are z W / temperature.

    Raises:
        ValueError: if the outcome is not cross_entropy, categorical, mse or gaussian_of_noise.
    """
    return ridge_head.build(context, strength, "pooled", temperature)
