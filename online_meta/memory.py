"""How much memory tensors hold, exact to the byte and the same on every machine."""

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves


class MemoryMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage made while it is on; ``peak`` is the most that lived at once.

    It sees what lies below ``torch.func`` and autograd, so saved tensors and functorch's wrappers count too;
    it does not see into compiled programs.
    """

    def __init__(self) -> None:
        """Begin with nothing alive."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bound = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; count what it made."""
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                _, before = self._live.get(storage._cdata, (None, 0))
                self._live[storage._cdata] = (weak, storage.nbytes())
                self._bound += storage.nbytes() - before
        # What has died is looked for only where it matters: the sum with the dead among them is a bound.
        if self._bound > self.peak:
            self._live = {key: kept for key, kept in self._live.items() if not kept[0].expired()}  # type: ignore[no-untyped-call]
            self._bound = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._bound)
        return result


def peak_bytes(work: Callable[[], Any]) -> int:
    """Run ``work``; return the most bytes that the tensors it made held at once."""
    meter = MemoryMeter()
    with meter:
        work()
    return meter.peak


def bytes_of(tree: Any) -> int:
    """Return how many bytes the tensors of a nest of them hold."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree))
