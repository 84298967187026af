"""One of several classes in an order, such as grades, by the logits of being at most each class."""

import torch
from torch import Tensor
from torch.nn import functional as F

from online_meta.functional.classes import IGNORED_CLASS, count_entries
from online_meta.outcomes import misfit, require_tensor, sum_rows
from online_meta.types import Outcome, Tensors

NEEDS = "an output (n, classes - 1, ...) and classes (n, ...)"


def build() -> Outcome:
    """Return P(y <= k) = sigmoid(t_k), t_0 = output_0, t_k = t_{k-1} + softplus(output_k) (McCullagh, JRSS B 1980).

    The output is (n, classes - 1, ...), and y is a class 0, 1, ... (n, ...). A model whose last bias is the same in all
    tasks, and which adds one number to the first output, is the proportional odds model. A row may have several
    entries, whose nll is summed. Entries of class -100 add nothing, and rows without others are left out of the mean.
    """
    return Outcome(_nll, _probabilities, probabilities=_probabilities, loss=_loss)


def _log_probabilities(output: Tensors) -> Tensor:
    """Return the log-probabilities (n, classes, ...) of the classes.

    sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)), and the last factor is sigmoid(output_k), so that
    no difference of nearly equal numbers is taken.
    """
    output = require_tensor("ordinal", output)
    if output.ndim < 2 or output.shape[1] < 1:
        raise misfit("ordinal", output, output.new_zeros(len(output)), NEEDS)
    first, more = output[:, :1], output[:, 1:]
    at_most = torch.cat([first, first + F.softplus(more).cumsum(1)], 1)
    certain = torch.zeros_like(first)
    upper = torch.cat([F.logsigmoid(at_most), certain], 1)
    lower = torch.cat([certain, F.logsigmoid(-at_most)], 1)
    between = torch.cat([certain, F.logsigmoid(more), certain], 1)
    return upper + lower + between


def _probabilities(output: Tensors) -> Tensor:
    return _log_probabilities(output).exp()


def _nll(output: Tensors, y: Tensors) -> Tensor:
    if not (isinstance(output, Tensor) and isinstance(y, Tensor)) or output.ndim < 2 or y.is_floating_point():
        raise misfit("ordinal", output, y, NEEDS)
    if y.shape != (len(output), *output.shape[2:]):
        raise misfit("ordinal", output, y, NEEDS)
    return sum_rows(F.nll_loss(_log_probabilities(output), y.long(), reduction="none", ignore_index=IGNORED_CLASS))


def _loss(output: Tensors, y: Tensors) -> Tensor:
    rows, entries = _nll(output, y), count_entries(y)
    return rows.mean() if entries is None else rows.sum() / (entries > 0).sum()


def example(n: int) -> tuple[Tensors, Tensors]:
    """Return n rows of three outputs, and classes of four."""
    random = torch.Generator().manual_seed(0)
    output = 2 * torch.randn(n, 3, generator=random, dtype=torch.float64)
    return output, torch.randint(4, (n,), generator=random)
