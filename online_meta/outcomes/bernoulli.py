"""Independent yes-or-no labels, several a row (multi-label classification)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from online_meta.outcomes import require_same_shape, require_tensor, spread_entries, sum_rows
from online_meta.types import Outcome, Tensors


def build() -> Outcome:
    """Return P(y = 1) = sigmoid(output) for each entry; output and y have the same shape, and y is 0 or 1.

    ``probabilities`` are those of 0 and 1, (n, 2, ...). A y between 0 and 1 gives the expected nll of labels that are 1
    with this probability.
    """
    return Outcome(_nll, _mean, probabilities=_probabilities, variance=_variance, root=_root)


def _nll(output: Tensors, y: Tensors) -> Tensor:
    output, y = require_same_shape("bernoulli", output, y)
    return sum_rows(F.binary_cross_entropy_with_logits(output, y.to(output.dtype), reduction="none"))


def _mean(output: Tensors) -> Tensor:
    return require_tensor("bernoulli", output).sigmoid()


def _variance(output: Tensors) -> Tensor:
    output = require_tensor("bernoulli", output)
    return output.sigmoid() * (-output).sigmoid()


def _probabilities(output: Tensors) -> Tensor:
    output = require_tensor("bernoulli", output)
    return torch.stack([(-output).sigmoid(), output.sigmoid()], 1)


def _root(output: Tensors, y: Tensors) -> Tensor:
    output = require_tensor("bernoulli", output)
    return spread_entries((0.5 * (F.logsigmoid(output) + F.logsigmoid(-output))).exp())


def example(n: int) -> tuple[Tensors, Tensors]:
    """Return n rows of three logits, and labels."""
    random = torch.Generator().manual_seed(0)
    output = 2 * torch.randn(n, 3, generator=random, dtype=torch.float64)
    return output, torch.randint(2, (n, 3), generator=random).double()
