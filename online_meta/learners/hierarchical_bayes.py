"""A hierarchical linear model: the coefficients of each task are drawn from a distribution that all tasks share."""

import math
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Gt, Le
from torch import Tensor

from online_meta.batches import concat_support_query, first_tensor
from online_meta.functional.features import compute_features
from online_meta.functional.softmax_regression import curvature_of, fit_softmax_regression
from online_meta.learners import LearnerContext, PredictingLearner, TaskShape
from online_meta.learners._online_step import record_update
from online_meta.learners._targets import (
    CLASSES,
    MEANS,
    MOST_INPUTS,
    Outputs,
    add_constant,
    find_outputs,
    find_root,
    find_rows,
    fits_rows,
    flatten_inputs,
)
from online_meta.outcomes import gaussian
from online_meta.prediction import point
from online_meta.types import Batch, Prediction, State, Task, Tensors

SUMS = ("errors", "samples")
"""The parts of the state that answers do not read."""

LEAST = 1e-6
"""The smallest standard deviation that is answered, in units of y."""


def can_answer(tasks: TaskShape) -> bool:
    """Return whether the learner can answer such tasks in some 100 milliseconds a round."""
    return fits_rows(tasks, {*CLASSES, *MEANS}, pooled=True)


class Prior(NamedTuple):
    """What is known of a task before its samples.

    There are k outputs and g groups of them: each output is a group, or all classes are one.

    Attributes:
        mean: mu, (d, k).
        covariance: Sigma, (g, d, d).
        noise: sigma^2, (g,).
    """

    mean: Tensor
    covariance: Tensor
    noise: Tensor


class Posterior(NamedTuple):
    """What is known of a task after its samples.

    Attributes:
        mean: m, (d, k).
        root: L, (g, d, d); the covariance is V = L' L.
    """

    mean: Tensor
    root: Tensor


class SampleRows(NamedTuple):
    """Samples as rows: inputs z (n, d), targets y (n, k), of classes their probabilities, and weights (n,)."""

    z: Tensor
    y: Tensor
    weight: Tensor


def build(
    context: LearnerContext,
    variance: Annotated[float, Gt(0)] = 0.1,
    noise: Annotated[float, Gt(0)] = 1.0,
    power: Annotated[float, Gt(0.5), Le(1)] = 0.6,
    on: Literal["inputs", "features"] = "inputs",
) -> PredictingLearner:
    """Create the learner y = z w_t + e, w_t ~ N(mu, Sigma), e ~ N(0, sigma^2), which answers the posterior of z w_t.

    It is the model of random effects (Laird & Ware, Biometrics 1982): z is the flattened input with a constant 1. Each
    output has its own mu, Sigma and sigma^2, and the posterior of w_t is exact. For ``mse`` the answer is its mean z m,
    for ``gaussian_of_noise`` the predictive normal distribution, with variance z V z' + sigma^2, as the outcome
    ``gaussian``. After each round they take a step of online EM (Cappe & Moulines, J. R.
    Stat. Soc. B 2009): the expected statistics s_t = (1 - a_t) s_{t-1} + a_t E[s(w_t) | task t], with
    a_t = (t + 2)^{-power} in round t from 0, determine them.

    Classes have the logits z W, W = [w_1 ... w_C], with one Sigma for all of them. The posterior of W is Laplace's
    approximation at its mode, with the curvature of each sample as a number that has the right trace. The answer has
    the logits z m / sqrt(1 + pi / 4 z V z'), which allow for their variance (MacKay, Neural Comput. 1992).

    Without samples it answers by the prior, which is N(0, variance I) in the first round.

    On features, z is what the model's head is given under the first meta-parameters, such as the embedding of a
    pretrained encoder. These features do not change with the rounds, as statistics of past tasks need it.

    Args:
        context: what all learners share.
        variance: the first variance of each coefficient, above 0.
        noise: the first sigma^2, above 0, in squared units of y.
        power: how fast the steps of online EM get smaller, in (0.5, 1]; with 1 all rounds weigh the same.
        on: whether z is the flattened "inputs", or the "features" of the model.

    Raises:
        ValueError: if the outcome is not cross_entropy, categorical, mse or gaussian_of_noise.
    """
    outputs = find_outputs(context, "hierarchical_bayes")
    adapt = partial(find_posterior, of_classes=outputs.of_classes)
    embed = partial(_embed, context) if on == "features" else lambda x: x
    prior_of = partial(_find_prior, outputs, variance, noise)

    def read(batch: Batch, like: Tensor) -> SampleRows:
        x, targets, weight = find_rows(batch._replace(x=embed(batch.x)), outputs, like)
        return SampleRows(add_constant(x), targets, weight)

    def answer(state: State, support: Batch, x: Tensors) -> Prediction:
        like, z = outputs.sample(x), add_constant(flatten_inputs(embed(x)))
        prior, rows = prior_of(state, z, like), read(support, like)
        posterior = adapt(prior, rows if len(rows.z) else rows._replace(z=z[:0]))
        return respond(outputs, z, posterior, prior.noise, like)

    def add_task(state: State, task: Task, step: Tensor) -> State:
        like = outputs.sample(task.query.x)
        rows = read(concat_support_query(task), like)
        prior = prior_of(state, rows.z, like)
        sums = {name: state[name].to(rows.z.device) for name in SUMS} if state else {}
        return take_em_step(prior, adapt(prior, rows), sums, rows, step, of_classes=outputs.of_classes)

    update = record_update(add_task, lambda round: (round + 2) ** -power)
    return PredictingLearner({}, answer, update, unpublished=SUMS)


