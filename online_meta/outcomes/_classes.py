"""What ``categorical`` and ``cross_entropy`` share."""

import torch
from torch import Tensor
from torch.nn import functional as F

from online_meta.functional.classes import IGNORED_CLASS
from online_meta.outcomes import misfit, require_tensor, sum_rows
from online_meta.types import Tensors

NEEDS = "logits (n, classes, ...) and classes (n, ...), or probabilities of the classes of the shape of the logits"


def nll(output: Tensors, y: Tensors) -> Tensor:
    """Return -log softmax(output)[y], (n,), summed over a row's own dimensions; entries of class -100 add 0."""
    if not (isinstance(output, Tensor) and isinstance(y, Tensor)) or output.ndim < 2:
        raise misfit("classes", output, y, NEEDS)
    if y.is_floating_point():
        if y.shape != output.shape:
            raise misfit("classes", output, y, NEEDS)
        return sum_rows(F.cross_entropy(output, y, reduction="none"))
    if y.shape != (output.shape[0], *output.shape[2:]):
        raise misfit("classes", output, y, NEEDS)
    return sum_rows(F.cross_entropy(output, y.long(), reduction="none"))


def probabilities(output: Tensors) -> Tensor:
    """Return softmax(output) over dimension 1."""
    return require_tensor("classes", output).softmax(1)


def root(output: Tensors, y: Tensors) -> Tensor:
    """Return sqrt(diag p) - p sqrt(p)^T of each entry, whose R R^T is diag p - p p^T; entries of class -100 have 0."""
    log_p = require_tensor("classes", output).log_softmax(1).movedim(1, -1)  # (n, ..., classes)
    p, root = log_p.exp(), (0.5 * log_p).exp()
    own = root.diag_embed() - p[..., None] * root[..., None, :]
    if isinstance(y, Tensor) and not y.is_floating_point():
        own = torch.where((y == IGNORED_CLASS)[..., None, None], 0.0, own)
    if own.ndim == 3:
        return own
    n, classes = len(own), own.shape[-1]
    entries = own.reshape(n, -1, classes, classes)
    apart = torch.eye(entries.shape[1]).to(own)[None, :, None, :, None] * entries[:, :, :, None, :]
    return apart.reshape(*p.shape, -1).movedim(-2, 1)


def pool(outputs: Tensors, weights: Tensor) -> Tensor:
    """Return log sum_s w_s softmax(output_s), the logits of the mixture."""
    outputs = require_tensor("classes", outputs)
    some = weights > 0  # The logarithm of 0 would give NaN as the gradient of a weight.
    log_weights = torch.where(some, weights.where(some, 1).log(), -torch.inf).to(outputs.dtype)
    return torch.logsumexp(log_weights.reshape(-1, *[1] * (outputs.ndim - 1)) + outputs.log_softmax(2), 0)


def example(n: int) -> tuple[Tensors, Tensors]:
    """Return n rows of three logits, and classes."""
    random = torch.Generator().manual_seed(0)
    output = 2 * torch.randn(n, 3, generator=random, dtype=torch.float64)
    return output, torch.randint(3, (n,), generator=random)
