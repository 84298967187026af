"""What learners share that learn each task once when it arrives and revisit none."""

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from online_meta.answers import predict_each
from online_meta.functional.recording import Recorder
from online_meta.inner import Inner, draws_numbers
from online_meta.meta_optimizer import copy_to_cpu
from online_meta.registry import nearest
from online_meta.regret.scoring import ScoredLearner, ScoredTasks, TaskAnswers, answer_task
from online_meta.tree import norm, zeros
from online_meta.types import (
    Batch,
    Belief,
    Engine,
    Learned,
    MetaGrad,
    Params,
    Prediction,
    State,
    StepReport,
    Task,
    TensorFilter,
    Tensors,
)

Believe = Callable[[State, Batch], dict[str, Belief]]
"""(what a learner publishes, a support set) -> what it believes of the parameters, by the suffixes of its answers."""

Begin = Callable[[State, Batch], State]
"""(what a learner publishes, a support set) -> that from which it adapts."""

Answer = Callable[[State, Batch, Tensors], Prediction]
"""(what a learner publishes, a support set, inputs) -> the prediction of their targets."""

Update = Callable[[State, Task, int], State]
"""(what a learner publishes, a task, its round from 0) -> what it publishes after it has learned the task."""

STATE = "state"
"""Prefix of the names in which a ``PredictingLearner`` saves what it publishes."""


