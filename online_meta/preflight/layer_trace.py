"""Record what a model does while it runs: the calls of its layers, and the torch operations they use."""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from online_meta.functional.guard import describe
from online_meta.types import Params


class LayerCall(NamedTuple):
    """One call of a layer: its name, and everything needed to repeat the call."""

    name: str
    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: Params
    buffers: Params


class LayerTrace(TorchFunctionMode):
    """The record of a run: layers by name, their calls in the order in which they ended, and operations by layer.

    ``modified`` has the names of buffers that a call changed, ``recomputed`` the layers called while ``in_backward``
    was set, ``dtypes`` the dtypes of the layers' outputs, ``warnings`` the messages of Python warnings, and ``unknown``
    the shapes of parameters that are in use, though no module has them, by the layer that uses them. ``in_inference``
    has the layers called under ``torch.inference_mode()``.
    """

    def __init__(self) -> None:
        """Start with an empty record."""
        super().__init__()
        self.layers: dict[str, nn.Module] = {}
        self.calls: list[LayerCall] = []
        self.operations: list[tuple[str, str | None]] = []
        self.modified: list[str] = []
        self.in_backward = False
        self.recomputed: list[str] = []
        self.warnings: list[str] = []
        self.dtypes: set[torch.dtype] = set()
        self.unknown: dict[str, list[tuple[int, ...]]] = {}
        self.in_inference: list[str] = []
        self._names: dict[int, str] = {}
        self._stack: list[nn.Module] = []
        self._buffers: Params = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record the name of the operation and of the layer that calls it."""
        name = getattr(function, "__name__", "")
        if name == "__get__":  # a property, e.g. Tensor.data
            name = getattr(getattr(function, "__self__", None), "__name__", name)
        switched_on = name == "_set_grad_enabled" and args and args[0]
        if not switched_on:
            self.operations.append((name, self._current_layer()))
        for given in args:  # The parameters of modules are replaced by other tensors while they run.
            if type(given) is nn.Parameter and given.requires_grad and not given.is_meta:
                shapes = self.unknown.setdefault(self._current_layer() or "", [])
                shapes += [tuple(given.shape)] * (tuple(given.shape) not in shapes)
        return function(*args, **(kwargs or {}))

    def on_enter(self, layer: nn.Module) -> None:
        """Record that a layer is called."""
        if not self._stack and id(layer) not in self._names:  # checkpointing calls known layers again
            self._names |= {id(one): name for name, one in layer.named_modules()}
            self.layers = {**dict(layer.named_modules()), **self.layers}
            self._buffers = _copied(dict(layer.named_buffers()))
        if torch.is_inference_mode_enabled():
            self.in_inference.append(self._names.get(id(layer), ""))
        if self.in_backward:
            self.recomputed.append(self._names.get(id(layer), ""))
        self._stack.append(layer)

    def on_exit(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Record that a layer's call has ended or failed."""
        self.dtypes |= {leaf.dtype for leaf in tree_leaves(output) if isinstance(leaf, Tensor)}
        name = self._current_layer() or ""
        self._stack.pop()
        parameters, buffers = _copied((dict(layer.named_parameters()), dict(layer.named_buffers())))
        args, kwargs = _copied((args, kwargs))
        self.calls.append(LayerCall(name, layer, args, kwargs, parameters, buffers))
        if not (self._stack or self.in_backward):
            with torch._C.DisableTorchFunction():
                self.modified += [n for n, was in self._buffers.items() if not torch.equal(was, buffers[n])]

    def _current_layer(self) -> str | None:
        return self._names.get(id(self._stack[-1]), "") if self._stack else None

    def describe_layer(self, name: str) -> str:
        """Describe a layer by its name and class."""
        return describe(name, self.layers[name])

    def operations_by_layer(self, matches: Callable[[str], bool]) -> dict[str, list[str]]:
        """Return the operations whose names match, each once and sorted, by the layer that calls them."""
        found: dict[str, list[str]] = {}
        for operation, place in self.operations:
            if place is not None and matches(operation) and operation not in found.setdefault(place, []):
                found[place].append(operation)
        return {place: sorted(operations) for place, operations in found.items() if operations}


@contextmanager
def trace_layers() -> Iterator[LayerTrace]:
    """Record every layer and operation that this thread runs within the context, without changing the results."""
    trace = LayerTrace()
    with _hooked(trace.on_enter, trace.on_exit), trace, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield trace
        finally:
            trace.warnings += [str(warning.message) for warning in caught]


@contextmanager
def _hooked(enter: Callable[[nn.Module], None], leave: Callable[..., Any]) -> Iterator[None]:
    """Call ``enter`` before and ``leave`` after every layer that this thread calls; ``leave`` may return an output."""
    thread = threading.get_ident()

    def on_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *seen: hook(*seen) if threading.get_ident() == thread else None

    before = register_module_forward_pre_hook(on_this_thread(lambda layer, args: enter(layer)))
    after = register_module_forward_hook(on_this_thread(leave), with_kwargs=True, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


class LayerCut:
    """Cuts a model at layers: collects their inputs, and replaces their floating-point outputs by given ones.

    ``inputs`` and ``outputs`` are the floating-point tensors that the layers got and gave, in the order of the calls.
    """

    def __init__(self, is_cut: Callable[[str], bool], replacements: Sequence[Tensor] | None) -> None:
        """Cut the outermost layers whose names ``is_cut`` accepts; without ``replacements``, leave the outputs."""
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self._is_cut = is_cut
        self._replacements = None if replacements is None else [*replacements]
        self._names: dict[int, str] = {}
        self._stack: list[nn.Module] = []
        self._depth: int | None = None

    def on_enter(self, layer: nn.Module) -> None:
        """Note whether the layer is one to cut."""
        if not self._stack:
            self._names |= {id(one): name for name, one in layer.named_modules()}
        if self._depth is None and self._is_cut(self._names.get(id(layer), "")):
            self._depth = len(self._stack)
        self._stack.append(layer)

    def on_exit(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return what replaces the output of a layer to cut; None to keep the output."""
        self._stack.pop()
        if self._depth != len(self._stack):
            return None
        self._depth = None
        self.inputs += filter(_is_floating, tree_leaves((args, kwargs)))
        leaves, structure = tree_flatten(output)
        self.outputs += [leaf.detach() for leaf in leaves if _is_floating(leaf)]
        if self._replacements is None:
            return None
        given = self._replacements
        return tree_unflatten([given.pop(0) if _is_floating(leaf) else leaf for leaf in leaves], structure)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


@contextmanager
def cut_layers(is_cut: Callable[[str], bool], replacements: Sequence[Tensor] | None = None) -> Iterator[LayerCut]:
    """Cut the models that this thread runs within the context; see ``LayerCut``."""
    cut = LayerCut(is_cut, replacements)
    with _hooked(cut.on_enter, cut.on_exit):
        yield cut


def _copied(tree: Any) -> Any:
    with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
        return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)
