"""Pad tasks of many sizes to a few, with samples of weight 0 and masks, so that few programs compute all of them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from online_meta.batches import as_named, count_samples, first_tensor, from_named, select_samples
from online_meta.functional.classes import IGNORED_CLASS
from online_meta.tree import sum_of_squares, to_float64
from online_meta.types import Batch, Meta, MetaGrad, MetaGradient, Task

Sizes = tuple[int, ...]
"""The numbers of support and query samples of a task, and then the length of each sequence that has a mask, by name."""

Masks = Mapping[str, str]
"""The name of an input that is a sequence -> that of the input that is its mask, 1 for entries that count."""

MAX_WASTE = 4
"""A task is not padded to more than this many times its size while another size can be had."""

MAX_PADDED = 4
"""The number of sizes that the tasks of a learner are padded to."""

TOLERANCE = 1e-9
"""The relative difference of a padded meta-gradient in float64 that counts as rounding."""

COARSE_TOLERANCE = 1e-4
"""That in other dtypes."""


PadTask = Callable[[Task], Task]
"""Returns a task as all ways but the loop compute it."""


def as_it_is(task: Task) -> Task:
    """Return the task."""
    return task


def measure(task: Task, masks: Masks) -> Sizes:
    """Return the sizes of a task."""
    lengths = [max(as_named(batch.x)[name].shape[1] for batch in task) for name in _sequences(task, masks)]
    return (count_samples(task.support), count_samples(task.query), *lengths)


def _sequences(task: Task, masks: Masks) -> list[str]:
    return sorted(name for name, mask in masks.items() if {name, mask} <= as_named(task.support.x).keys())


def pad_task(task: Task, sizes: Sizes, masks: Masks) -> Task:
    """Return a task of larger ``sizes`` with the same loss.

    Further samples repeat the first one and have the weight 0; further entries of a sequence are 0, and so is their
    mask. Targets of integers with one entry for each entry of the sequence get class -100.

    Args:
        task: has one sample or more in each set.
        sizes: at least those of the task.
        masks: of the sequences.
    """
    lengths = dict(zip(_sequences(task, masks), sizes[2:], strict=True))
    return Task(*(_pad_batch(batch, rows, lengths, masks) for batch, rows in zip(task, sizes, strict=False)))


def _pad_batch(batch: Batch, rows: int, lengths: Mapping[str, int], masks: Masks) -> Batch:
    x, y = dict(as_named(batch.x)), dict(as_named(batch.y))
    for name, length in lengths.items():
        before = x[name].shape[1]
        for part in {name: None, masks[name]: None}:
            x[part] = _lengthen(x[part], length, 0)
        for part, values in y.items():
            if not values.is_floating_point() and values.ndim > 1 and values.shape[1] == before:
                y[part] = _lengthen(values, length, IGNORED_CLASS)
    count, first = count_samples(batch), first_tensor(batch.x)
    weight = batch.weight
    if weight is None:
        weight = first.new_ones(count, dtype=first.dtype if first.is_floating_point() else torch.float32)
    at = torch.arange(rows, device=first.device)
    longer = select_samples(Batch(from_named(x), from_named(y)), torch.where(at < count, at, 0))
    return longer._replace(weight=F.pad(weight, (0, rows - count)))


def _lengthen(values: Tensor, length: int, filling: int) -> Tensor:
    missing = max(length - values.shape[1], 0)
    return torch.cat([values, values.new_full((len(values), missing, *values.shape[2:]), filling)], 1)


def covers(pad: Sizes, sizes: Sizes) -> bool:
    """Return whether a task of ``sizes`` can be padded to ``pad``."""
    return len(pad) == len(sizes) and all(a >= b for a, b in zip(pad, sizes, strict=True)) and min(sizes[:2]) > 0


def cost(sizes: Sizes) -> int:
    """Return the number of entries of a task: samples times lengths."""
    total = sizes[0] + sizes[1]
    for length in sizes[2:]:
        total *= length
    return total


def choose_sizes(
    sizes: Sizes, seen: Sequence[Sizes], known: Sequence[Sizes], given: Sequence[int] | None
) -> Sizes | None:
    """Return what a task of ``sizes`` is padded to; () if it is to be as it is, None if no plan is left for it.

    Args:
        sizes: of the task.
        seen: of all tasks so far.
        known: to which tasks are padded already.
        given: the sizes to choose from, for each set and sequence; None to choose them from what was seen. The first
            is then the largest of each, rounded up to a power of 2, and each of the others is a power of 2 times
            the first. What is the same in all tasks is not padded.
    """
    if given is not None:
        found = [min((one for one in given if one >= size), default=0) for size in sizes]
        return tuple(found) if all(found) else ()
    fitting = sorted((one for one in known if covers(one, sizes)), key=cost)
    if fitting and (cost(fitting[0]) <= MAX_WASTE * cost(sizes) or len(known) >= MAX_PADDED):
        return fitting[0]
    if len(known) >= MAX_PADDED:
        return None
    largest = tuple(map(max, zip(*seen, sizes, strict=True)))
    varies = [min(every) < most for every, most in zip(zip(*seen, sizes, strict=True), largest, strict=True)]
    rounded = tuple(_round_up(most) if many else most for most, many in zip(largest, varies, strict=True))
    base = next((one for one in known if len(one) == len(sizes)), rounded)
    scale = 2.0**-20
    while not all(b * scale >= size or not many for b, size, many in zip(base, sizes, varies, strict=True)):
        scale *= 2
    found = [int(b * scale) if many else most for b, many, most in zip(base, varies, largest, strict=True)]
    chosen = tuple(max(one, size) for one, size in zip(found, sizes, strict=True))
    if cost(chosen) <= 2 * MAX_WASTE * cost(sizes):
        return chosen
    return tuple(_round_up(size) if many else most for size, many, most in zip(sizes, varies, largest, strict=True))


def _round_up(size: int) -> int:
    return int(2 ** (size - 1).bit_length())


def explain_inexact(gradient: MetaGradient, meta: Meta, task: Task, padded: Task) -> str | None:
    """Say by how much the meta-gradient of a padded task differs from that of the task; None if by rounding alone."""
    tolerance = TOLERANCE
    try:
        try:
            pair = [gradient(*to_float64((meta, one))) for one in (task, padded)]
        except Exception:  # A model with a dtype of its own cannot run in float64.
            pair, tolerance = [gradient(meta, one) for one in (task, padded)], COARSE_TOLERANCE
    except Exception as error:  # A user's model or loss may raise anything, such as one that takes no weights.
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    found = relative_error(pair[1], pair[0])
    return None if found <= tolerance else f"it changes the meta-gradient by {found:.1e}"


def relative_error(found: MetaGrad, reference: MetaGrad) -> float:
    """Return ||found - reference|| / ||reference||, the Euclidean norm over the loss and all gradients."""
    pairs = list(zip(tree_leaves(found), tree_leaves(reference), strict=True))
    far = sum(float(sum_of_squares(to_float64(a) - to_float64(b))) for a, b in pairs)
    return float((far / max(sum(float(sum_of_squares(b)) for _, b in pairs), 1e-300)) ** 0.5)
