"""Arithmetic on trees: nested named tuples and dicts of tensors."""

from collections.abc import Mapping
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


def copy_aligned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors, by name, in memory that torch has allocated.

    The last bits of a matrix product depend on where its operands start in memory. Tensors that were decoded from a
    file or a request start anywhere; those of torch start at multiples of 64 bytes.
    """
    return {name: value.clone() for name, value in tensors.items()}


def norm(tree: Any) -> Tensor:
    """Return the Euclidean norm over all leaves of ``tree``, a scalar in float64."""
    squares = [sum_of_squares(leaf.detach()) for leaf in tree_leaves(tree)]
    return torch.stack(squares).sum().sqrt()


def sum_of_squares(tensor: Tensor) -> Tensor:
    """Return the sum of the squared magnitudes of all entries, a scalar in float64."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=wide)  # It makes no copy in float64.
    return norm.square()


def to_float64(tree: Tree) -> Tree:
    """Convert all floating-point tensors of the tree to float64, complex ones to complex128; leave everything else."""

    def widen(leaf: Any) -> Any:
        if torch.is_tensor(leaf) and leaf.is_complex():
            return leaf.to(torch.complex128)
        return leaf.double() if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf

    wide: Tree = tree_map(widen, tree)
    return wide
