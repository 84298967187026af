"""The nearest centroid: the classes, or the targets, of the support samples that are close to an input."""

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from online_meta.learners import LearnerContext, PredictingLearner, TaskShape
from online_meta.learners._targets import CLASSES, MEANS, find_outputs, find_rows, fits_rows, flatten_inputs
from online_meta.types import Batch, Prediction, State, Tensors

META_LEARNS = False

MISSING = 20.0
"""How far the logit of a class without support samples lies below the smallest one of the others."""


def can_answer(tasks: TaskShape) -> bool:
    """Return whether the learner can answer such tasks in milliseconds a round."""
    return fits_rows(tasks, {*CLASSES, *MEANS})


def build(context: LearnerContext, temperature: Annotated[float, Gt(0)] = 1.0) -> PredictingLearner:
    """Create the learner whose logit of class c is -|x - m_c|^2 / temperature, with the support's mean input m_c of c.

    It is the head of prototypical networks (Snell et al., NeurIPS 2017) on the raw, flattened inputs. A class without
    support samples has a logit far below the others; without any samples, all logits are 0.

    Numbers have no classes: there, each support sample i is the centroid of its own target y_i, and the answer is the
    mean of the targets with weights proportional to exp(-|x - x_i|^2 / temperature) (Nadaraya, 1964; Watson, 1964), or
    0 without samples.

    Args:
        context: what all learners share.
        temperature: what squared distances are divided by, above 0, in squared units of the inputs.

    Raises:
        ValueError: if the outcome is not cross_entropy, categorical, mse or gaussian_of_noise.
    """
    outputs = find_outputs(context, "nearest_centroid")
    respond = classify if outputs.of_classes else average

    def answer(state: State, support: Batch, x: Tensors) -> Prediction:
        like, inputs = outputs.sample(x), flatten_inputs(x)
        rows, targets, weight = find_rows(support, outputs, like)
        found = respond(inputs, rows, targets, weight, temperature)
        return outputs.predict(found.reshape(len(inputs), *like.shape).to(like.dtype))

    return PredictingLearner({}, answer)


def classify(inputs: Tensor, rows: Tensor, targets: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Return the logits (m, classes) of inputs (m, d), from support rows (n, d) with one-hot targets (n, classes)."""
    shares = weight[:, None] * targets
    counts = shares.sum(0)
    present = counts > 0
    logits = inputs.new_zeros(len(inputs), len(counts))
    if present.any():
        centroids = (shares.T @ rows)[present] / counts[present, None]
        near = -_squared_distances(inputs, centroids) / temperature
        logits[:] = near.amin(1, keepdim=True) - MISSING
        logits[:, present] = near
    return logits


def average(inputs: Tensor, rows: Tensor, targets: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Return the mean (m, k) of the targets (n, k) whose rows (n, d) are close to the inputs (m, d)."""
    shares = (weight.log() - _squared_distances(inputs, rows) / temperature).softmax(1)
    return shares @ targets


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist") ** 2
