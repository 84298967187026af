"""The peak memory of a meta-gradient, found out on tensors without memory."""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from online_meta.memory import peak_bytes
from online_meta.paths import Group, stack, vmapped
from online_meta.types import Meta, MetaGrad, MetaGradient, Task

Estimator = Callable[[int], MetaGradient]
"""The number of inner steps -> the estimator of the meta-gradient with so many."""

PROBE_STEPS = 2
"""Inner steps that are run to see what a step takes; one more shows what a step adds."""


class GradientPeak(NamedTuple):
    """Bytes at the peak of a meta-gradient: the kept ``trajectory``, and all else, a ``graph`` and gradients."""

    trajectory: int
    graph: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.trajectory + self.graph


def stored_points(steps: int, *, rematerialise: bool = False, offload: bool = False) -> int:
    """Return how many points of the trajectory lie in the memory of the device at once.

    K, or ceil(K / s) - 1 + s with s = ceil(sqrt(K)) rematerialised (see ``pull_back``); offloaded one is worked on
    while the next is made.
    """
    if offload:
        return min(steps, PROBE_STEPS)
    if not rematerialise or steps < PROBE_STEPS:
        return steps
    segment_length = math.isqrt(steps - 1) + 1
    starts = -(-steps // segment_length)
    last = steps - (starts - 1) * segment_length
    # Going forth the last stretch is kept after all starts; going back, the stretch before it after one start less.
    return max(starts - 1 + last, starts - 2 + segment_length)


def gradient_peak(
    estimator: Estimator,
    meta: Meta,
    task: Task,
    steps: int,
    *,
    rematerialise: bool = False,
    offload: bool = False,
    rows: int = 0,
) -> GradientPeak:
    """Return the peak of a meta-gradient of ``steps`` inner steps, the meta-parameters and the tasks not counted.

    Peak(K) = Peak(2) + (kept(K) - kept(2)) (Peak(3) - Peak(2)), each measured by running the estimator on tensors
    without memory. With ``rows`` above 0 so many tasks are stacked.
    """

    def peak(steps: int) -> int:
        return _measure_peak(estimator(steps), meta, task, rows)

    if steps <= PROBE_STEPS:
        return GradientPeak(0, peak(steps))
    few, more = peak(PROBE_STEPS), peak(PROBE_STEPS + 1)
    points = stored_points(steps, rematerialise=rematerialise, offload=offload)
    trajectory = (more - few) * points
    return GradientPeak(trajectory, few + (more - few) * (points - PROBE_STEPS) - trajectory)


def _measure_peak(gradient: MetaGradient, meta: Meta, task: Task, rows: int) -> int:
    def work(meta: Meta, task: Task) -> MetaGrad:
        if not rows:
            return gradient(meta, task)
        stacked = stack(Group("", [task] * rows, [1.0] * rows), rows, next(iter(meta.weights.values())))
        return vmapped(gradient)(meta, *stacked)

    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            given = tree_map(mode.from_tensor, (meta, task))
            return peak_bytes(lambda: work(*given))
    except Exception:  # A model that looks at numbers (float(), .item()) needs some: it is run in earnest.
        return peak_bytes(lambda: work(meta, task))
