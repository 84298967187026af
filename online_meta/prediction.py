"""Predictions: mixtures of what several outputs of a model, or several learners, say about the targets.

A prediction has components; a component has S outputs of one outcome, with their log-weights. All weights sum to 1.
Components of the same outcome count as one, so that an outcome that pools its outputs pools all of them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from online_meta.batches import map_tensors
from online_meta.functional.classes import count_entries, find_right
from online_meta.outcomes import LossFunction, average_outputs
from online_meta.types import Component, Outcome, Prediction, Tensors

_BISECTIONS, _DOUBLINGS = 60, 60


def point(outcome: Outcome, output: Tensors) -> Prediction:
    """Return the prediction of a single output (n, ...)."""
    outputs = {name: one[None] for name, one in output.items()} if isinstance(output, dict) else output[None]
    one = next(iter(output.values())) if isinstance(output, dict) else output
    dtype = one.dtype if one.is_floating_point() else torch.get_default_dtype()
    return (Component(outcome, outputs, torch.zeros(1, dtype=dtype, device=one.device)),)


def mix(predictions: Sequence[Prediction], log_weights: Tensor | Sequence[float]) -> Prediction:
    """Return the mixture of several predictions of the same targets; their outcomes may differ.

    Args:
        predictions: the predictions, for example of several learners.
        log_weights: the logarithm of the weight of each, which need not be normalised and may be -inf, but not of all.

    Returns:
        A prediction with all their components.

    Raises:
        ValueError: if there is not one weight for each prediction, or if numbers are all -inf.
    """
    if not isinstance(log_weights, Tensor):
        if not any(log_weight > -math.inf for log_weight in log_weights):
            raise ValueError(
                f"log_weights are {[*log_weights]}: give one for each prediction, and one that is not -inf"
            )
        log_weights = torch.tensor(log_weights, dtype=torch.float64)
    if log_weights.shape != (len(predictions),) or not predictions:
        raise ValueError(
            f"{len(predictions)} predictions have log_weights of shape {tuple(log_weights.shape)}: give one for each"
        )
    log_weights = log_weights - torch.logsumexp(log_weights, 0)
    return tuple(
        component._replace(log_weights=component.log_weights + log_weight.to(component.log_weights))
        for prediction, log_weight in zip(predictions, log_weights, strict=True)
        for component in prediction
    )


def pool(prediction: Prediction) -> Prediction:
    """Return the prediction with one component for each outcome, and one output where the outcome can pool them."""
    groups: list[list[Component]] = []
    for component in prediction:
        same = (group for group in groups if _can_join(group[0], component))
        found = next(same, None)
        if found is None:
            groups.append([component])
        else:
            found.append(component)
    return tuple(_pool(_join(group)) for group in groups)


def _can_join(first: Component, second: Component) -> bool:
    # A loss may have been wrapped in further checks since; the family is what the outcome says otherwise.
    families = [component.outcome._replace(loss=None) for component in (first, second)]
    return families[0] == families[1] and _row_shapes(first.outputs) == _row_shapes(second.outputs)


def _row_shapes(outputs: Tensors) -> dict[str, torch.Size]:
    named = outputs if isinstance(outputs, dict) else {"": outputs}
    return {name: one.shape[1:] for name, one in named.items()}


def _join(group: Sequence[Component]) -> Component:
    if len(group) == 1:
        return group[0]
    outputs = map_tensors(lambda *each: torch.cat(each), *(component.outputs for component in group))
    return Component(group[0].outcome, outputs, torch.cat([component.log_weights for component in group]))


def _pool(component: Component) -> Component:
    outcome, outputs, log_weights = component
    if outcome.pool is None or len(log_weights) == 1:
        return component
    total = torch.logsumexp(log_weights, 0)
    pooled = outcome.pool(outputs, (log_weights - total).exp())
    return point(outcome, pooled)[0]._replace(log_weights=total[None])


def _outputs(component: Component) -> list[Tensors]:
    """Return the S outputs (n, ...) of a component."""
    if isinstance(component.outputs, dict):
        named = component.outputs
        return [{name: one[s] for name, one in named.items()} for s in range(len(component.log_weights))]
    return [component.outputs[s] for s in range(len(component.log_weights))]


def _log_weights(prediction: Prediction) -> Tensor:
    return torch.cat([component.log_weights for component in prediction])


def _average(prediction: Prediction, values: list[Tensor]) -> Tensor:
    """Return the weighted mean of ``values``, one for each output; a single one to the bit."""
    if len(values) == 1:
        return values[0]
    shapes = {value.shape for value in values}
    if len(shapes) > 1:
        raise ValueError(f"outputs of shapes {sorted(map(tuple, shapes))} cannot be mixed: they are of other targets")
    return average_outputs(torch.stack(values), _log_weights(prediction).exp())


def loss_of(prediction: Prediction, y: Tensors, weight: Tensor | None = None) -> Tensor:
    """Return the loss of a prediction, a scalar: the score of a learner that answers with it.

    A single output has the outcome's own ``loss``, or else the mean of ``nll_of`` over the rows. Several outputs are
    pooled where the outcome can, and have otherwise the mean of ``nll_of``; a loss that is a scalar for all rows is
    averaged over the outputs.

    Args:
        prediction: the prediction.
        y: the targets.
        weight: how much each row counts, (n,): the loss is sum_i w_i l_i / sum_i w_i over the rows i. In an average
            over all entries, such as that of ``cross_entropy``, an entry has the weight of its row. Rows of weight 0
            do not count, whatever they hold. None if all count alike.

    Returns:
        The loss; NaN if no row counts.

    Raises:
        ValueError: if an output does not fit y, if outcomes of several kinds are mixed and one is no likelihood, or for
            a weight and a loss that is a scalar for all rows.
    """
    parts = pool(prediction)
    if weight is not None or len(parts) > 1:
        return _mean_over_rows(parts, nll_of(parts, y), y, weight)
    outputs = _outputs(parts[0])
    outcome = parts[0].outcome
    if outcome.loss is not None and (len(outputs) == 1 or not _is_likelihood(parts[0], y)):
        return _average(parts, [_loss(outcome, output, y) for output in outputs])
    if len(outputs) == 1:
        return outcome.nll(outputs[0], y).mean()
    return _mean_over_rows(parts, nll_of(parts, y), y, None)


def _loss(outcome: Outcome, output: Tensors, y: Tensors) -> Tensor:
    """Return ``outcome.loss``; of torch's own, which may broadcast, raise the errors of ``outcome.nll``."""
    assert outcome.loss is not None
    if getattr(outcome.loss, "__module__", None) != F.__name__:
        return outcome.loss(output, y)
    same = isinstance(output, Tensor) and isinstance(y, Tensor) and output.shape == y.shape
    if outcome.probabilities is None and not same:
        outcome.nll(output, y)
    try:
        return outcome.loss(output, y)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
        outcome.nll(output, y)
        raise


