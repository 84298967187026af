"""Where tasks end in a stream of samples, as a configuration says it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from annotated_types import Ge

from streams.arrivals import TaskSource
from streams.leading import Follower, Leading
from streams.row_tasks import EncodeRow
from streams.sources._changes import LEADER, build_likelihood, build_segmenter, by_change, call_checked
from streams.sources._led import LeaderOptions, Led, by_leader
from streams.sources._samples import Cut, Samples, by_count
from streams.spec import TaskSpec, is_open


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """Options of the sources that yield samples.

    Attributes:
        count: a task has so many samples.
        change: a task ends where this finds a change: a file of ``online_meta/segmentation``, with ``change_options``.
        likelihood: one of ``online_meta/likelihoods``, with ``likelihood_options``; left out: the one that fits ``y``.
            Or "leader": the loss of the run's own leader, with the options of ``LeaderOptions``.
        most: by change, a task is cut at so many samples.
    """

    count: Annotated[int, Ge(2)] | None = None
    change: str | None = None
    change_options: dict[str, Any] = field(default_factory=dict)
    likelihood: str | None = None
    likelihood_options: dict[str, Any] = field(default_factory=dict)
    most: Annotated[int, Ge(2)] = 1_000


def open_cut(
    cutting: Cutting, encode: EncodeRow, spec: TaskSpec, read: Callable[[Cut], Samples]
) -> TaskSource | Follower:
    """Return the source whose samples ``read`` gives, cut by ``change`` or, where that is left out, by ``count``.

    ``encode`` gives a row's sample. Raises ``ValueError`` for an unknown change, likelihood or option, where neither
    is given, and for a change where samples differ in size.
    """
    if cutting.change is None:
        if cutting.count is None:
            raise ValueError("nothing says where a task ends: give count (samples a task) or change")
        return read(by_count(cutting.count))
    if is_open(spec.x_shape):
        raise ValueError(f"change = {cutting.change!r} needs samples of one size, and x_shape is {spec.x_shape}")
    segmenter = partial(build_segmenter, cutting.change, cutting.change_options)
    if cutting.likelihood != LEADER:
        likelihood = build_likelihood(spec, cutting.likelihood, cutting.likelihood_options)
        return read(by_change(segmenter(likelihood), encode, spec.ways, cutting.most))
    options: LeaderOptions = call_checked(LeaderOptions, "likelihood_options", {}, cutting.likelihood_options)

    def follow(leading: Leading) -> TaskSource:
        return Led(read(by_leader(leading, options, segmenter, encode, spec, cutting.most)), leading)

    return Follower(follow)
