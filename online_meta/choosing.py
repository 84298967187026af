"""Choose a way to sum meta-gradients by trying each on the tasks at hand: right first, then fast."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from online_meta.memory import peak_bytes
from online_meta.paths import Chunk, Part, Path, signature_of, stack, vmapped
from online_meta.summing import loop_over
from online_meta.tracing import Traced, as_chunk, trace
from online_meta.tree import doubled
from online_meta.types import Meta, MetaGrad, MetaGradient, Task

MOST_OPERATIONS = 10_000
"""Programs above this size take minutes to compile, and large models gain nothing by it."""
SLOW_SECONDS = 0.5
"""A task that takes longer is one of a model large enough for its operations, not their number, to take the time."""
MEASURE_SECONDS = 1.0
TOLERANCE = 1e-5


class Measured(NamedTuple):
    """How a way did: seconds and error a task-sum of ``path.tasks``, and why it is out of the question, if it is."""

    path: Path
    seconds: float
    error: float
    refused: str | None


class Trial(NamedTuple):
    """What candidates are tried on: tasks of one signature, what is right, and how far off the loop may be."""

    gradient: MetaGradient
    meta: Meta
    part: Part
    right: MetaGrad
    tolerance: float
    loop: Measured


class Choice(NamedTuple):
    """The best path for a signature, what was measured, and the program that is worth compiling, if there is one."""

    path: Path
    measured: tuple[Measured, ...]
    trial: Trial
    traced: Traced | None


def choose(gradient: MetaGradient, meta: Meta, tasks: Sequence[Task], most: int, memory_limit: int | None) -> Choice:
    """Measure loop, vmap and traced on ``tasks``, which are of one signature; return the fastest that is right.

    A way is right when its error against the loop in float64 is at most ten times the loop's own in the tasks'
    precision (1e-5 at least): the compilers of torch have been wrong without a word. ``most`` tasks go at a time, or
    as many as keep the peak under ``memory_limit`` bytes. Models that take long over one task are left to the loop.
    """
    trial = _prepare(gradient, meta, tasks, most)
    chunk = vmapped(gradient)
    path = Path("vmap", most, trial.part.signature)
    try:
        size = fitting(gradient, meta, tasks[0], most, memory_limit) if len(trial.part.tasks) > 1 else 0
        if size < 1:
            return Choice(trial.loop.path, (trial.loop,), trial, None)
        if size < len(trial.part.tasks):  # What does not fit is not tried either.
            trial = _prepare(gradient, meta, tasks, size)
        path = path._replace(tasks=size)
        operations = count_operations(lambda: chunk(meta, *_stacked(trial, len(trial.part.tasks))))
    except Exception as error:  # Whatever a user's model raises under vmap: it is then learned task by task.
        refused = Measured(path, float("inf"), float("inf"), f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return Choice(trial.loop.path, (trial.loop, refused), trial, None)
    measured = [trial.loop, measure(trial, path, chunk)]
    traced = None
    if operations <= MOST_OPERATIONS:
        traced = trace(chunk, meta, *_stacked(trial, size))
        path = Path("traced", size, trial.part.signature, traced.digest)
        measured.append(measure(trial, path, as_chunk(traced.graph)))
    best = fastest(measured)
    return Choice(best.path, tuple(measured), trial, traced if best.path.how != "loop" else None)


def measure(trial: Trial, path: Path, chunk: Chunk) -> Measured:
    """Run a way on the trial's tasks; return its time, its error, and whether that refuses it."""
    rows = len(trial.part.tasks) if path.how == "vmap" else path.tasks
    given = _stacked(trial, rows)
    error = distance(chunk(trial.meta, *given), trial.right)
    if not error <= trial.tolerance:
        return Measured(path, float("inf"), error, f"its error is {error:.1e}, and {trial.tolerance:.1e} is allowed")
    share = len(trial.part.tasks) / rows
    return Measured(path, _median_seconds(lambda: chunk(trial.meta, *given)) * share, error, None)


def fastest(measured: Sequence[Measured]) -> Measured:
    """Return the fastest that is not refused; the first is the loop, which never is."""
    return min((way for way in measured if way.refused is None), key=lambda way: way.seconds)


def fitting(gradient: MetaGradient, meta: Meta, task: Task, most: int, memory_limit: int | None) -> int:
    """Return how many tasks like ``task`` keep the peak of live tensors under ``memory_limit`` bytes, ``most`` at most.

    The peaks of one task and of two tell what each further task takes; 0 says that not even one fits.
    """
    if memory_limit is None:
        return most
    chunk = vmapped(gradient)

    def peak(count: int) -> int:
        return peak_bytes(lambda: chunk(meta, *stack(Part("", [task] * count, [1.0] * count), count, _some(meta))))

    one, two = peak(1), peak(2)
    return min(most, 0 if one > memory_limit else 1 + (memory_limit - one) // max(two - one, 1))


def distance(found: MetaGrad, right: MetaGrad) -> float:
    """Return ||found - right|| / ||right|| over the loss and all gradients."""
    pairs = list(zip(tree_leaves(found), tree_leaves(right), strict=True))
    far = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return float((far / max(sum(float(b.double().square().sum()) for _, b in pairs), 1e-300)) ** 0.5)


def count_operations(work: Callable[[], Any]) -> int:
    """Run ``work``; return how many tensor operations it made."""
    counter = _Counter()
    with counter:
        work()
    return counter.count


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _prepare(gradient: MetaGradient, meta: Meta, tasks: Sequence[Task], most: int) -> Trial:
    """Time the loop, and find out what is right; of slow models on fewer tasks."""
    one = Part(signature_of(tasks[0]), [tasks[0]], [1.0])
    gradient(meta, tasks[0])  # The first call of all is slower than any other.
    began = time.perf_counter()
    found = loop_over(gradient, meta, one)
    taken = max(time.perf_counter() - began, 1e-9)
    if taken > SLOW_SECONDS:
        return Trial(gradient, meta, one, found, 0.0, Measured(Path("loop", 1, one.signature), taken, 0.0, None))
    count = min(len(tasks), most, max(2, int(MEASURE_SECONDS / taken)))
    part = Part(one.signature, list(tasks[:count]), [1.0] * count)
    found = loop_over(gradient, meta, part)
    try:
        right = loop_over(gradient, *doubled((meta, part)))
        tolerance = max(TOLERANCE, 10 * distance(found, right))
    except Exception:  # A model that names its precision cannot be run in another: the loop itself is then right.
        right, tolerance = found, 10 * TOLERANCE
    seconds = _median_seconds(lambda: loop_over(gradient, meta, part))
    path = Path("loop", 1, part.signature)
    return Trial(gradient, meta, part, right, tolerance, Measured(path, seconds, distance(found, right), None))


def _stacked(trial: Trial, rows: int) -> tuple[Task, Tensor]:
    part = Part(trial.part.signature, trial.part.tasks[:rows], trial.part.weights[:rows])
    return stack(part, rows, _some(trial.meta))


def _some(meta: Meta) -> Tensor:
    return next(iter(meta.weights.values()))


def _median_seconds(work: Callable[[], Any]) -> float:
    taken: list[float] = []
    while len(taken) < 5 and (len(taken) < 1 or sum(taken) < MEASURE_SECONDS):
        began = time.perf_counter()
        work()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]