def nll_of(prediction: Prediction, y: Tensors) -> Tensor:
    """Return the negative log-likelihood -log sum_s w_s p_s(y_i) of each row, (n,), in nats.

    Of an outcome that is no likelihood it is the loss of each row, averaged over the outputs that cannot be pooled.

    Raises:
        ValueError: if an output does not fit y, if outcomes of several kinds are mixed and one is no likelihood, or for
            a loss that is a scalar for all rows.
    """
    parts = pool(prediction)
    several = len(_log_weights(parts)) > 1
    unfit = [place for place, part in enumerate(parts, 1) if several and not _is_likelihood(part, y)]
    if unfit and len(parts) > 1:
        raise ValueError(
            f"a mixture of {len(parts)} kinds of outcomes needs a likelihood of each, but kind {unfit[0]} is a loss "
            "without one: use an outcome in nats, such as gaussian_of_noise in place of mse, or a loss that returns "
            "the negative log-likelihoods of the rows, (n,)"
        )
    rows = [part.outcome.nll(output, y) for part in parts for output in _outputs(part)]
    if len(rows) == 1 or unfit:
        return _average(parts, rows)
    log_weights = _log_weights(parts).to(rows[0])
    return -torch.logsumexp(log_weights[:, None] - torch.stack(rows), 0)


def _is_likelihood(part: Component, y: Tensors) -> bool:
    """Return whether the outcome's ``nll`` is in nats, so that it can be mixed with others."""
    outcome = part.outcome
    if isinstance(outcome.loss, LossFunction):
        return outcome.loss.has_rows(_outputs(part)[0], y)
    return outcome.loss is None or outcome.cdf is not None or outcome.probabilities is not None


