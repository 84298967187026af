"""Random numbers as arithmetic of tensors: functions of a task, a step and a role, also under ``vmap``."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from online_meta.functional.autodiff import is_transformed
from online_meta.types import Batch, Params

Role = Literal["begin", "step", "update", "query", "posterior", "answer"]
"""What numbers are drawn for: a rule's start, the loss of a step, its update, a query loss, a belief, an answer."""

ROLES: tuple[Role, ...] = ("begin", "step", "update", "query", "posterior", "answer")

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""The constants of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014, figure 17, with Stafford's mixers)."""


@dataclass
class _Stream:
    """The numbers that one context draws: ``drawn`` of them are drawn."""

    batch: Batch
    salt: int
    drawn: int = 0
    key: Tensor | None = None


_stream: ContextVar[_Stream | None] = ContextVar("keyed stream", default=None)


@contextmanager
def keyed(batch: Batch, step: int, role: Role, seed: int = 0) -> Iterator[None]:
    """Let ``normal_like`` and ``uniform_like`` draw in this context, as a function of these arguments alone.

    Nothing is global, so threads do not wait for each other. Under ``torch.func.vmap`` each task has its own numbers.

    Args:
        batch: the samples; every bit of them counts, and their order. Samples of weight 0 do not count.
        step: the number of the inner step.
        role: what is drawn for, so that equal batches draw different numbers for different purposes.
        seed: of the run, an integer.

    Raises:
        ValueError: if ``role`` is unknown.
    """
    if role not in ROLES:
        raise ValueError(f"the role is {role!r}: it is one of {', '.join(ROLES)}")
    stream = _Stream(batch, hash_integers(seed, step, ROLES.index(role)))
    if is_transformed():  # A key of this level of transforms can be used at all deeper ones.
        stream.key = _hash_batch(stream)
    token = _stream.set(stream)
    try:
        yield
    finally:
        _stream.reset(token)


def normal_like(tensor: Tensor) -> Tensor:
    """Draw standard normal numbers in the shape, dtype and device of ``tensor``, by Box & Muller's method (1958).

    Each call in a ``keyed`` context draws further numbers. There is no gradient.

    Raises:
        RuntimeError: outside of a ``keyed`` context.
        ValueError: if the dtype is not a real floating-point one.
    """
    return _draw_normal(tensor, tensor.numel()).reshape(tensor.shape).to(tensor.dtype)


def normal_like_all(tensors: Params) -> Params:
    """Draw standard normal numbers in the shapes and dtypes of named tensors, at once, which is quicker.

    The tensors are on one device. Raises as ``normal_like`` does.
    """
    like = max(tensors.values(), key=lambda tensor: tensor.dtype.itemsize)
    ends = [*accumulate(tensor.numel() for tensor in tensors.values())]
    parts = _draw_normal(like, ends[-1]).tensor_split(ends[:-1])
    return {
        name: part.reshape(tensor.shape).to(tensor.dtype)
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }


def draw_alike(tensors: Params) -> Params:
    """Draw named tensors whose entries are normal, with the mean and the standard deviation of those of ``tensors``.

    So weights are drawn like an initialisation of a model. A tensor whose entries are all equal, such as a bias of
    zeros, stays as it is. Raises as ``normal_like`` does.
    """
    noise = normal_like_all(tensors)
    return {
        name: torch.where(like.max() > like.min(), like.mean() + like.std(correction=0) * noise[name], like)
        for name, like in tensors.items()
    }


def uniform_like(tensor: Tensor) -> Tensor:
    """Draw uniform numbers in (0, 1) in the shape, dtype and device of ``tensor``.

    They are multiples of 2^-53 in float64 and of 2^-24 otherwise; half precision rounds them. Each call in a ``keyed``
    context draws further numbers. Raises as ``normal_like`` does.
    """
    return _draw_uniform(tensor, tensor.numel()).reshape(tensor.shape).to(tensor.dtype)


def capture_keyed_state() -> Callable[[], AbstractContextManager[None]]:
    """Capture what the current context draws next; return a reusable context that starts from there."""
    stream = _stream.get()
    if stream is None:
        return nullcontext
    batch, salt, drawn, key = stream.batch, stream.salt, stream.drawn, stream.key

    @contextmanager
    def restored() -> Iterator[None]:
        token = _stream.set(_Stream(batch, salt, drawn, key))
        try:
            yield
        finally:
            _stream.reset(token)

    return restored


