"""Where the tasks of a stream change that has no labels on its joints: what is asked, and what is answered."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from online_meta.types import Params


class Likelihood(NamedTuple):
    """How likely the next sample is, given those of its run, as pure functions over a stack of runs.

    A run is the samples since a change. A stack of n runs is named tensors of shape (n, ...).
    ``start() -> runs`` is a stack of one run that has no samples;
    ``score(runs, x, y) -> scores`` are n natural logarithms of p(sample | run), in float64;
    ``update(runs, x, y) -> runs`` are the runs with the sample added to each.
    ``x`` and ``y`` are of one sample, without a leading dimension.
    """

    start: Callable[[], Params]
    score: Callable[[Params, Tensor, Tensor], Tensor]
    update: Callable[[Params, Tensor, Tensor], Params]


class Segmenter(NamedTuple):
    """Finds the first change in a stream, as pure functions; ``memory`` are named tensors of bounded size.

    ``start() -> memory`` is that at a change: the next sample is the first of a task;
    ``update(memory, x, y) -> memory`` is told of the next sample;
    ``change(memory) -> count`` says how many samples came before the first change; None while there seems to be none.
    After a change one starts anew, and tells it the samples behind the change: what is found behind a change is
    a function of the samples behind it, so a stream is cut alike whatever is restarted.
    """

    start: Callable[[], Params]
    update: Callable[[Params, Tensor, Tensor], Params]
    change: Callable[[Params], int | None]


class TaskSegment(NamedTuple):
    """The samples ``begin`` .. ``end`` - 1 of a stream; its end was known after ``detected_at`` samples of the stream.

    At the end of the stream, and where the segment was cut because it was too long, that is ``end``.
    """

    begin: int
    end: int
    detected_at: int


def segment_samples(
    segmenter: Segmenter, samples: Sequence[tuple[Tensor, Tensor]], max_samples: int
) -> Iterator[TaskSegment]:
    """Yield the segments of a stream of (x, y), of at most ``max_samples`` samples; the last may end without a change.

    Raises ``ValueError`` if ``max_samples`` is below 1.
    """
    return segment_adaptively(lambda: segmenter, samples, max_samples)


def segment_adaptively(
    make_segmenter: Callable[[], Segmenter], samples: Sequence[tuple[Tensor, Tensor]], max_samples: int
) -> Iterator[TaskSegment]:
    """Yield what ``segment_samples`` does, each segment cut by a segmenter of its own.

    ``make_segmenter()`` is called after the segment before was yielded and the next one is asked for: what was
    learned meanwhile may be in it.
    """
    if max_samples < 1:
        raise ValueError(f"most is {max_samples}: a segment has 1 sample or more")
    begin = at = 0
    while at < len(samples):
        segmenter = make_segmenter()
        memory = segmenter.start()
        count: int | None = None
        while count is None and at < len(samples):
            memory, at = segmenter.update(memory, *samples[at]), at + 1
            count = segmenter.change(memory)
            if count is None and at - begin == max_samples:
                count = max_samples
        end = at if count is None else begin + count
        yield TaskSegment(begin, end, at)
        begin = at = end


def concat_runs(runs: Params, more: Params) -> Params:
    """Return the stack of both."""
    return {name: torch.cat([values, more[name]]) for name, values in runs.items()}


def select_runs(runs: Params, which: Tensor) -> Params:
    """Return the stack of the runs at the places ``which``."""
    return {name: values[which] for name, values in runs.items()}


def add_prefix(prefix: str, runs: Params) -> Params:
    """Return ``runs`` under names that begin with ``prefix``, to lie in a memory beside others."""
    return {prefix + name: values for name, values in runs.items()}


def strip_prefix(prefix: str, memory: Params) -> Params:
    """Return what ``add_prefix`` put into a memory."""
    return {name.removeprefix(prefix): values for name, values in memory.items() if name.startswith(prefix)}
