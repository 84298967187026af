"""Activation checkpointing for derivatives of any order: store a block's inputs and recompute its activations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from online_meta.functional.autodiff import is_transformed
from online_meta.functional.double_backward import math_attention
from online_meta.functional.randomness import capture_generator_state
from online_meta.functional.stateless import DeferredWeight
from online_meta.registry import nearest

Function = Callable[..., tuple[Tensor, ...]]


ONE_BY_ONE = "a model with recompute runs task by task (batching = 'loop'), not under vmap or torch.func"


def _do_nothing() -> None: ...


def recompute_on_backward(
    function: Function, *, random: bool = False, release: Callable[[], None] = _do_nothing
) -> Function:
    """Return ``function`` (tensors -> a tuple of tensors) with an autograd graph that stores only its inputs.

    The backward pass recomputes the activations (Chen et al., 2016, arXiv:1604.06174). The derivative, (x, v) ->
    v^T df/dx, is checkpointed in the same way, so the graph of an inner step that is differentiated again stores inputs
    and cotangents only; ``torch.utils.checkpoint`` would store the activations there.

    Args:
        function: a pure function; everything that is differentiated must be an argument.
        random: whether it draws random numbers; they are the same when it is recomputed.
        release: is called after each computation of the function or of a derivative of it.

    Returns:
        A function of the same tensors. It raises ``RuntimeError`` under ``torch.func`` if gradients are enabled.
    """

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return _released(release, function)(*tensors)
        if is_transformed():
            raise RuntimeError(ONE_BY_ONE)
        devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.is_cuda})
        again: Callable[[], AbstractContextManager[None]] = capture_generator_state(devices) if random else nullcontext
        return _apply(function, partial(_call_in_context, again, function), release, tensors)

    return call


def _call_in_context(context: Callable[[], AbstractContextManager[None]], function: Function, *tensors: Tensor) -> Any:
    with context():
        return function(*tensors)


def _released(release: Callable[[], None], function: Function) -> Function:
    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        try:
            return function(*tensors)
        finally:
            release()

    return call


def _apply(
    function: Function, again: Function, release: Callable[[], None], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = _Recomputed.apply(function, again, release, *tensors)  # type: ignore[no-untyped-call]
    return outputs


class _Recomputed(torch.autograd.Function):
    """Calls ``function`` in the forward pass and differentiates ``again`` in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, function: Function, again: Function, release: Callable[[], None], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.again, ctx.release = again, release
        ctx.save_for_backward(*tensors)
        return _released(release, function)(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        pull = partial(_pull, ctx.again, len(inputs), [i for i, need in enumerate(needed) if need])
        given = (*inputs, *cotangents)
        differentiated = torch.is_grad_enabled()
        found = _apply(pull, pull, ctx.release, given) if differentiated else _released(ctx.release, pull)(*given)
        grads = iter(found)
        return None, None, None, *(next(grads) if need else None for need in needed)


def _pull(function: Function, count: int, wanted: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return cotangents^T d function / d input for the inputs ``wanted``.

    ``tensors`` are ``count`` inputs, then one cotangent for each output.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # If this call is itself differentiated, inputs stay in the outer graph; otherwise each becomes a new leaf.
        inputs = [
            value if again and value.requires_grad else value.detach().requires_grad_(i in wanted)
            for i, value in enumerate(tensors[:count])
        ]
        pairs = zip(function(*inputs), tensors[count:], strict=True)
        ends = [(output, cotangent) for output, cotangent in pairs if output.requires_grad]
        if not ends:
            return tuple(torch.zeros_like(inputs[i]) for i in wanted)
        outputs, cotangents = zip(*ends, strict=True)
        return torch.autograd.grad(
            outputs,
            [inputs[i] for i in wanted],
            cotangents,
            create_graph=again,
            allow_unused=True,
            materialize_grads=True,
        )


def recompute_blocks(
    skeleton: nn.Module,
    globs: Sequence[str],
    *,
    random: bool = False,
    release: Callable[[str], None] = lambda name: None,
) -> None:
    """Make the submodules of ``skeleton`` whose names match ``globs`` use ``recompute_on_backward``; edits it in place.

    ``random`` says whether they may draw random numbers. ``release`` is called with the name of a submodule after each
    computation of it or of its derivatives. Raises ``ValueError`` if a glob matches no submodule.
    """
    for name in select_blocks(skeleton, globs):
        block = skeleton.get_submodule(name)
        block.forward = _RecomputedBlock(name, block, block.forward, random, partial(release, name))


def select_blocks(skeleton: nn.Module, globs: Sequence[str]) -> list[str]:
    """Return the names of the submodules that match ``globs``.

    If a module and its submodules match, only the module counts: ("body.*",) selects the blocks of ``body``. Raises
    ``ValueError`` if a glob matches no submodule.
    """
    names = [name for name, _ in skeleton.named_modules() if name]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"recompute = {glob!r} matches none of the model's layers: {nearest(glob, names)}")
    return [*_outermost(names, globs)]


def _outermost(names: Sequence[str], globs: Sequence[str]) -> Iterator[str]:
    chosen = ""
    for name in names:  # A module comes before its submodules.
        within = chosen and name.startswith(f"{chosen}.")
        if not within and any(fnmatchcase(name, glob) for glob in globs):
            chosen = name
            yield name


class _RecomputedBlock:
    """The forward of a recomputed block: passes the block's weights as arguments of a pure function.

    The function fetches deferred weights itself, so that no graph holds them.
    """

    def __init__(
        self, name: str, block: nn.Module, original: Callable[..., Any], random: bool, release: Callable[[], None]
    ) -> None:
        self._name, self._random, self._release = name, random, release
        self._original = _OriginalForward(block, original)
        self._weights = [name for name, _ in self._original.named_parameters()]  # tied weights once, as in the skeleton

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = dict(self._original.named_parameters(remove_duplicate=False))
        deferred = {n: weight for n in self._weights if isinstance(weight := here[n], DeferredWeight)}
        if deferred and is_transformed():  # A program of such a call would hold what is fetched.
            raise RuntimeError(ONE_BY_ONE)
        given_names = [name for name in self._weights if name not in deferred]
        buffers = dict(self._original.named_buffers())
        leaves, structure = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if _is_differentiable(leaf)]
        constants = [None if _is_differentiable(leaf) else leaf for leaf in leaves]  # holds no tensor with a graph
        structures: list[_OutputStructure] = []

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            state = dict(zip(given_names, tensors[len(places) :], strict=True))
            state |= {name: weight.fetch() for name, weight in deferred.items()}
            given = [*constants]
            for place, tensor in zip(places, tensors, strict=False):
                given[place] = tensor
            args, kwargs = tree_unflatten(given, structure)
            with math_attention():
                output = functional_call(self._original, {**buffers, **state}, args, kwargs)
            outputs, shape = _split_output(output, self._name)
            if not structures:
                structures.append(shape)
            return outputs

        inputs = [leaves[place] for place in places]
        checkpointed = recompute_on_backward(function, random=self._random, release=self._release)
        outputs = checkpointed(*inputs, *(here[name] for name in given_names))
        return _join_output(outputs, structures[0])


