"""See from outside what a model does as it runs: its layers' calls, and the operations that break derivatives."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from online_meta.types import Params


class Called(NamedTuple):
    """One call of a layer: its name, and all that is needed to make the call again."""

    name: str
    layer: nn.Module
    given: tuple[Any, ...]
    options: dict[str, Any]
    state: Params
    buffers: Params


class Watch(TorchFunctionMode):
    """What was seen: layers by name, their calls in the order in which they ended, and operations by layer.

    ``edited`` names buffers that a call changed, ``again`` layers that were called while ``going_back`` was set,
    ``dtypes`` are those of the layers' outputs, ``warnings`` what Python's warnings said.
    """

    def __init__(self) -> None:
        """Begin with nothing seen."""
        super().__init__()
        self.layers: dict[str, nn.Module] = {}
        self.calls: list[Called] = []
        self.operations: list[tuple[str, str | None]] = []
        self.edited: list[str] = []
        self.going_back = False
        self.again: list[str] = []
        self.warnings: list[str] = []
        self.dtypes: set[torch.dtype] = set()
        self._names: dict[int, str] = {}
        self._inside: list[nn.Module] = []
        self._buffers: Params = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the name of the operation and of the layer that it stands in."""
        name = getattr(function, "__name__", "")
        if name == "__get__":  # of a property, such as Tensor.data
            name = getattr(getattr(function, "__self__", None), "__name__", name)
        switched_on = name == "_set_grad_enabled" and args and args[0]
        if not switched_on:
            self.operations.append((name, self._here()))
        return function(*args, **(kwargs or {}))

    def enter(self, layer: nn.Module) -> None:
        """A layer is called."""
        if not self._inside and id(layer) not in self._names:  # one that is known is run again, by checkpointing
            self._names |= {id(one): name for name, one in layer.named_modules()}
            self.layers = {**dict(layer.named_modules()), **self.layers}
            self._buffers = _copied(dict(layer.named_buffers()))
        if self.going_back:
            self.again.append(self._names.get(id(layer), ""))
        self._inside.append(layer)

    def leave(self, layer: nn.Module, given: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        """A layer's call has ended, or failed."""
        self.dtypes |= {leaf.dtype for leaf in tree_leaves(output) if isinstance(leaf, Tensor)}
        name = self._here() or ""
        self._inside.pop()
        state, buffers = _copied((dict(layer.named_parameters()), dict(layer.named_buffers())))
        given, options = _copied((given, options))
        self.calls.append(Called(name, layer, given, options, state, buffers))
        if not (self._inside or self.going_back):
            with torch._C.DisableTorchFunction():
                self.edited += [n for n, was in self._buffers.items() if not torch.equal(was, buffers[n])]

    def _here(self) -> str | None:
        return self._names.get(id(self._inside[-1]), "") if self._inside else None

    def called(self, name: str) -> str:
        """Return how to speak of a layer: by its name and its class."""
        kind = type(self.layers[name]).__name__
        return f"the layer {name!r} ({kind})" if name else f"the model itself ({kind})"

    def places(self, matches: Callable[[str], bool]) -> dict[str, list[str]]:
        """Return the operations whose names match, each once, by the layer that they stand in."""
        found: dict[str, list[str]] = {}
        for operation, place in self.operations:
            if place is not None and matches(operation) and operation not in found.setdefault(place, []):
                found[place].append(operation)
        return {place: sorted(operations) for place, operations in found.items() if operations}


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch every layer and operation that this thread runs; what it computes stays as it is."""
    watch, thread = Watch(), threading.get_ident()

    def mine(see: Callable[..., None]) -> Callable[..., None]:
        return lambda *seen: see(*seen) if threading.get_ident() == thread else None

    before = register_module_forward_pre_hook(mine(lambda layer, given: watch.enter(layer)))
    after = register_module_forward_hook(
        mine(lambda layer, given, options, output: watch.leave(layer, given, options, output)),
        with_kwargs=True,
        always_call=True,
    )
    try:
        with watch, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            yield watch
    finally:
        watch.warnings += [str(warning.message) for warning in told]
        before.remove()
        after.remove()


def _copied(tree: Any) -> Any:
    with torch._C.DisableTorchFunction(), torch.no_grad():
        return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)
