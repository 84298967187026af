"""Online learners: Follow-the-Meta-Leader and its baselines, one a file.

A file offers ``build(context: LearnerContext, **options) -> Learner``; the parameters after ``context``, with types and
defaults, are the options of ``[regret.options.NAME]``. A learner scores a task before it learns it, and gives back its
whole state as named tensors; see ``online_meta.types.Learner``.

A learner *meta-learns* if it learns across tasks how to adapt to a new one. A file whose learner does not says
``META_LEARNS = False``: it learns from each task alone, or is one model of all the data. The verdict on whether
meta-learning pays compares with these; see ``meta_learns``.

A file may also offer ``can_answer(tasks: TaskShape) -> bool``: whether the learner can answer such tasks, at a cost of
milliseconds a round. ``can_answer`` of this folder asks it.

A learner whose answers share work that depends on its published state alone, such as a fit to past rows, has an
attribute ``prepare``: ``prepare(state)`` does that work and remembers it, so that a process that serves does it once
for each state, and in no request. Answers are the same without it. None means that there is none.

A file whose learner depends on other libraries offers ``find_versions(options)``: their versions, by module. A run
records them as the option ``libraries``, and is not continued with others.

An answer may depend on the order of the support samples beyond rounding, for example because the learner draws by their
bytes, if the learner has an attribute ``order_matters = True``.
"""

import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from online_meta import registry
from online_meta.batching.failures import TaskFailures
from online_meta.batching.programs import Programs
from online_meta.functional.model import checked_loss
from online_meta.inner import Inner
from online_meta.learners._online_step import FunctionalLearner as FunctionalLearner
from online_meta.learners._online_step import ParameterLearner as ParameterLearner
from online_meta.learners._online_step import PredictingLearner as PredictingLearner
from online_meta.replay import ReplayPolicy
from online_meta.replay._task_draw import ALL_SAMPLES, TaskDraw
from online_meta.types import (
    Batch,
    Belief,
    Engine,
    Learner,
    Meta,
    MetaGradient,
    Params,
    ReplayBuffer,
    Schedule,
    State,
    Task,
)

FUNCTION = "build"


def meta_learns(kind: str) -> bool:
    """Return whether the learner ``kind``, a file or an import path, learns across tasks how to adapt to a new one.

    This is ``META_LEARNS`` of its module, by default True; also True if the learner cannot be loaded.
    """
    try:
        return bool(getattr(registry.load_module(sys.modules[__name__], kind), "META_LEARNS", True))
    except ValueError:  # A learner of another package, in a run of an earlier environment.
        return True


class TaskShape(NamedTuple):
    """What the tasks of a run look like.

    Attributes:
        loss: the name or import path of the model's loss.
        x_shape: the shape of one input; a dimension of -1 may differ between tasks.
        x_dtype: the dtype of an input, such as "float32".
        y_shape: the shape of one target; () for a class.
    """

    loss: str
    x_shape: tuple[int, ...]
    x_dtype: str = "float32"
    y_shape: tuple[int, ...] = ()


def can_answer(kind: str, tasks: TaskShape) -> bool:
    """Return whether a learner of this ``kind`` can answer such tasks, and costs no more than it is worth by default.

    The file of a learner says so by a function ``can_answer(tasks)``; one without it answers everything that the model
    does. Raises ``ValueError`` for an unknown kind.
    """
    check = getattr(registry.load_module(sys.modules[__name__], kind), "can_answer", None)
    return check is None or bool(check(tasks))


OPTIMIZER, LR = "adam", 1e-3
"""What a baseline steps with, unless its options say otherwise."""


@runtime_checkable
class BelievingLearner(Learner, Protocol):
    """A learner that answers by parameters of the model: ``answers`` is what they predict."""

    inner: Inner
    """The inner loop by which it adapts."""

    def believe(self, state: State, support: Batch) -> dict[str, Belief]:
        """Return what is believed of the parameters after adapting to a support set, by the names of ``answers``."""


