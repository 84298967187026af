"""Logistic regression of the classes on the inputs."""

from typing import Annotated, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from online_meta.batches import concat_support_query
from online_meta.functional.softmax_regression import curvature_of, fit_softmax_regression
from online_meta.learners import LearnerContext, PredictingLearner, TaskShape
from online_meta.learners._targets import (
    CLASSES,
    add_constant,
    check_inputs,
    find_outputs,
    find_root,
    find_rows,
    fits_rows,
    flatten_inputs,
)
from online_meta.types import Batch, Prediction, State, Task, Tensors

META_LEARNS = False


def can_answer(tasks: TaskShape) -> bool:
    """Return whether the learner can answer such tasks in milliseconds a round, with its default ``per``."""
    return fits_rows(tasks, CLASSES)


def build(
    context: LearnerContext,
    strength: Annotated[float, Gt(0)] = 1.0,
    per: Literal["task", "pooled", "both"] = "task",
) -> PredictingLearner:
    """Create the learner W = argmin_W sum_i w_i nll(softmax(z_i W), y_i) + strength / 2 |W - W_0|^2, with logits z W.

    z is the flattened input with a constant 1, w_i the weight of sample i, and y_i its class (Cox, J. R. Stat. Soc. B
    1958). It is solved in float64 by Newton's method. Without samples, W = W_0.

    The model of all rounds is W_{t+1} = argmin_W sum_i w_i nll(softmax(z_i W), y_i) + tr (W - W_t)' G_t (W - W_t) / 2
    over the samples of round t alone, with W_0 = 0, G_0 = strength I and G_{t+1} = G_t + sum_i w_i c_i z_i z_i': the
    past is the normal distribution around W_t of that precision, by Laplace's approximation (Spiegelhalter &
    Lauritzen, Networks 1990). c_i is the curvature at W_{t+1}, a number for all classes that has the right trace; of
    two classes it is the right matrix. One round is solved exactly. Afterwards this comes close to the fit of all
    samples, and its cost and memory don't grow.

    Args:
        context: what all learners share.
        strength: how strongly W is pulled to W_0, above 0, in squared units of the inputs.
        per: the samples of the sum. "task": those of the support set, with W_0 = 0. "pooled": those of all rounds so
            far, whatever the support set. "both": those of the support set, with the pooled W as W_0. The last two
            hold (d + 1)^2 numbers for d inputs, at most 4096.

    Raises:
        ValueError: if the outcome is not cross_entropy or categorical.
    """
    outputs = find_outputs(context, "logistic_head", regression=False)

    def read(batch: Batch, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, targets, weight = find_rows(batch, outputs, like)
        return add_constant(x), targets, weight

    def answer(state: State, support: Batch, x: Tensors) -> Prediction:
        like, z = outputs.sample(x), add_constant(flatten_inputs(x))
        check_inputs(z, per)
        weights = state["weights"].to(z.device) if state else z.new_zeros(z.shape[1], like.numel())
        if per != "pooled":
            rows, targets, weight = read(support, like)
            weights = weights + fit_softmax_regression(rows, targets, weight, rows @ weights, strength)
        return outputs.predict((z @ weights).reshape(len(z), *like.shape).to(like.dtype))

    def update(state: State, task: Task, round: int) -> State:
        rows, targets, weight = read(concat_support_query(task), outputs.sample(task.query.x))
        check_inputs(rows, per)
        if state:
            weights, precision = (state[name].to(rows.device) for name in ("weights", "precision"))
        else:
            weights = rows.new_zeros(rows.shape[1], targets.shape[1])
            precision = strength * torch.eye(rows.shape[1]).to(rows)
        root = find_root(precision)
        whitened = torch.linalg.solve_triangular(root, rows.T, upper=False).T
        step = fit_softmax_regression(whitened, targets, weight, rows @ weights)
        weights = weights + torch.linalg.solve_triangular(root.T, step, upper=True)
        curved = (weight * curvature_of((rows @ weights).softmax(1))).sqrt()[:, None] * rows
        return {"weights": weights, "precision": precision + curved.T @ curved}

    return PredictingLearner({}, answer, None if per == "task" else update, unpublished=("precision",))
