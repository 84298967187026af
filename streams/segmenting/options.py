"""Where tasks end in a stream of samples, as a configuration says it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from annotated_types import Ge

from streams.formats.rows import EncodeRow
from streams.segmenting.by_change import LEADER, build_likelihood, build_segmenter, call_with_options, cut_by_change
from streams.segmenting.by_leader import LeaderContext, LeaderOptions, LeaderSource, NeedsLeader, cut_by_leader
from streams.segmenting.cutting import Cut, RowSource, cut_by_count
from streams.spec import TaskSpec, is_dynamic
from streams.types import TaskSource


@dataclass(frozen=True, kw_only=True)
class CutOptions:
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


def create_cut_source(
    settings: CutOptions, encode: EncodeRow, spec: TaskSpec, read: Callable[[Cut], RowSource]
) -> TaskSource | NeedsLeader:
    """Return the source whose samples ``read`` gives, cut by ``change`` or, where that is left out, by ``count``.

    ``encode`` gives a row's sample. Raises ``ValueError`` for an unknown change, likelihood or option, where neither
    is given, and for a change where samples differ in size.
    """
    if settings.change is None:
        if settings.count is None:
            raise ValueError("nothing says where a task ends: give count (samples a task) or change")
        return read(cut_by_count(settings.count))
    if is_dynamic(spec.x_shape):
        raise ValueError(f"change = {settings.change!r} needs samples of one size, and x_shape is {spec.x_shape}")
    segmenter = partial(build_segmenter, settings.change, settings.change_options)
    if settings.likelihood != LEADER:
        likelihood = build_likelihood(spec, settings.likelihood, settings.likelihood_options)
        return read(cut_by_change(segmenter(likelihood), encode, spec.ways, settings.most))
    options: LeaderOptions = call_with_options(LeaderOptions, "likelihood_options", {}, settings.likelihood_options)

    def create(leader: LeaderContext) -> TaskSource:
        return LeaderSource(read(cut_by_leader(leader, options, segmenter, encode, spec, settings.most)), leader)

    return NeedsLeader(create)