def hash_integers(*numbers: int) -> int:
    """Return a hash of integers, as a signed number of 64 bits."""
    found = 0
    for number in numbers:
        found = _mix_integer((found + GOLDEN_GAMMA) ^ number)
    return _signed(found)


def _draw_normal(like: Tensor, count: int) -> Tensor:
    pairs = (count + 1) // 2
    uniform = _draw_uniform(like, 2 * pairs)
    radius, angle = (-2.0 * uniform[:pairs].log()).sqrt(), (2.0 * math.pi) * uniform[pairs:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def _draw_uniform(like: Tensor, count: int) -> Tensor:
    if not like.is_floating_point():
        raise ValueError(f"random numbers of dtype {like.dtype} are not drawn: give a tensor of floating-point numbers")
    stream = _stream.get()
    if stream is None:
        raise RuntimeError(
            'numbers are drawn only while a rule or a loss is run that says so: random="keyed", or keyed(...)'
        )
    first, stream.drawn = stream.drawn + 1, stream.drawn + count
    bits = _mix(_key_of(stream).to(like.device) + _space_out(first, count, like.device))
    # An odd multiple of half the spacing is exact in the dtype, and neither 0 nor 1.
    digits, dtype = (52, torch.float64) if like.dtype == torch.float64 else (23, torch.float32)
    return (_shift_right(bits, 64 - digits).to(dtype) + 0.5) * 2.0**-digits


def _key_of(stream: _Stream) -> Tensor:
    if stream.key is not None:
        return stream.key
    key = _hash_batch(stream)
    if not is_transformed():  # A tensor of an inner level of transforms must not be kept for an outer one.
        stream.key = key
    return key


def _hash_batch(stream: _Stream) -> Tensor:
    """Return the hash of all bits of the batch and of the salt, an int64 scalar.

    Padding changes nothing: samples of weight 0 are left out, and weights of 1 are as none.
    """
    batch = stream.batch
    named = [dict(sorted(part.items())) if isinstance(part, dict) else part for part in (batch.x, batch.y)]
    leaves = [_bits_of(leaf.detach()) for leaf in tree_leaves(named)]
    if batch.weight is not None:
        return _mix(_sum_counted(leaves, batch.weight.detach()) ^ stream.salt)
    bits = torch.cat([leaf.flatten() for leaf in leaves])
    return _mix(_mix(bits + _space_out(1, len(bits), bits.device)).sum() ^ stream.salt)


def _sum_counted(leaves: list[Tensor], weight: Tensor) -> Tensor:
    """Return the sum of the mixed bits of the samples that count, as if there were no others."""
    counted = (weight != 0).to(torch.int64)
    rank, total = counted.cumsum(0) - counted, torch.zeros((), dtype=torch.int64, device=weight.device)
    first = total + 1
    shares = [(leaf.flatten(1) if leaf.ndim > 1 else leaf[:, None], counted) for leaf in leaves]
    shares.append((_bits_of(weight)[:, None], counted * (weight != 1)))
    for bits, counts in shares:
        width = bits.shape[1]
        places = first + rank[:, None] * width + torch.arange(width, device=bits.device)
        total = total + (_mix(bits + places * _signed(GOLDEN_GAMMA)) * counts[:, None]).sum()
        first = first + counted.sum() * width
    return total


def _bits_of(tensor: Tensor) -> Tensor:
    """Return the bits of each entry as int64."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point():
        return tensor.to(torch.int64)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.dtype.itemsize]).to(torch.int64)


def _space_out(first: int, count: int, device: torch.device) -> Tensor:
    """Return ``first``, ..., ``first + count - 1`` times the golden gamma, modulo 2^64."""
    # The compiler computes the multiples of an arange exactly, and fails if they exceed 64 bits. ^ 0 stops this.
    return (torch.arange(first, first + count, device=device) ^ 0) * _signed(GOLDEN_GAMMA)


def _mix(bits: Tensor) -> Tensor:
    """Return SplitMix64's mixture of each int64 entry; products are taken modulo 2^64."""
    for shift, factor in MIXERS:
        bits = (bits ^ _shift_right(bits, shift)) * _signed(factor)
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, places: int) -> Tensor:
    """Shift to the right and fill with zeros; torch would repeat the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _mix_integer(number: int) -> int:
    number %= 1 << 64
    for shift, factor in MIXERS:
        number = ((number ^ (number >> shift)) * factor) % (1 << 64)
    return number ^ (number >> 31)


def _signed(number: int) -> int:
    """Return the signed integer of the same 64 bits."""
    return number - (1 << 64) if number >= 1 << 63 else number
