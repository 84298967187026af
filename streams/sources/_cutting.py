"""Where tasks end in a stream of samples, as a configuration says it."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge

from streams.row_tasks import EncodeRow
from streams.sources._changes import build_segmenter, by_change
from streams.sources._samples import Cut, by_count
from streams.spec import TaskSpec


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """Options of the sources that yield samples.

    Attributes:
        count: a task has so many samples.
        change: a task ends where this finds a change: a file of ``online_meta/segmentation``, with ``change_options``.
        likelihood: one of ``online_meta/likelihoods``, with ``likelihood_options``; left out: the one that fits ``y``.
        most: by change, a task is cut at so many samples.
    """

    count: Annotated[int, Ge(2)] | None = None
    change: str | None = None
    change_options: dict[str, Any] = field(default_factory=dict)
    likelihood: str | None = None
    likelihood_options: dict[str, Any] = field(default_factory=dict)
    most: Annotated[int, Ge(2)] = 1_000


def build_cut(cutting: Cutting, encode: EncodeRow, spec: TaskSpec) -> Cut:
    """Return the cut by ``change`` or, where that is left out, by ``count``; ``encode`` gives a row's sample.

    Raises ``ValueError`` for an unknown change, likelihood or option, and where neither is given.
    """
    if cutting.change is None:
        if cutting.count is None:
            raise ValueError("nothing says where a task ends: give count (samples a task) or change")
        return by_count(cutting.count)
    likelihood = (cutting.likelihood, cutting.likelihood_options)
    segmenter = build_segmenter(spec, cutting.change, cutting.change_options, *likelihood)
    return by_change(segmenter, encode, spec.ways, cutting.most)
