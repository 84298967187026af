"""Tensors laid aside in the memory of the host while a GPU works on others."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from online_meta.differentiate import is_transformed

Tree = TypeVar("Tree")


def offload_to_host(tree: Tree) -> Callable[[], Tree]:
    """Copy a tree's tensors to pinned memory of the host; return what brings them back to where they were.

    Both ways are copies to the bit in the order of the device's stream, for which nobody waits. Tensors on a CPU stay
    what they are. Raises ``RuntimeError`` under ``torch.func`` for others.
    """
    devices = tree_map(lambda leaf: leaf.device, tree)
    host = tree_map(_to_host, tree)

    def restore() -> Tree:
        found: Tree = tree_map(lambda leaf, device: leaf.to(device, non_blocking=True), host, devices)
        return found

    return restore


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    if is_transformed():
        raise RuntimeError("exact(..., offload=True) goes task by task (how = 'loop'), not under vmap or torch.func")
    pinned = tensor.device.type == "cuda"
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor, non_blocking=pinned)
