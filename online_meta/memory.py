"""Measure the memory of tensors in bytes, and count operations, independently of the machine."""

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves


class MemoryMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage allocated while it is active; ``peak`` is the largest number alive at once.

    It works below ``torch.func`` and autograd, so it counts saved tensors and functorch's wrappers too. It does not
    see inside compiled programs.
    """

    def __init__(self) -> None:
        """Start with a peak of 0 bytes."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bound = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; count the storages that it allocated."""
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                _, before = self._live.get(storage._cdata, (None, 0))
                self._live[storage._cdata] = (weak, storage.nbytes())
                self._bound += storage.nbytes() - before
        # Freed storages are searched only if needed: the sum that includes them is an upper bound.
        if self._bound > self.peak:
            self._live = {key: kept for key, kept in self._live.items() if not kept[0].expired()}  # type: ignore[no-untyped-call]
            self._bound = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._bound)
        return result


def peak_bytes(work: Callable[[], Any]) -> int:
    """Run ``work``; return the peak memory of the tensors it allocated, in bytes."""
    meter = MemoryMeter()
    with meter:
        work()
    return meter.peak


def bytes_of(tree: Any) -> int:
    """Return the memory of all tensors in a tree, in bytes."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree))


def count_operations(work: Callable[[], Any]) -> int:
    """Run ``work``; return the number of tensor operations it executed."""
    counter = _Counter()
    with counter:
        work()
    return counter.count


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
