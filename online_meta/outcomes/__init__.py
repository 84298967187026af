"""Outcomes, one per file: what the output of a model says about a target.

A file NAME.py defines ``build(**options) -> Outcome``; the registry finds it by its file name. Files whose names begin
with _ are not entries.

- All options are keyword-only with defaults. ``build`` raises ``ValueError`` for an option out of range. With the same
  options it returns equal outcomes: those of several learners are then one family.
- An output is a tensor (n, ...) or a flat dict of such tensors: n rows. Every function is pure and twice differentiable
  in the output, keeps its dtype, and works under ``torch.func.vmap``. Row i of a result depends only on row i.
- ``nll(output, y)`` has shape (n,): the negative log-likelihood of each row in nats, with all constants, summed over
  the row's own dimensions: exp(-nll) sums or integrates to 1 over all targets. An outcome that is no distribution has a
  ``loss``, no ``cdf`` and no ``probabilities``; its ``nll`` is the loss of each row.
- ``loss(output, y)`` is the mean of ``nll`` over the rows, or over all entries of all rows. It is only needed where the
  outcome is no distribution, or where some entries do not count.
- ``mean(output)`` is the expected target. Of classes, it is their probabilities.
- ``cdf(output, y)`` has the shape of y. Of counts, it is the mid-distribution function P(Y < y) + P(Y = y) / 2.
- ``variance(output)`` has the shape of ``mean``: the variance of each entry of the target. Classes have none.
- ``probabilities(output)`` has shape (n, classes, ...) and sums to 1 over dimension 1.
- ``root(output, y)`` has the shape of the output and one dimension more. Its R R^T, over all entries of a row, is the
  Fisher information of the row; of an outcome that is no distribution, the second derivative of ``nll``. It depends on
  y by its shape and by the entries that do not count alone.
- An output that does not fit y raises ``ValueError`` with both shapes and the one that is needed.
- ``example(n)`` returns an output of n rows and targets that fit, in float64, for the contract tests. Where there is a
  ``cdf``, a row's target is one number.

``outcome_of`` makes an outcome of a loss function.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from online_meta import registry
from online_meta.types import Outcome, Tensors

FUNCTION = "build"


def describe_shape(value: Tensors) -> str:
    """Return the shape as text, of a dict with the name of each tensor."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    return "{" + ", ".join(f"{name}: {tuple(one.shape)}" for name, one in value.items()) + "}"


def misfit(outcome: str, output: Tensors, y: Tensors, needs: str) -> ValueError:
    """Return the error for an output that does not fit y; ``needs`` says what is right."""
    return ValueError(
        f"{outcome}: the output has shape {describe_shape(output)} and y {describe_shape(y)}: it needs {needs}"
    )


def require_tensor(outcome: str, output: Tensors) -> Tensor:
    """Return the output; raise ``ValueError`` for a dict."""
    if isinstance(output, Tensor):
        return output
    raise ValueError(f"{outcome}: the output is a dict, {describe_shape(output)}: it needs one tensor (n, ...)")


def require_same_shape(outcome: str, output: Tensors, y: Tensors) -> tuple[Tensor, Tensor]:
    """Return output and y; raise ``ValueError`` if they are no tensors of one shape (n, ...)."""
    if isinstance(output, Tensor) and isinstance(y, Tensor) and output.shape == y.shape and output.ndim > 0:
        return output, y
    raise misfit(outcome, output, y, f"an output of the shape of y, {describe_shape(y)}")


def sum_rows(values: Tensor) -> Tensor:
    """Return the sum (n,) of each row of ``values`` (n, ...)."""
    return values.flatten(1).sum(1) if values.ndim > 1 else values


def spread_entries(values: Tensor) -> Tensor:
    """Return ``values`` (n, ...) as the diagonal of a matrix of each row, (n, ..., r): the root of separate entries."""
    return values.flatten(1).diag_embed().reshape(*values.shape, -1)


def average_outputs(outputs: Tensors, weights: Tensor) -> Tensor:
    """Return the weighted mean (n, ...) of ``outputs`` (S, n, ...) with ``weights`` (S,) that sum to 1."""
    outputs = require_tensor("a weighted mean of outputs", outputs)
    return (weights.to(outputs.dtype).reshape(-1, *[1] * (outputs.ndim - 1)) * outputs).sum(0)


@dataclass(frozen=True)
class LossFunction:
    """A loss of (output, y) that returns (n,) or a scalar, which shows when it is called.

    Attributes:
        function: the loss.
        per_row: whether a call returns the losses (n,) of the rows, or their mean.
    """

    function: Callable[[Tensors, Tensors], Tensor]
    per_row: bool = False

    def __call__(self, output: Tensors, y: Tensors) -> Tensor:
        """Return the loss; raise ``ValueError`` if the function gives neither (n,) nor, unless per row, a scalar."""
        found, n = self.function(output, y), len(next(iter(y.values())) if isinstance(y, dict) else y)
        if not isinstance(found, Tensor):
            raise ValueError(f"the loss returns a {type(found).__name__}: return a tensor, (n,) or a scalar")
        rows = found.shape == (n,)
        if self.per_row and not rows:
            raise ValueError(
                f"the loss returns a tensor of shape {tuple(found.shape)} for {n} rows, which says nothing about each "
                f"row: return the losses of the rows, ({n},), as with reduction='none'"
            )
        if rows:
            return found if self.per_row else found.mean()
        if found.numel() != 1:
            raise ValueError(
                f"the loss returns a tensor of shape {tuple(found.shape)} for {n} rows: return the losses of the rows, "
                f"({n},), or their mean, a scalar"
            )
        return found.reshape(())

    def has_rows(self, output: Tensors, y: Tensors) -> bool:
        """Return whether the function gives the losses of the rows, (n,)."""
        n = len(next(iter(y.values())) if isinstance(y, dict) else y)
        return self.function(output, y).shape == (n,)


def outcome_of(criterion: Callable[[Tensors, Tensors], Tensor]) -> Outcome:
    """Return the outcome of a loss function (output, y) -> the losses of the rows, (n,), or their mean, a scalar.

    Losses (n,) count as negative log-likelihoods: the mixture of several outputs is -log sum_s w_s exp(-loss_s). With a
    scalar, the loss of several outputs is the weighted mean of their losses; ``nll`` then raises ``ValueError``.
    ``F.mse_loss`` and ``F.cross_entropy`` give the outcomes ``mse`` and ``cross_entropy``.
    """
    for name in ("mse", "cross_entropy"):
        known: Outcome = registry.load(sys.modules[__name__], name)()
        if criterion is known.loss:
            return known
    return Outcome(LossFunction(criterion, per_row=True), _own_mean, loss=LossFunction(criterion))


def _own_mean(output: Tensors) -> Tensor:
    return require_tensor("a loss function", output)
