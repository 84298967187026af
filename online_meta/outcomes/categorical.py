"""One of several classes, with the softmax of the output as their probabilities."""

from torch import Tensor

from online_meta.functional.classes import count_entries
from online_meta.outcomes._classes import example, nll, probabilities, root
from online_meta.types import Outcome, Tensors


def build() -> Outcome:
    """Return p(y) = softmax(output)[y] for logits (n, classes, ...) and classes (n, ...), or probabilities of classes.

    A row may have several entries, such as pixels, which are independent given the output: their nll is summed. Entries
    of class -100 add nothing, and rows without others are left out of the mean. Several outputs are mixed row by row:
    they are several beliefs about a whole row, not about each entry.
    """
    return Outcome(nll, probabilities, probabilities=probabilities, loss=_loss, root=root)


def _loss(output: Tensors, y: Tensors) -> Tensor:
    rows, entries = nll(output, y), count_entries(y)
    return rows.mean() if entries is None else rows.sum() / (entries > 0).sum()


__all__ = ["build", "example"]
