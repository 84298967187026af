"""Average meta-gradients over tasks, with the fastest plan for each shape."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from online_meta.batches import count_samples
from online_meta.batching.autotune import Autotuner
from online_meta.batching.padding import Masks
from online_meta.batching.plan import BATCHING_MODES, any_weight, unstack, unstack_one, weights_like
from online_meta.batching.task_sum import TaskSum
from online_meta.functional.autodiff import outside_inference_mode
from online_meta.registry import nearest
from online_meta.tree import scale
from online_meta.types import Meta, MetaGrad, MetaGradient, Task


def over_tasks(
    gradient: MetaGradient,
    batching: str = "auto",
    *,
    folder: Path | None = None,
    memory_limit: int | None = None,
    pad_sizes: Sequence[int] | None = None,
    masks: Masks | None = None,
) -> Callable[[Meta, Sequence[Task] | Task], MetaGrad]:
    """Return a function (meta, tasks) -> the mean loss and meta-gradient over the tasks.

    The modes differ in rounding; name one if results must be reproducible to the bit.

    Args:
        gradient: the meta-gradient estimator for one task, such as ``exact(inner)``.
        batching: "loop": task by task; "vmap": tasks of one shape at once; "traced": the same as a recorded program;
            "compiled": that program compiled, which takes seconds to minutes; "auto": benchmark all on the first tasks
            of a shape, use the fastest that agrees with the loop, and switch to the compiled program when it is ready.
        folder: where compiled programs are stored; nobody else may write to it. None for a temporary folder.
        memory_limit: limit on the live tensors of a batch, in bytes; larger stacks are cut. None for no limit.
        pad_sizes: the sizes that sets and sequences are padded to; none to pad nothing, None to choose them. Samples
            that fill up a set have weight 0, and a model that lets samples influence each other is not padded.
        masks: the names of inputs that are sequences, each with the name of the input that is its mask.

    Returns:
        A function of meta-parameters and either a non-empty sequence of tasks, whose shapes may differ, or one ``Task``
        of stacked tensors, each of shape (tasks, n, ...). It raises ``ValueError`` for no tasks.

    Raises:
        ValueError: if ``batching`` is unknown.
    """
    if batching not in (*BATCHING_MODES, "auto"):
        raise ValueError(f"batching = {batching!r}: {nearest(batching, (*BATCHING_MODES, 'auto'))}")
    own = folder is None and batching in ("auto", "compiled")
    place = Path(tempfile.mkdtemp(prefix="online-meta-")) if own else folder
    task_sum = TaskSum(gradient, place, masks=masks)
    find = partial(Autotuner, task_sum, batching=batching, memory_limit=memory_limit, folder=place, pad_sizes=pad_sizes)
    tuner: Autotuner | None = None

    def mean(meta: Meta, tasks: Sequence[Task] | Task) -> MetaGrad:
        nonlocal tuner
        if torch.is_inference_mode_enabled():
            return outside_inference_mode(mean)(meta, tasks)
        count = count_samples(tasks.support) if isinstance(tasks, Task) else len(tasks)
        if not count:
            raise ValueError("a meta-gradient over no tasks is not defined: give one task or more")
        tuner = tuner or find(count)
        if not isinstance(tasks, Task):
            task_sum.follow(tuner.find(meta, tasks))
            return scale(task_sum(meta, tasks, [1.0] * count), 1.0 / count)
        first = unstack_one(tasks, 0)
        task_sum.follow(tuner.find(meta, [first] if tuner.has_plan_for(first) else unstack(tasks)))
        return task_sum.sum_stacked(meta, tasks, weights_like(any_weight(meta), [1.0 / count] * count))

    if own and place is not None:
        weakref.finalize(mean, shutil.rmtree, place, ignore_errors=True)
    return mean
