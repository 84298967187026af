"""From the meta-gradient of one task to that of many."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from online_meta.path_finder import Autotuner
from online_meta.paths import BATCHING_MODES, unstack, unstack_one
from online_meta.registry import nearest
from online_meta.summing import TaskSum
from online_meta.tree import scale
from online_meta.types import Meta, MetaGrad, MetaGradient, Task


def over_tasks(
    gradient: MetaGradient, batching: str = "auto", *, folder: Path | None = None, memory_limit: int | None = None
) -> Callable[[Meta, Sequence[Task] | Task], MetaGrad]:
    """Return (meta, tasks) -> the mean loss and meta-gradient over one task or more.

    ``tasks`` is a list, in which shapes may differ, or one ``Task`` whose tensors are stacks of tasks, (tasks, n, ...).
    ``batching`` says which way computes: "loop", task by task; "vmap", those of one shape at once; "traced", the same as a
    recorded program; "compiled", that program compiled, which takes seconds to minutes; "auto": each is tried on the
    first tasks of a shape, the fastest that agrees with the loop goes on, and a compiled program takes over once it is
    there. The ways differ in rounding: where the same bits matter, name one. Compiled programs are kept in ``folder``,
    where nobody else may write (None: one that is removed in the end). Stacked tasks are cut so that live tensors
    stay under ``memory_limit`` bytes.
    Raises ``ValueError`` for an unknown ``batching``; the function returned does for an empty list.
    """
    if batching not in (*BATCHING_MODES, "auto"):
        raise ValueError(f"how = {batching!r}: {nearest(batching, (*BATCHING_MODES, 'auto'))}")
    own = folder is None and batching in ("auto", "compiled")
    place = Path(tempfile.mkdtemp(prefix="online-meta-")) if own else folder
    task_sum = TaskSum(gradient, place)
    find = partial(Autotuner, task_sum, batching=batching, memory_limit=memory_limit, folder=place)
    tuner: Autotuner | None = None

    def mean(meta: Meta, tasks: Sequence[Task] | Task) -> MetaGrad:
        nonlocal tuner
        count = len(tasks.support.x) if isinstance(tasks, Task) else len(tasks)
        if not count:
            raise ValueError("a meta-gradient over no tasks is not defined: give one task or more")
        tuner = tuner or find(count)
        if not isinstance(tasks, Task):
            task_sum.follow(tuner.find(meta, tasks))
            return scale(task_sum(meta, tasks, [1.0] * count), 1.0 / count)
        first = unstack_one(tasks, 0)
        task_sum.follow(tuner.find(meta, [first] if tuner.has_plan_for(first) else unstack(tasks)))
        return task_sum.sum_stacked(meta, tasks, next(iter(meta.weights.values())).new_full((count,), 1.0 / count))

    if own and place is not None:
        weakref.finalize(mean, shutil.rmtree, place, ignore_errors=True)
    return mean
