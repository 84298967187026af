"""A constant: the shares of the classes, or the mean of the targets, of the support set."""

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from online_meta.batches import concat_support_query, first_tensor
from online_meta.learners import LearnerContext, PredictingLearner, TaskShape
from online_meta.learners._online_step import record_update
from online_meta.learners._targets import CLASSES, MEANS, find_outputs, find_targets
from online_meta.types import Batch, Prediction, State, Task, Tensors

META_LEARNS = False


def can_answer(tasks: TaskShape) -> bool:
    """Return whether the learner can answer such tasks: it knows their loss."""
    return tasks.loss in {*CLASSES, *MEANS}


def build(context: LearnerContext, alpha: Annotated[float, Gt(0)] = 1.0) -> PredictingLearner:
    """Create the baseline that answers the same for every input.

    Of classes it is log((n_c + alpha) / (n + alpha C)), with n_c of the n support samples in class c of C (Laplace's
    rule of succession); of numbers, the mean of the support's targets. Without support samples, all samples of the
    rounds so far take their place, and before the first round it answers equal shares, or 0.

    All entries of a row, such as pixels, count as samples of one distribution of classes; numbers have a mean for each
    entry.

    Args:
        context: what all learners share.
        alpha: what is added to the count of each class, above 0.

    Raises:
        ValueError: if the outcome is not cross_entropy, categorical, mse or gaussian_of_noise.
    """
    outputs = find_outputs(context, "constant")

    def add_up(batch: Batch, like: Tensor) -> State:
        targets, weight = find_targets(batch, outputs, like)
        sums = (weight.reshape(-1, *[1] * (targets.ndim - 1)) * targets).sum(0)
        if outputs.of_classes:
            sums = sums.reshape(len(sums), -1).sum(1)
        return {"sums": sums, "count": sums.sum() if outputs.of_classes else weight.sum()}

    def answer(state: State, support: Batch, x: Tensors) -> Prediction:
        like = outputs.sample(x)
        found = add_up(support, like)
        if state:
            empty = found["count"] == 0
            found = {name: torch.where(empty, state[name].to(like.device), value) for name, value in found.items()}
        sums, count = found["sums"], found["count"]
        if outputs.of_classes:
            shares = (sums + alpha) / (count + alpha * len(like))
            one = shares.log().reshape(-1, *[1] * (like.ndim - 1))
        else:
            one = torch.where(count != 0, sums / count, sums)
        return outputs.predict(one.to(like.dtype).expand(len(first_tensor(x)), *like.shape).contiguous())

    def add_task(state: State, task: Task) -> State:
        found = add_up(concat_support_query(task), outputs.sample(task.query.x))
        return {name: value + state[name].to(value.device) for name, value in found.items()} if state else found

    return PredictingLearner({}, answer, record_update(add_task))
