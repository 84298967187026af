"""Types and functions to cut a stream without task labels into segments of one task each."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from online_meta.types import Params


class Likelihood(NamedTuple):
    """The likelihood of the next sample given its run, as pure functions over a stack of runs.

    A run is the samples since a change. A stack of n runs is a dict of tensors of shape (n, ...).
    ``start() -> runs`` returns a stack of one empty run;
    ``score(runs, x, y) -> scores`` returns log p(sample | run), natural logarithms, shape (n,), float64;
    ``update(runs, x, y) -> runs`` returns the runs with the sample appended to each.
    ``x`` and ``y`` are one sample, without a batch dimension.
    """

    start: Callable[[], Params]
    score: Callable[[Params, Tensor, Tensor], Tensor]
    update: Callable[[Params, Tensor, Tensor], Params]


class Segmenter(NamedTuple):
    """A detector of the first change in a stream, as pure functions; ``memory`` is a dict of tensors of bounded size.

    ``start() -> memory`` returns the memory at the beginning of a task, before its first sample;
    ``update(memory, x, y) -> memory`` processes the next sample;
    ``change(memory) -> count`` returns the number of samples before the first change, or None if none is detected.
    After a change the caller starts again and passes the samples after the change. What is found there depends on
    those samples only, so the segments are the same if the process restarts at a change.
    """

    start: Callable[[], Params]
    update: Callable[[Params, Tensor, Tensor], Params]
    change: Callable[[Params], int | None]


class TaskSegment(NamedTuple):
    """The samples ``begin`` .. ``end`` - 1 of a stream; the end was detected after ``detected_at`` samples.

    ``detected_at`` equals ``end`` for the last segment of a stream and for one cut at the maximum length.
    """

    begin: int
    end: int
    detected_at: int


def segment_samples(
    segmenter: Segmenter, samples: Sequence[tuple[Tensor, Tensor]], max_samples: int
) -> Iterator[TaskSegment]:
    """Yield the segments of a stream of (x, y), each of at most ``max_samples`` samples.

    The last segment ends with the stream. Raises ``ValueError`` if ``max_samples`` is below 1.
    """
    return segment_adaptively(lambda: segmenter, samples, max_samples)


def segment_adaptively(
    make_segmenter: Callable[[], Segmenter], samples: Sequence[tuple[Tensor, Tensor]], max_samples: int
) -> Iterator[TaskSegment]:
    """Yield the segments of a stream as ``segment_samples`` does, with a new segmenter for each segment.

    ``make_segmenter()`` is called when the next segment is requested, so a segmenter can use what was learned from the
    segments before. Raises ``ValueError`` if ``max_samples`` is below 1.
    """
    if max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}; a segment must have at least 1 sample")
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
    """Concatenate two stacks of runs."""
    return {name: torch.cat([values, more[name]]) for name, values in runs.items()}


def select_runs(runs: Params, which: Tensor) -> Params:
    """Return the stack of the runs at the indices ``which``."""
    return {name: values[which] for name, values in runs.items()}


def add_prefix(prefix: str, runs: Params) -> Params:
    """Return ``runs`` with ``prefix`` before each name, so that they can share a memory with other tensors."""
    return {prefix + name: values for name, values in runs.items()}


def strip_prefix(prefix: str, memory: Params) -> Params:
    """Return the runs in a memory whose names begin with ``prefix``; the inverse of ``add_prefix``."""
    return {name.removeprefix(prefix): values for name, values in memory.items() if name.startswith(prefix)}