class MemoryReplayBuffer:
    """A ``ReplayBuffer`` that keeps every task in memory."""

    def __init__(self) -> None:
        """Start without rounds."""
        self._tasks: list[Task] = []

    def __getitem__(self, round: int, /) -> Task:
        """Return the task of a round."""
        return self._tasks[round]

    def gather(self, rounds: Sequence[int]) -> Sequence[Task]:
        """Return the tasks of rounds, in their order."""
        return [self[round] for round in rounds]

    def available(self, count: int) -> Sequence[int]:
        """Return the rounds below ``count``: all of them are kept."""
        return range(count)

    def distribute(self, shares: Sequence[Sequence[int]]) -> None:
        """Do nothing: every task is in memory."""

    def prefetch(self, reader: Hashable, rounds: Iterable[int]) -> None:
        """Do nothing: every task is in memory."""

    def add(self, round: int, task: Task) -> None:
        """Keep the task of a round. A round that is played again, after a rollback, replaces its old task.

        Raises:
            IndexError: if the round before it is missing.
        """
        if not 0 <= round <= len(self._tasks):
            raise IndexError(f"round {round} comes after round {len(self._tasks)}, which is missing")
        self._tasks[round : round + 1] = [task]


def gather_single_process(value: Any) -> list[Any]:
    """Return [``value``]: a single process has no other ranks to gather from."""
    return [value]


@dataclass(frozen=True)
class LearnerContext:
    """What all learners of one stream share.

    Attributes:
        inner: the inner loop.
        gradient: the estimator of the meta-gradient.
        start: the initial meta-parameters.
        draw_weights: ``draw_weights(k)`` draws new random weights as a function of k, an integer of at least 0.
        engine: makes a new optimizer for meta-parameters.
        replay: the replay policy.
        batch: the largest number of past rounds in a meta-step.
        steps_per_round: meta-steps after each round.
        seed: the seed of the run.
        buffer: the tasks of the rounds.
        schedule: multiplies the learning rate of the engines.
        programs: the folder of compiled programs; None compiles nothing.
        batching: how the meta-gradients of a batch are computed, see ``Autotuner``.
        memory_limit: bytes that stacked tasks may take.
        own_engine: ``own_engine(meta, optimizer, lr)`` makes a new optimizer that the settings of the outer loop do not
            change; None makes baselines step with ``engine``.
        gather: ``gather(value)`` returns, on every rank, the list of all ranks' values, as JSON gives them back.
        failures: collects the model's exceptions on revisited tasks; None lets them propagate.
        global_labels: whether a class number means the same class in each task.
        draw: the samples that learners draw of a task each time that they revisit it.
        pad_sizes: the sizes that tasks are padded to, see ``Autotuner``.
    """

    inner: Inner
    gradient: MetaGradient
    start: Meta
    draw_weights: Callable[[int], Params]
    engine: Callable[[Meta], Engine]
    replay: ReplayPolicy
    batch: int
    steps_per_round: int
    seed: int
    buffer: ReplayBuffer
    schedule: Schedule | None = None
    programs: Path | Programs | None = None
    batching: str = "loop"
    memory_limit: int | None = None
    gather: Callable[[Any], list[Any]] = gather_single_process
    own_engine: Callable[[Meta, str, float], Engine] | None = None
    failures: TaskFailures | None = None
    global_labels: bool = False
    draw: TaskDraw = ALL_SAMPLES
    pad_sizes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check a loss of the user's own when it is called first."""
        object.__setattr__(self, "inner", replace(self.inner, loss=checked_loss(self.inner.loss)))


def use_own_optimizer(context: LearnerContext, optimizer: str, lr: float) -> LearnerContext:
    """Return the context of a baseline whose engines step with an ``optimizer`` of its own at the constant rate ``lr``.

    Without ``context.own_engine``, it returns ``context``: the baseline steps with the engine and the schedule of FTML.
    """
    make = context.own_engine
    if make is None:
        return context
    return replace(context, engine=lambda meta: make(meta, optimizer, lr), schedule=None)
