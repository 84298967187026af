"""Arithmetic on trees: nested named tuples and dicts of tensors."""

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Tree = TypeVar("Tree")


def add(left: Tree, right: Tree) -> Tree:
    """Return left + right, leaf by leaf."""
    total: Tree = tree_map(torch.add, left, right)
    return total


def scale(tree: Tree, factor: float) -> Tree:
    """Return factor * tree, leaf by leaf."""
    scaled: Tree = tree_map(lambda leaf: leaf * factor, tree)
    return scaled


def zeros(tree: Tree) -> Tree:
    """Return a tree of zeros with the shapes, dtypes and devices of ``tree``."""
    nothing: Tree = tree_map(torch.zeros_like, tree)
    return nothing


def norm(tree: Any) -> Tensor:
    """Return the Euclidean norm over all leaves of ``tree``, a scalar in float64."""
    squares = [leaf.detach().double().square().sum() for leaf in tree_leaves(tree)]
    return torch.stack(squares).sum().sqrt()


def to_float64(tree: Tree) -> Tree:
    """Convert all floating-point tensors of the tree to float64; leave everything else unchanged."""
    wide: Tree = tree_map(
        lambda leaf: leaf.double() if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf, tree
    )
    return wide
