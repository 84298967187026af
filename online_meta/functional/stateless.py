"""Call a module with tensors in place of its own: what the call needs is captured once, when the loss is made."""

import copy
import threading
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._pytree import tree_iter

from online_meta.batches import first_tensor
from online_meta.functional.calling import Arguments, read_arguments
from online_meta.memory import bytes_of
from online_meta.types import LossFn, Params, Tensors


class KeptWeights(NamedTuple):
    """Frozen weights that something else keeps, such as a file that is mapped into memory; they are not copied.

    Attributes:
        tensors: by name.
        release: is called with names after their layer was computed; it may drop from memory what can be read again.
        store: takes other tensors by name, one by one, and returns them as they are kept for a while.
    """

    tensors: Params
    release: Callable[[Collection[str]], None]
    store: Callable[[Iterable[tuple[str, Tensor]]], Params]


NOT_KEPT = KeptWeights({}, lambda names: None, dict)
"""All frozen weights are copied."""


class DeferredWeight(Tensor):
    """Stands for a frozen weight until its layer is computed, with the shape, device and dtype of what ``fetch`` gives.

    It holds one number, so whatever computes with it raises ``ValueError``.
    """

    source: Tensor

    @staticmethod
    def make(source: Tensor, device: torch.device, dtype: torch.dtype) -> "DeferredWeight":
        """Return what stands for ``source`` on a device, in a dtype."""
        like = torch.zeros((), dtype=dtype, device=device).expand(source.shape)
        made: DeferredWeight = Tensor._make_subclass(DeferredWeight, like)
        made.source = source
        return made

    def fetch(self) -> Tensor:
        """Return the weight: the source itself, or a copy if device or dtype differ."""
        return self.source.to(self.device, self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return what ``func`` says about the weight. Raise ``ValueError`` if it computes a tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_iter(result)):
            raise ValueError(
                "a frozen weight that is read layer by layer is used outside of its layer: let recompute match the "
                "layer that uses it, or not the one that it belongs to"
            )
        return result


class ModuleTensors(NamedTuple):
    """The tensors of a module by name.

    Attributes:
        learned: shape and dtype of each weight that is learned.
        aliases: further names of tied weights, with the name that ``named_parameters`` lists.
        frozen: names of the weights with ``requires_grad`` false.
        buffers: names of the buffers, shared ones under each of their names.
        constants: copies of the buffers and of the frozen weights, except for those that are ``kept``.
        widened: the frozen weights in float64 by device, while ``widen_once`` keeps them.
        kept: the frozen weights that something else keeps.
        deferred: by layer, names of kept weights that the layer fetches itself.
    """

    learned: dict[str, tuple[torch.Size, torch.dtype]]
    aliases: dict[str, str]
    frozen: frozenset[str]
    buffers: frozenset[str]
    constants: Params
    widened: dict[torch.device, Params]
    kept: KeptWeights = NOT_KEPT
    deferred: Mapping[str, frozenset[str]] = types.MappingProxyType({})

    def defer(self, layers: Collection[str]) -> "ModuleTensors":
        """Return the same tensors, of which ``layers`` fetch the kept weights that nothing else uses."""
        owners = {name: _find_owner(name, layers) for name in (*self.kept.tensors, *self.aliases)}
        shared = {listed for name, listed in self.aliases.items() if not owners[name]}
        own = {name: owners[name] for name in self.kept.tensors if owners[name] and name not in shared}
        return self._replace(deferred={at: frozenset(n for n in own if own[n] == at) for at in layers})

    @property
    def held_bytes(self) -> int:
        """The memory of buffers and frozen weights: of those that layers fetch, the largest layer's alone."""
        fetched = {name for names in self.deferred.values() for name in names}
        held = bytes_of([value for name, value in self.constants.items() if name not in fetched])
        return held + max((bytes_of([self.constants[n] for n in names]) for names in self.deferred.values()), default=0)


def _find_owner(name: str, layers: Collection[str]) -> str:
    return next((layer for layer in layers if name.startswith(f"{layer}.")), "")


