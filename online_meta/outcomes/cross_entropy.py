"""The cross-entropy of classes, averaged over all entries as ``F.cross_entropy`` does."""

from typing import Any

from torch.nn import functional as F

from online_meta.outcomes._classes import example, nll, pool, probabilities, root
from online_meta.types import Outcome


def build() -> Outcome:
    """Return ``F.cross_entropy`` of logits (n, classes, ...) and classes (n, ...), or probabilities of classes.

    The loss is the mean over all entries without those of class -100. Several outputs are pooled: the probabilities of
    each entry are averaged. For one class a row this is the likelihood of the mixture, as ``categorical`` has it.
    """
    loss: Any = F.cross_entropy  # which takes tensors only
    return Outcome(nll, probabilities, probabilities=probabilities, loss=loss, pool=pool, root=root)


__all__ = ["build", "example"]