def _embed(context: LearnerContext, x: Tensors) -> Tensors:
    """Return the features of inputs under the first meta-parameters."""
    if not len(first_tensor(x)):
        return x
    with torch.no_grad():
        return compute_features(context.inner.loss, context.start.weights, x).values


def _find_prior(outputs: Outputs, variance: float, noise: float, state: State, z: Tensor, like: Tensor) -> Prior:
    """Return the prior in a state, or the first one: for rows like those of ``z``, and outputs like ``like``."""
    groups = 1 if outputs.of_classes else like.numel()
    _check_size(z.shape[1], groups)
    if state:
        return Prior(*(state[name].to(z.device) for name in Prior._fields))
    identity = torch.eye(z.shape[1]).to(z).expand(groups, -1, -1)
    return Prior(z.new_zeros(z.shape[1], like.numel()), variance * identity, z.new_full((groups,), noise))


def find_posterior(prior: Prior, rows: SampleRows, *, of_classes: bool) -> Posterior:
    """Return the posterior of the coefficients given some samples.

    With Sigma = R R' and a = R^{-1} (w - mu) ~ N(0, I), a has the precision I + sum_i c_i f_i f_i' for f_i = R' z_i,
    where c_i = w_i / sigma^2, and of classes the curvature at the mode.
    """
    z, targets, weight = rows
    roots = torch.stack([find_root(one) for one in prior.covariance])
    features = z @ roots  # (g, n, d)
    offset = z @ prior.mean
    if of_classes:
        shift = roots[0] @ fit_softmax_regression(features[0], targets, weight, offset)
        curvature = (weight * curvature_of((z @ (prior.mean + shift)).softmax(1)))[None]
    else:
        curvature = weight / prior.noise[:, None]
    scaled = curvature.sqrt()[..., None] * features
    precision = torch.eye(z.shape[1]).to(z) + scaled.mT @ scaled
    factor = torch.stack([find_root(one) for one in precision])
    if not of_classes:
        right = features.mT @ (curvature * (targets - offset).T)[..., None]
        shift = (roots @ torch.cholesky_solve(right, factor))[..., 0].T
    return Posterior(prior.mean + shift, torch.linalg.solve_triangular(factor, roots.mT, upper=False))


def take_em_step(
    prior: Prior, posterior: Posterior, sums: State, rows: SampleRows, step: Tensor | float, *, of_classes: bool
) -> State:
    """Return the prior after one step of online EM, and the ``errors`` and ``samples`` that determine its noise.

    With s_1 = E w, s_2 = E w w', the expected squared errors s_3 and the number of samples s_4 of a task: mu = s_1,
    Sigma = s_2 - mu mu' and sigma^2 = s_3 / s_4. Sigma is computed around the new mu, so that it has no negative
    eigenvalue. Of C classes, it is the mean over the C - 1 directions in which probabilities differ.
    """
    mean = prior.mean + step * (posterior.mean - prior.mean)

    def spread(means: Tensor) -> Tensor:
        apart = means - mean
        columns = apart[None] / math.sqrt(max(apart.shape[1] - 1, 1)) if of_classes else apart.T[..., None]
        return columns @ columns.mT

    old = prior.covariance + spread(prior.mean)
    new = posterior.root.mT @ posterior.root + spread(posterior.mean)
    count = rows.weight.sum()
    if of_classes:
        errors = prior.noise * count  # Classes have no noise: it stays as it is.
    else:
        squares = (rows.y - rows.z @ posterior.mean).T ** 2 + (rows.z @ posterior.root.mT).square().sum(2)
        errors = squares @ rows.weight
    before = sums or {"errors": prior.noise * count, "samples": count}
    errors = (1 - step) * before["errors"] + step * errors
    samples = (1 - step) * before["samples"] + step * count
    return {
        "mean": mean,
        "covariance": (1 - step) * old + step * new,
        "noise": torch.where(samples > 0, errors / samples, prior.noise),
        "errors": errors,
        "samples": samples,
    }


def respond(outputs: Outputs, z: Tensor, posterior: Posterior, noise: Tensor, like: Tensor) -> Prediction:
    """Return the prediction for inputs z (m, d): of the shape of ``like`` for each of them."""
    shape, mean = (len(z), *like.shape), z @ posterior.mean
    if outputs.loss == "mse":
        return outputs.predict(mean.reshape(shape).to(like.dtype))
    variance = (z @ posterior.root.mT).square().sum(2).T  # (m, g)
    if outputs.of_classes:
        return outputs.predict((mean / (1 + math.pi / 4 * variance).sqrt()).reshape(shape).to(like.dtype))
    above = ((variance + noise).sqrt() - LEAST).clamp(min=LEAST)
    scale = above + torch.log(-torch.expm1(-above))  # The inverse of softplus.
    output = {"mean": mean, "scale": scale}
    return point(gaussian.build(least=LEAST), {name: one.reshape(shape).to(like.dtype) for name, one in output.items()})


def _check_size(inputs: int, groups: int) -> None:
    if groups * inputs**2 > MOST_INPUTS**2:
        raise ValueError(
            f"hierarchical_bayes keeps {groups} covariances of {inputs - 1} inputs: {groups * inputs**2} numbers, and "
            f"{MOST_INPUTS**2} are possible; take fewer inputs, or ridge_head with per = 'task'"
        )