def capture_tensors(module: nn.Module, kept: KeptWeights = NOT_KEPT) -> ModuleTensors:
    """Copy the buffers and frozen weights of ``module`` but those ``kept``; record what its learned weights are.

    Raises ``ValueError`` for a lazy module whose weights have no shape yet, and for one of ``torch.jit``.
    """
    scripted = [name for name, layer in module.named_modules() if isinstance(layer, torch.jit.ScriptModule)]
    if scripted:
        raise ValueError(
            f"{f'the layer {scripted[0]!r}' if scripted[0] else 'the model'} is a module of torch.jit, which cannot be "
            "called with other weights: make the loss of the Python module that it was made from"
        )
    named = dict(module.named_parameters())
    lazy = [name for name, value in (*named.items(), *module.named_buffers()) if isinstance(value, UNINITIALIZED)]
    if lazy:
        raise ValueError(f"{', '.join(lazy)} of the model have no shape yet: call the model once on an input first")
    listed = {id(weight): name for name, weight in named.items()}
    every = module.named_parameters(remove_duplicate=False)
    frozen = {name: weight for name, weight in named.items() if not weight.requires_grad}
    with torch.inference_mode(False), torch.no_grad():
        copied = {n: v.detach().clone() for n, v in (*module.named_buffers(), *frozen.items()) if n not in kept.tensors}
    return ModuleTensors(
        {name: (weight.shape, weight.dtype) for name, weight in named.items() if name not in frozen},
        {name: listed[id(weight)] for name, weight in every if listed[id(weight)] != name},
        frozenset(frozen),
        frozenset(name for name, _ in module.named_buffers(remove_duplicate=False)),
        copied | kept.tensors,
        {},
        kept,
    )


UNINITIALIZED = (UninitializedParameter, UninitializedBuffer)


def check_names(tensors: ModuleTensors, params: Params) -> None:
    """Raise ``ValueError`` if a learned weight is missing in ``params``, or a name is none of the model's weights."""
    learned = tensors.learned.keys()
    if params.keys() == learned:
        return
    others = tensors.frozen | tensors.aliases.keys()
    lacks, unknown = sorted(learned - params.keys()), sorted(params.keys() - learned - others)
    if lacks or unknown:
        raise ValueError(f"these are not the model's parameters: {lacks} are missing, {unknown} are unknown")


def select_learned(tensors: ModuleTensors, weights: Params) -> Params:
    """Return those of ``weights`` that are learned, each tied weight under one name.

    Raises ``ValueError`` for names that are none of the model's weights, such as those of buffers in a ``state_dict``;
    for names that are missing; for other shapes; and for frozen or tied weights with other values than the model's.
    """
    buffers = sorted(weights.keys() & tensors.buffers)
    if buffers:
        raise ValueError(
            f"{', '.join(buffers)} are buffers, not weights; the loss has captured them: "
            "pass dict(module.named_parameters()), not module.state_dict()"
        )
    named: Params = {}
    for name, value in weights.items():
        known = named.setdefault(tensors.aliases.get(name, name), value)
        if known is not value and not _is_same(known, value):
            raise ValueError(f"{name} is tied to {tensors.aliases.get(name, name)}, but their values differ")
    check_names(tensors, named)
    for name, (shape, _) in tensors.learned.items():
        if named[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(named[name].shape)}; the model's has {tuple(shape)}")
    other = [n for n in tensors.frozen & named.keys() if not _is_same(named[n], tensors.constants[n])]
    if other:
        raise ValueError(
            f"the frozen weights {', '.join(sorted(other))} differ from those that the loss has captured: load them "
            "into the model before the loss is made"
        )
    return {name: named[name] for name in named if name in tensors.learned}


