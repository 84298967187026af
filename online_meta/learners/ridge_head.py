"""Ridge regression of the targets on the inputs, in closed form."""

from typing import Annotated, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from online_meta.batches import concat_support_query
from online_meta.learners import LearnerContext, PredictingLearner, TaskShape
from online_meta.learners._online_step import record_update
from online_meta.learners._targets import (
    CLASSES,
    MEANS,
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

SUMS = ("squares", "products")
"""The parts of the state that answers do not read."""


def can_answer(tasks: TaskShape) -> bool:
    """Return whether the learner can answer such tasks in milliseconds a round, with its default ``per``."""
    return fits_rows(tasks, {*CLASSES, *MEANS})


def build(
    context: LearnerContext,
    strength: Annotated[float, Gt(0)] = 1.0,
    per: Literal["task", "pooled", "both"] = "task",
    temperature: Annotated[float, Gt(0)] = 0.2,
) -> PredictingLearner:
    """Create the learner W = argmin_W sum_i w_i |z_i W - y_i|^2 + strength |W - W_0|^2, which answers z W.

    z is the flattened input with a constant 1, w_i the weight of sample i, and y_i its target, of classes the one-hot
    one (the ridge regression head of Bertinetto et al., ICLR 2019, on the raw inputs). It is solved in float64; with
    fewer samples than inputs, from the n x n matrix of their products. Without samples, W = W_0.

    Args:
        context: what all learners share.
        strength: how strongly W is pulled to W_0, above 0, in squared units of the inputs.
        per: the samples of the sum. "task": those of the support set, with W_0 = 0. "pooled": those of all rounds so
            far, with W_0 = 0, whatever the support set. "both": those of the support set, with the pooled W as W_0.
            The last two hold (d + 1)^2 numbers for d inputs, at most 4096.
        temperature: of classes, the logits are z W / temperature. z W estimates their probabilities, so that two
            classes far from each other differ by 1 at most.

    Raises:
        ValueError: if the outcome is not cross_entropy, categorical, mse or gaussian_of_noise.
    """
    outputs = find_outputs(context, "ridge_head")

    def read(batch: Batch, like: Tensor) -> tuple[Tensor, Tensor]:
        x, targets, weight = find_rows(batch, outputs, like)
        root = weight.sqrt()[:, None]
        return root * add_constant(x), root * targets

    def answer(state: State, support: Batch, x: Tensors) -> Prediction:
        like, z = outputs.sample(x), add_constant(flatten_inputs(x))
        check_inputs(z, per)
        weights = state["weights"].to(z.device) if state else z.new_zeros(z.shape[1], like.numel())
        if per != "pooled":
            rows, targets = read(support, like)
            weights = weights + solve_ridge(rows, targets - rows @ weights, strength)
        found = z @ weights / (temperature if outputs.of_classes else 1.0)
        return outputs.predict(found.reshape(len(z), *like.shape).to(like.dtype))

    def add_task(state: State, task: Task) -> State:
        rows, targets = read(concat_support_query(task), outputs.sample(task.query.x))
        check_inputs(rows, per)
        sums = {"squares": rows.T @ rows, "products": rows.T @ targets}
        if state:
            sums = {name: value + state[name].to(value.device) for name, value in sums.items()}
        return {**sums, "weights": _solve(sums["squares"], sums["products"], strength)}

    return PredictingLearner({}, answer, None if per == "task" else record_update(add_task), unpublished=SUMS)


def solve_ridge(rows: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Return argmin_W |Z W - Y|^2 + strength |W|^2, (d, k), for Z (n, d) and Y (n, k).

    It is (Z'Z + strength I)^{-1} Z'Y = Z' (Z Z' + strength I)^{-1} Y, of which the smaller matrix is solved.
    """
    if len(rows) < rows.shape[1]:
        return rows.T @ _solve(rows @ rows.T, targets, strength)
    return _solve(rows.T @ rows, rows.T @ targets, strength)


def _solve(squares: Tensor, right: Tensor, strength: float) -> Tensor:
    """Return (squares + strength I)^{-1} right."""
    return torch.cholesky_solve(right, find_root(squares + strength * torch.eye(len(squares)).to(squares)))