class _OriginalForward(nn.Module):
    """Calls the forward that a block had before it was replaced, without running the block's hooks a second time."""

    def __init__(self, block: nn.Module, original: Callable[..., Any]) -> None:
        super().__init__()
        self.block = block
        self._original_forward = original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._original_forward(*args, **kwargs)


class _OutputStructure(NamedTuple):
    """The tree structure of a block's output, and those leaves that are not floating-point tensors."""

    structure: Any
    leaves: list[Any]


def _is_differentiable(leaf: Any) -> bool:
    """Return whether a leaf is a floating-point tensor, which can have a gradient."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _split_output(output: Any, name: str) -> tuple[tuple[Tensor, ...], _OutputStructure]:
    leaves, structure = tree_flatten(output)
    tensors = tuple(leaf for leaf in leaves if _is_differentiable(leaf))
    if not tensors or any(isinstance(leaf, Tensor) and not _is_differentiable(leaf) for leaf in leaves):
        raise TypeError(f"recompute: the layer {name!r} returns an integer tensor or no tensor; leave it out")
    return tensors, _OutputStructure(structure, [None if _is_differentiable(leaf) else (leaf,) for leaf in leaves])


def _join_output(outputs: Sequence[Tensor], shape: _OutputStructure) -> Any:
    following = iter(outputs)
    return tree_unflatten([next(following) if leaf is None else leaf[0] for leaf in shape.leaves], shape.structure)