def _mean_over_rows(parts: Prediction, rows: Tensor, y: Tensors, weight: Tensor | None) -> Tensor:
    """Return the weighted mean of ``rows``, in which rows and entries of an ignored class do not count."""
    if weight is not None and weight.shape != rows.shape:
        raise ValueError(f"the weight has shape {tuple(weight.shape)}: it needs one number for each row, {len(rows)}")
    of_classes = all(part.outcome.probabilities is not None for part in parts)
    entries = count_entries(y) if of_classes else None
    if weight is None and entries is None:
        return rows.mean()
    weight = torch.ones_like(rows) if weight is None else weight.to(rows)
    counts = weight if entries is None else weight * (entries > 0)
    if of_classes and len(parts) == 1 and parts[0].outcome.pool is not None:  # see ``cross_entropy``: a mean of entries
        assert isinstance(y, Tensor)
        counts = weight * (y.shape[2:].numel() if entries is None else entries)
    return (weight * rows.where(weight != 0, 0)).sum() / counts.sum()


def mean_of(prediction: Prediction) -> Tensor:
    """Return the expected targets, (n, ...); of classes, their probabilities."""
    return _average(prediction, [part.outcome.mean(output) for part in prediction for output in _outputs(part)])


def probabilities_of(prediction: Prediction) -> Tensor | None:
    """Return the probabilities of the classes, (n, classes, ...); None if an outcome has none."""
    found = []
    for part in prediction:
        if part.outcome.probabilities is None:
            return None
        found += [part.outcome.probabilities(output) for output in _outputs(part)]
    return _average(prediction, found)


def cdf_of(prediction: Prediction, y: Tensors) -> Tensor | None:
    """Return P(target <= y) of each entry of ``y`` (of counts, the mid-distribution); None if an outcome has none."""
    found = []
    for part in prediction:
        if part.outcome.cdf is None:
            return None
        found += [part.outcome.cdf(output, y) for output in _outputs(part)]
    return _average(prediction, found)


def quantile_of(prediction: Prediction, share: float | Tensor) -> Tensor | None:
    """Return the value below which each target lies with a probability, (n, ...) in float64; None without a ``cdf``.

    It is found by bisection between bounds around the mean, so that it is that of the whole mixture.

    Args:
        prediction: the prediction.
        share: the probability, between 0 and 1, or one for each target.
    """
    mean = mean_of(prediction).double()
    low, high, width = mean, mean, 1.0
    if cdf_of(prediction, low) is None:
        return None
    for _ in range(_DOUBLINGS):  # until the bounds enclose the quantile
        below, above = (cdf_of(prediction, bound) for bound in (low, high))
        assert below is not None
        assert above is not None
        if bool((below <= share).all() and (above >= share).all()):
            break
        low, high, width = (
            torch.where(below > share, low - width, low),
            torch.where(above < share, high + width, high),
            2 * width,
        )
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        reached = cdf_of(prediction, middle)
        assert reached is not None
        low, high = torch.where(reached < share, middle, low), torch.where(reached < share, high, middle)
    return (low + high) / 2


def to_double(prediction: Prediction) -> Prediction:
    """Return the prediction in float64."""
    return tuple(
        part._replace(
            outputs={name: _to_double(one) for name, one in part.outputs.items()}
            if isinstance(part.outputs, dict)
            else _to_double(part.outputs),
            log_weights=part.log_weights.double(),
        )
        for part in prediction
    )


def _to_double(values: Tensor) -> Tensor:
    return values.double() if values.is_floating_point() else values


def accuracy_of_prediction(
    prediction: Prediction, y: Tensors, *, dim: int | None = None, weight: Tensor | None = None
) -> Tensor:
    """Return the share of the entries whose most probable class is right, a float64 scalar in [0, 1].

    Args:
        prediction: the prediction. Without probabilities, the class with the largest mean counts.
        y: integer classes (n, ...), of which class -100 does not count, or probabilities of classes.
        dim: the dimension of the classes; None to find it, as ``accuracy_of`` does.
        weight: how much each row counts, (n,); None if all count alike.

    Returns:
        The accuracy; NaN if no entry counts.

    Raises:
        ValueError: if the shapes do not fit.
    """
    prediction = to_double(prediction)  # Softmax in float32 makes different logits equal.
    probabilities = probabilities_of(prediction)
    right, counts = find_right(mean_of(prediction) if probabilities is None else probabilities, y, dim)
    if weight is None:
        return right.to(torch.float64).sum() / counts.sum()
    weight = weight.double().reshape(-1, *[1] * (right.ndim - 1))
    return (weight * right).sum() / (weight * counts).sum()


__all__ = [
    "accuracy_of_prediction",
    "cdf_of",
    "loss_of",
    "mean_of",
    "mix",
    "nll_of",
    "point",
    "pool",
    "probabilities_of",
    "quantile_of",
    "to_double",
]
