"""The last value: the target that was seen last."""

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from online_meta.batches import concat_support_query, first_tensor
from online_meta.learners import LearnerContext, PredictingLearner, TaskShape
from online_meta.learners._targets import CLASSES, MEANS, find_outputs, find_targets
from online_meta.types import Batch, Prediction, State, Task, Tensors

META_LEARNS = False


def can_answer(tasks: TaskShape) -> bool:
    """Return whether the learner can answer such tasks: it knows their loss."""
    return tasks.loss in {*CLASSES, *MEANS}


def build(context: LearnerContext, alpha: Annotated[float, Gt(0)] = 0.1) -> PredictingLearner:
    """Create the baseline that predicts, for every input, the target of the last support sample.

    For a stream in the order of time this is the forecast of a random walk. Without support samples the last sample of
    the rounds before takes its place, of a round the last one of the query set; before the first round the answer is 0,
    or equal shares. Of classes it is log((1[c is the last class] + alpha) / (1 + alpha C)), for each entry of a row.
    Samples of weight 0 and of class -100 are left out.

    Args:
        context: what all learners share.
        alpha: what is added to the count of each class, above 0.

    Raises:
        ValueError: if the outcome is not cross_entropy, categorical, mse or gaussian_of_noise.
    """
    outputs = find_outputs(context, "last_value")

    def find_last(batch: Batch, like: Tensor) -> Tensor | None:
        targets, _ = find_targets(batch, outputs, like)
        if outputs.of_classes:
            targets = targets[targets.flatten(1).sum(1) > 0]
        return targets[-1] if len(targets) else None

    def answer(state: State, support: Batch, x: Tensors) -> Prediction:
        like = outputs.sample(x)
        last = find_last(support, like)
        if last is None:
            last = state["last"].to(like.device) if state else torch.zeros_like(like, dtype=torch.float64)
        if outputs.of_classes:
            last = ((last + alpha) / (last.sum(0) + alpha * len(like))).log()
        return outputs.predict(last.to(like.dtype).expand(len(first_tensor(x)), *like.shape).contiguous())

    def update(state: State, task: Task, round: int) -> State:
        like = outputs.sample(task.query.x)
        last = find_last(concat_support_query(task), like)
        if last is not None:
            return {"last": last.clone()}
        return state or {"last": torch.zeros_like(like, dtype=torch.float64)}

    return PredictingLearner({}, answer, update, order_matters=True)