def _is_same(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    return left.is_set_to(right) or torch.equal(left.detach().to(right), right.detach())  # The same memory is not read.


def place_constants(tensors: ModuleTensors, params: Params, x: Tensors) -> Params:
    """Return the constants on the device of ``x``, each in its own dtype.

    Only if all learned weights are given in another dtype than the module's, as ``Module.to(dtype)`` would do, do the
    constants of the learned weights' dtype follow them; all do if that dtype is float64.
    """
    constants = tensors.constants
    if not constants:
        return {}
    device = first_tensor(x).device
    learned = tensors.learned.items()
    deferred = {name for names in tensors.deferred.values() for name in names}
    dtypes = {name: value.dtype for name, value in constants.items()}
    given = {params[name].dtype for name, _ in learned if name in params and params[name].is_floating_point()}
    own = {dtype for _, (_, dtype) in learned}
    widened: Params = {}
    same = all(name not in params or params[name].dtype is dtype for name, (_, dtype) in learned)
    if not (same or len(given) != 1 or given <= own):
        (target,) = given
        dtypes = {name: _moved_dtype(dtype, own, target) for name, dtype in dtypes.items()}
        widened = tensors.widened.get(device, {}) if target is torch.float64 else {}
    return {
        name: widened[name] if name in widened else _place(value, device, dtypes[name], name in deferred)
        for name, value in constants.items()
    }


def _place(value: Tensor, device: torch.device, dtype: torch.dtype, deferred: bool) -> Tensor:
    return DeferredWeight.make(value, device, dtype) if deferred else value.to(device, dtype)


@contextmanager
def widen_once(loss: LossFn, x: Tensors) -> Iterator[None]:
    """Keep the frozen weights of a loss in float64 on the device of ``x``, so that not each call converts them."""
    tensors = getattr(loss, "tensors", None)
    if not isinstance(tensors, ModuleTensors):
        yield
        return
    device, own = first_tensor(x).device, {dtype for _, dtype in tensors.learned.values()}

    def widen(names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            value = tensors.constants[name]
            yield name, value.to(device, _moved_dtype(value.dtype, own, torch.float64))

    kept = tensors.kept.tensors.keys()
    with torch.inference_mode(False), torch.no_grad():
        tensors.widened[device] = dict(widen(tensors.frozen - kept))
        if device.type == "cpu":  # On another device, layers fetch them.
            tensors.widened[device] |= tensors.kept.store(widen(kept))
    try:
        yield
    finally:
        tensors.widened.pop(device, None)


def _moved_dtype(dtype: torch.dtype, own: set[torch.dtype], target: torch.dtype) -> torch.dtype:
    if dtype.is_complex and target is torch.float64:
        return torch.complex128
    moves = dtype.is_floating_point and (dtype in own or target is torch.float64)
    return target if moves else dtype


def copy_without_weights(module: nn.Module) -> nn.Module | None:
    """Return a copy on the meta device that keeps tied weights tied; None if there is no faithful copy.

    There is none of a module that ``copy.deepcopy`` refuses (a lock, a tensor with a graph), or whose copy still refers
    to the original, as a lambda or a hook that uses ``self`` does: the copy would compute with the original's weights.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
    memo |= {id(b): b.to("meta") for b in module.buffers()}
    originals = {id(part) for part in (*module.modules(), *module.parameters(), *module.buffers())}
    try:
        skeleton = _without_compiler(copy.deepcopy(module, memo))
        if _refers_to(skeleton, originals):
            return None
    except Exception:  # Any object in a module may refuse to be copied or looked at, each in its own way.
        return None
    for layer in skeleton.modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            layer.sparse = False  # The same gradient, in the layout that inner steps and optimizers take.
    return skeleton


class Uncompiled(nn.Module):
    """Stands in for a module of ``torch.compile``, whose programs have no second derivative; keeps its names."""

    def __init__(self, compiled: nn.Module) -> None:
        """Take the module that was compiled."""
        super().__init__()
        self._orig_mod = compiled.get_submodule("_orig_mod")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it without compiling."""
        return self._orig_mod(*args, **kwargs)


def is_compiled(layer: nn.Module) -> bool:
    """Return whether a layer is a module of ``torch.compile``."""
    return type(layer).__name__ == "OptimizedModule"  # importing its class takes a second


def _without_compiler(skeleton: nn.Module) -> nn.Module:
    """Return ``skeleton`` with the modules of ``torch.compile`` replaced by what they compile; edits it in place."""
    for name, layer in [*skeleton.named_modules()]:
        if name and is_compiled(layer):
            parent, _, own = name.rpartition(".")
            setattr(skeleton.get_submodule(parent), own, Uncompiled(layer))
    return Uncompiled(skeleton) if is_compiled(skeleton) else skeleton


def _refers_to(root: nn.Module, wanted: set[int]) -> bool:
    """Return whether any of the objects ``wanted`` (by id) can be reached from ``root`` in a usual way."""
    waiting, seen = [root], set[int]()
    while waiting:
        found: Any = waiting.pop()
        if id(found) in wanted:
            return True
        if id(found) not in seen:
            seen.add(id(found))
            waiting += _referents(found)
    return False


def _referents(found: Any) -> Iterator[Any]:
    if isinstance(found, dict):
        yield from found.values()
    elif isinstance(found, list | tuple | set | frozenset):
        yield from found
    elif isinstance(found, types.FunctionType):
        yield from _cell_contents(found)
        yield from (*(found.__defaults__ or ()), *(found.__kwdefaults__ or {}).values(), *vars(found).values())
        # Of a function's globals, only what may be a part of the model counts.
        named = (found.__globals__.get(name) for name in found.__code__.co_names)
        yield from (one for one in named if isinstance(one, nn.Module | Tensor))
    elif isinstance(found, types.MethodType):
        yield from (found.__self__, found.__func__)
    elif isinstance(found, partial):
        yield from (found.func, found.args, found.keywords)
    elif isinstance(found, weakref.ref):
        yield found()
    elif isinstance(found, weakref.ProxyTypes):
        yield getattr(getattr(found, "forward", None), "__self__", None)
    elif not isinstance(found, type | types.ModuleType | Tensor) and hasattr(found, "__dict__"):
        yield from vars(found).values()


def _cell_contents(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # an empty cell
            continue


class ModuleItself:
    """Calls the user's own module with given tensors, in the modes it had when this was made; leaves it unchanged.

    It is the reference that a copy is compared with, and stands in where there is no copy. One thread at a time calls
    it, because ``functional_call`` writes into the module. Attributes that ``forward`` sets are restored.
    """

    def __init__(self, module: nn.Module, *, evaluate: bool = False, keep: bool = True) -> None:
        """Remember the modes (evaluation if ``evaluate``); hold the module itself only to ``keep`` it alive."""
        self._module = weakref.ref(module)
        self._kept = module if keep else None
        self._training = {name: layer.training and not evaluate for name, layer in module.named_modules()}
        self._arguments = read_arguments(module)
        self._lock = threading.RLock()

    @property
    def exists(self) -> bool:
        """Whether the module is still alive."""
        return self._module() is not None

    def __call__(self, state: Params, x: Tensors) -> Any:
        """Return module(x) with the tensors ``state``, by name. Raises ``ReferenceError`` if the module is gone."""
        module = self._module()
        if module is None:
            raise ReferenceError("the module no longer exists")
        compiled = any(map(is_compiled, module.modules()))
        with self._lock, torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            before = [(layer, dict(vars(layer))) for layer in module.modules()]
            try:
                for name, layer in module.named_modules():
                    layer.training = self._training.get(name, layer.training)
                result = functional_call(module, state, *self._arguments.arrange(x))
            finally:
                for layer, attributes in before:
                    _restore(vars(layer), attributes)
        return result


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    for name in attributes.keys() - before.keys():
        del attributes[name]
    for name, value in before.items():
        if attributes.get(name, attributes) is not value:
            attributes[name] = value


class SkeletonPerThread(threading.local):
    """One skeleton per thread, because ``functional_call`` writes the parameters into the module while it runs."""

    def __init__(self, skeleton: nn.Module, prepare: Callable[[nn.Module], None], arguments: Arguments) -> None:
        """Copy ``skeleton`` in each thread that uses it, and ``prepare`` the copy; copies share the (empty) tensors.

        ``arguments`` are those of its ``forward``.
        """
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*skeleton.parameters(), *skeleton.buffers())}
        self.skeleton = copy.deepcopy(skeleton, shared)
        prepare(self.skeleton)
        self._arguments = arguments

    def __call__(self, state: Params, x: Tensors) -> Any:
        """Return what the skeleton returns for x with the tensors ``state``, by name."""
        return functional_call(self.skeleton, state, *self._arguments.arrange(x))