class ParameterLearner(ScoredLearner):
    """A learner that answers by parameters of the model: by what they predict after adapting to the support set.

    A subclass has an inner loop ``inner`` by which it adapts.
    """

    inner: Inner

    @abstractmethod
    def believe(self, state: State, support: Batch) -> dict[str, Belief]:
        """Return what is believed of the parameters after adapting to a support set, by the suffixes of the answers."""

    def answers(self, state: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
        """Return the predictions under what ``believe`` returns; a pure function."""
        return predict_each(self.inner, self.believe(state, support), support, x)

    def draws_numbers(self) -> bool:
        """Return whether the model or a rule draws torch's random numbers."""
        return draws_numbers(self.inner)


class PredictingLearner(ScoredLearner):
    """A learner made of two pure functions, ``answer`` and ``update``: it remembers named tensors alone, its state.

    It answers by ``answer(state_t, support, x)`` in round t; then state_{t+1} = update(state_t, task, t). An update
    that is not finite changes nothing. The report of a task has the norm of the change.
    """

    engine = None
    lr_scale = 1.0

    def __init__(
        self,
        start: State,
        answer: Answer,
        update: Update | None = None,
        *,
        order_matters: bool = False,
        unpublished: Collection[str] = (),
    ) -> None:
        """Start at round 0.

        Args:
            start: the first state. An empty state takes its names, shapes and dtypes from the first update.
            answer: predicts the targets of inputs from the state and a support set, which may have no samples.
            update: learns a task; keeps the names, shapes and dtypes of the state. None to learn nothing.
            order_matters: whether an answer depends on the order of the support samples beyond rounding.
            unpublished: names of the state that ``update`` alone reads. They are saved, but not published.
        """
        super().__init__()
        self.order_matters = order_matters
        self._answer, self._update, self._unpublished = answer, update, unpublished
        self._start, self._state, self._round = start, start, 0
        self._measure_change = Recorder(_measure_change)

    def state(self) -> State:
        """Return the state without what is unpublished."""
        if not self._unpublished:
            return self._state
        return {name: value for name, value in self._state.items() if name not in self._unpublished}

    def answers(self, state: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
        """Return the prediction of ``answer``; a pure function."""
        with torch.no_grad():
            return {"": self._answer(state, support, x)}

    def learn(self, *tasks: Task) -> Learned:
        """Learn the tasks scored since the last call, one by one."""
        self._scored.take(tasks)
        update = self._update
        return Learned((), tuple(self._learn(update, task) for task in tasks) if update else ())

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Do nothing: this learner does not revisit past tasks."""
        return ()

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return the state."""
        return copy_state({STATE: self._state}, keep)

    def load(self, saved: Params, rounds: int) -> None:
        """Restore the state that ``save`` returned after ``rounds`` learned rounds."""
        prefix = f"{STATE}."
        own = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
        self._state, self._round = restore_state(dict(saved), STATE, self._start or own), rounds
        self._scored = ScoredTasks()

    def _learn(self, update: Update, task: Task) -> StepReport:
        before = self._state
        after = {name: value.detach() for name, value in update(before, task, self._round).items()}
        found, needed = _describe(after), _describe(before)
        if found != needed and (before or self._start):
            raise ValueError(f"update returns {found}: it keeps the names, shapes and dtypes of the state, {needed}")
        self._round += 1
        with torch.no_grad():
            change = float(self._measure_change(before, after))
        if not math.isfinite(change):
            return StepReport(change, "not_finite")
        self._state = after
        return StepReport(change, None)


class FunctionalLearner(PredictingLearner):
    """A learner made of two pure functions, ``believe`` and ``update``: it answers by parameters of the model.

    It answers by ``believe(state_t, support)`` in round t; for the rest, see ``PredictingLearner``.
    """

    def __init__(
        self,
        inner: Inner,
        start: State,
        believe: Believe,
        update: Update | None = None,
        *,
        begin: Begin | None = None,
        order_matters: bool = False,
    ) -> None:
        """Start at round 0.

        Args:
            inner: the inner loop that adapts to a task.
            start: what the learner publishes first.
            believe: adapts to a support set.
            begin: makes what ``believe`` is given in place of the state, for example weights that are drawn anew for
                each support set; it may draw numbers.
            update: learns a task; keeps the names, shapes and dtypes of the state. None to learn nothing.
            order_matters: whether an answer depends on the order of the support samples beyond rounding.
        """
        super().__init__(
            start, lambda state, support, x: self.answers(state, support, x)[""], update, order_matters=order_matters
        )
        self.inner, self._believe, self._begin = inner, believe, begin
        self._answer_begun = Recorder(self.answers_from)

    def believe(self, state: State, support: Batch) -> dict[str, Belief]:
        """Return what is believed after adapting to a support set; a pure function."""
        return self._believe(self.begin(state, support), support)

    def begin(self, state: State, support: Batch) -> State:
        """Return that from which the learner adapts to a support set: its own part of the state, or what is drawn."""
        own = {name: state[name] for name in self._start}
        return own if self._begin is None else self._begin(own, support)

    def answers(self, state: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
        """Return the predictions under what ``believe`` returns; a pure function."""
        return self.answers_from(self.begin(state, support), support, x)

    def answers_from(self, begun: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
        """Return the predictions from what ``begin`` returns."""
        return predict_each(self.inner, self._believe(begun, support), support, x)

    def answer_task(self, task: Task, prefixes: Sequence[int] = ()) -> TaskAnswers:
        """Return the answers to the next round's task; if they begin at what is drawn, what follows is recorded."""
        if self._begin is None or self.draws_numbers():
            return super().answer_task(task, prefixes)
        self._scored.add(task)

        def answers(state: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
            return self._answer_begun(self.begin(state, support), support, x)

        return answer_task(answers, self.state(), task, prefixes)

    def draws_numbers(self) -> bool:
        """Return whether the model or a rule draws torch's random numbers."""
        return draws_numbers(self.inner)


def _measure_change(before: State, after: State) -> Tensor:
    """Return the norm of the change from one state, which may be empty, to another."""
    return norm({name: value - before[name] if before else value for name, value in after.items()})


def record_update(function: Callable[..., State], rate: Callable[[int], float] | None = None) -> Update:
    """Return an update that is recorded; see ``Recorder``.

    Args:
        function: (state, task) -> the next state; without a round, for each number would need a record of its own.
        rate: of each round; ``function`` is given it as a further argument, a float64 scalar. None for no rate.
    """
    recorded = Recorder(function)
    if rate is None:
        return lambda state, task, round: recorded(state, task)
    return lambda state, task, round: recorded(state, task, torch.tensor(rate(round), dtype=torch.float64))


def _describe(state: State) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(value.shape), value.dtype) for name, value in state.items()}


def apply_from_first_rank(engine: Engine, found: MetaGrad) -> StepReport:
    """Make a meta-step with the first rank's gradient for one task. Collective: all ranks must call it.

    The other ranks contribute zeros with a share of 0, so the step has the same bits for any number of ranks.
    """
    mine = (found, 1.0) if engine.rank == 0 else (zeros(found), 0.0)
    return engine.apply(*(mine if engine.gather is None else engine.gather(*mine)[0]))


def copy_state(state: Mapping[str, Params], keep: TensorFilter | None) -> Params:
    """Return CPU copies of a learner's own ``state`` as ``part.name``; only names that ``keep`` accepts."""
    named = {f"{part}.{name}": value for part, values in state.items() for name, value in values.items()}
    return {name: copy_to_cpu(value) for name, value in named.items() if keep is None or keep(name)}


def restore_state(saved: Params, part: str, like: Params) -> Params:
    """Remove a ``part`` of a learner's own state from ``saved``; return it with the devices and dtypes of ``like``.

    Raises ``ValueError`` if a name is missing or a shape differs.
    """
    return {name: _restore_tensor(saved, f"{part}.{name}", value) for name, value in like.items()}


def _restore_tensor(saved: Params, name: str, like: Tensor) -> Tensor:
    if name not in saved:
        raise ValueError(f"saved is no {name}: {nearest(name, saved)}")
    if saved[name].shape != like.shape:
        raise ValueError(f"saved {name} has shape {tuple(saved[name].shape)}; this model's has {tuple(like.shape)}")
    return saved.pop(name).detach().to(like.device, like.dtype, copy=True)
