"""Define the options that decide where tasks end in a stream of samples, and create the source."""

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
    """Options of sources that yield samples instead of tasks.

    Attributes:
        count: the number of samples per task.
        change: the detector that ends a task at a change, a file of ``online_meta/changepoints/detectors``.
        change_options: options of the detector.
        likelihood: the likelihood of the detector, a file of ``online_meta/changepoints/likelihoods``; by default the
            one that fits ``y``. "leader" is the loss of the run's own leader.
        likelihood_options: options of the likelihood; for "leader", those of ``LeaderOptions``.
        most: the largest number of samples in a task that ends at a change.
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
    """Create a source that is cut by ``change`` or, if that is not set, by ``count``.

    Args:
        settings: the options that decide where tasks end.
        encode: returns the sample of a row and its label or target.
        spec: the shape and dtypes of the run's tasks.
        read: returns the source of the rows for a cut.

    Raises:
        ValueError: if neither ``count`` nor ``change`` is set, if a change, likelihood or option is unknown, or if
            ``change`` is set and samples differ in size, or if inputs or targets have names.
    """
    x_shape = spec.require_single_input("a source of single samples")
    if settings.change is None:
        if settings.count is None:
            raise ValueError("nothing decides where a task ends: set count (samples per task) or change")
        return read(cut_by_count(settings.count))
    if is_dynamic(x_shape):
        raise ValueError(f"change = {settings.change!r} needs samples of one size, but x_shape is {x_shape}")
    if spec.y == "class" and spec.y_shape:
        raise ValueError(f"change = {settings.change!r} needs one class for a sample, but y_shape is {spec.y_shape}")
    segmenter = partial(build_segmenter, settings.change, settings.change_options)
    if settings.likelihood != LEADER:
        likelihood = build_likelihood(spec, settings.likelihood, settings.likelihood_options)
        return read(cut_by_change(segmenter(likelihood), encode, spec.ways, settings.most))
    options: LeaderOptions = call_with_options(LeaderOptions, "likelihood_options", {}, settings.likelihood_options)

    def create(leader: LeaderContext) -> TaskSource:
        return LeaderSource(read(cut_by_leader(leader, options, segmenter, encode, spec, settings.most)), leader)

    return NeedsLeader(create)
