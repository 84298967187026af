"""Streams of few-shot tasks of glyphs whose images go through filters, one after another or in random order."""

from typing import NamedTuple

import numpy as np
import torch
from online_meta.batches import only_tensor
from online_meta.replay import generator
from online_meta.types import Batch, Task
from tests.experiments.filtered_glyphs.filters import FILTERS, Filter
from tests.experiments.glyphs.tasks import SIZE as RENDERED
from tests.experiments.glyphs.tasks import draw_tasks
from torch import Tensor
from torch.nn import functional as F

WAYS, SHOTS, QUERIES = 5, 1, 3
SIZE = RENDERED // 2
"""Side of an image in pixels."""

PHASES, MIXED = "phases", "mixed"
STREAMS = (PHASES, MIXED)
PASSES = 2
"""How often each filter has a phase."""

ORDER = 1
"""Separates the draw of the order of filters from others with the same seed."""


class Filtered(NamedTuple):
    """A task, the name of its filter, and its part of the stream: the filter, and whether it has come back."""

    task: Task
    filter: str
    part: str


def list_parts(stream: str) -> list[str]:
    """Return the parts of a stream in order: phases, or for a mixed one its filters."""
    return [*FILTERS, *(f"{name} again" for name in FILTERS)] if stream == PHASES else [*FILTERS]


def order_parts(stream: str, seed: int, rounds: int) -> list[str]:
    """Return the part that each round belongs to.

    In ``phases``, each filter has as many rounds as the others, one filter after another, and this twice. In ``mixed``,
    the filter of each round is drawn uniformly.
    """
    parts = list_parts(stream)
    if stream == PHASES:
        return [parts[t * len(parts) // rounds] for t in range(rounds)]
    return [parts[place] for place in generator(seed, ORDER).integers(len(parts), size=rounds)]


def make_stream(letters: Tensor, stream: str, seed: int, rounds: int) -> list[Filtered]:
    """Return the tasks of a stream; but for their filters, both streams have the same tasks.

    Args:
        letters: (letters, 56, 56), of which each task has ``WAYS``.
        stream: one of ``STREAMS``.
        seed: of the tasks and of the order of filters.
        rounds: number of tasks.
    """
    found = []
    for t, part in enumerate(order_parts(stream, seed, rounds)):
        name = part.split()[0]
        found.append(Filtered(_make_task(letters, seed, t, FILTERS[name]), name, part))
    return found


def _make_task(letters: Tensor, seed: int, t: int, change: Filter) -> Task:
    # A generator of torch starts from 32 bits, which numpy mixes from both numbers.
    random = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, t)).generate_state(1)[0]))
    (task,) = draw_tasks(random, letters, 1, WAYS, SHOTS, QUERIES)
    support, query = (Batch(change(F.avg_pool2d(only_tensor(part.x), 2)), part.y) for part in task)
    return Task(support, query)
