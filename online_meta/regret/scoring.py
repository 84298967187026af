"""Score tasks, and enforce that each task is scored before it is learned."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from online_meta.answers import Answers, answer_by_inner_loop
from online_meta.batches import count_samples, empty_like, select_samples
from online_meta.functional.autodiff import outside_inference_mode
from online_meta.functional.double_backward import math_attention
from online_meta.functional.recording import Recorder
from online_meta.inner import Inner
from online_meta.prediction import accuracy_of_prediction, loss_of, nll_of
from online_meta.regret.calibration import count_in_bins, from_numbers
from online_meta.types import Batch, Learner, Meta, Prediction, PrefixScore, Score, State, Task, Tensors
from online_meta.uncertainty import std_of


class OrderError(RuntimeError):
    """Tasks were learned and scored in the wrong order, so a score could depend on its own task."""


class TaskAnswers(NamedTuple):
    """What a learner answers to a task, by the suffixes of its answers.

    Attributes:
        before: the predictions of the query set from an empty support set.
        whole: those from the whole support set.
        parts: the numbers of first support samples that were asked for, each with the predictions from these alone.
    """

    before: dict[str, Prediction]
    whole: dict[str, Prediction]
    parts: tuple[tuple[int, dict[str, Prediction]], ...] = ()


def answer_task(answers: Answers, state: State, task: Task, prefixes: Sequence[int] = ()) -> TaskAnswers:
    """Return what a learner answers to a task.

    Args:
        answers: the learner's answers.
        state: what it has published.
        task: the task.
        prefixes: numbers of first support samples to answer from as well; those not below the support size are ignored.
    """
    return answer_query(answers, state, task.support, task.query.x, tuple(prefixes))


@outside_inference_mode
def answer_query(
    answers: Answers, state: State, support: Batch, x: Tensors, prefixes: tuple[int, ...] = ()
) -> TaskAnswers:
    """Return what a learner answers to a support set and the inputs of a query set; see ``answer_task``."""
    size = count_samples(support)
    with torch.no_grad(), math_attention():  # To select the kernel at each call of the model is slower.
        return TaskAnswers(
            answers(state, empty_like(support), x),
            answers(state, support, x),
            tuple(
                (points, answers(state, select_samples(support, slice(points)), x))
                for points in prefixes
                if points < size
            ),
        )


class Measured(NamedTuple):
    """The figures of a score as one vector of float64, and what is in it.

    Attributes:
        numbers: loss before and after, then the accuracy, the negative log-likelihood, the counts of calibration and
            the sharpness, each if there is one, then loss and, if there is one, accuracy of each prefix.
        has_accuracy: whether there are accuracies.
        has_nll: whether there is a negative log-likelihood.
        counts: how many counts there are.
        has_sharpness: whether there is a sharpness.
        prefixes: the numbers of support samples of the prefixes.
    """

    numbers: Tensor
    has_accuracy: bool
    has_nll: bool
    counts: int
    has_sharpness: bool
    prefixes: tuple[int, ...]


Measure = Callable[[TaskAnswers, Tensors, Tensor | None], dict[str, Measured]]
"""(answers, targets, weights of the rows) -> the figures of each answer; see ``measure_answers``."""


def measure_answers(found: TaskAnswers, y: Tensors, weight: Tensor | None) -> dict[str, Measured]:
    """Return the figures of answers to a query set with targets ``y``, by the suffixes of the answers.

    What is in them depends on the kinds of outcomes, not on values.
    """
    with torch.no_grad():
        return {suffix: _measure(found, suffix, y, weight) for suffix in found.whole}


def _measure(found: TaskAnswers, suffix: str, y: Tensors, weight: Tensor | None) -> Measured:
    prediction = found.whole[suffix]
    figures = [loss_of(found.before[suffix], y, weight), loss_of(prediction, y, weight)]
    has_accuracy = all(component.outcome.probabilities is not None for component in prediction)
    if has_accuracy:
        figures.append(accuracy_of_prediction(prediction, y, weight=weight))
    nll, counts = _nll(prediction, y, weight), count_in_bins(prediction, y, weight)
    if nll is not None:
        figures.append(nll)
    if counts is not None:
        figures.append(counts)
    sharpness = None if has_accuracy else _mean_std(prediction, weight)
    if sharpness is not None:
        figures.append(sharpness)
    for _, part in found.parts:
        figures.append(loss_of(part[suffix], y, weight))
        if has_accuracy:
            figures.append(accuracy_of_prediction(part[suffix], y, weight=weight))
    return Measured(
        torch.cat([figure.double().reshape(-1).cpu() for figure in figures]),
        has_accuracy,
        nll is not None,
        0 if counts is None else len(counts),
        sharpness is not None,
        tuple(points for points, _ in found.parts),
    )


def _nll(prediction: Prediction, y: Tensors, weight: Tensor | None) -> Tensor | None:
    """Return the mean negative log-likelihood of the rows; None for an outcome that is no distribution."""
    for outcome in (component.outcome for component in prediction):
        if outcome.loss is not None and outcome.cdf is None and outcome.probabilities is None:
            return None
    rows = nll_of(prediction, y)
    if weight is None:
        return rows.mean()
    weight = weight.to(rows)
    return (weight * rows).sum() / weight.sum()


def _mean_std(prediction: Prediction, weight: Tensor | None) -> Tensor | None:
    """Return the mean standard deviation of the targets; None if an outcome has none."""
    std = std_of(prediction)
    if std is None:
        return None
    rows = std.flatten(1).mean(1) if std.ndim > 1 else std
    if weight is None:
        return rows.mean()
    weight = weight.to(rows)
    return (weight * rows).sum() / weight.sum()


def score_answers(found: TaskAnswers, task: Task, measure: Measure = measure_answers) -> dict[str, Score]:
    """Score answers to a task: the losses of the predictions of the query set, by the suffixes of the answers.

    The loss before adaptation is that of the answer to an empty support set.

    Args:
        found: the answers.
        task: the task.
        measure: computes what ``measure_answers`` does.
    """
    return {suffix: _to_score(one) for suffix, one in measure(found, task.query.y, task.query.weight).items()}


def _to_score(measured: Measured) -> Score:
    numbers = iter(measured.numbers.tolist())
    before, after = next(numbers), next(numbers)
    accuracy = next(numbers) if measured.has_accuracy else None
    nll = next(numbers) if measured.has_nll else None
    counts = [next(numbers) for _ in range(measured.counts)]
    sharpness = next(numbers) if measured.has_sharpness else None
    prefixes = tuple(
        PrefixScore(points, next(numbers), next(numbers) if measured.has_accuracy else None)
        for points in measured.prefixes
    )
    return Score(before, after, accuracy, prefixes, nll, from_numbers(counts) if counts else None, sharpness)


def score_task(inner: Inner, meta: Meta, task: Task, prefixes: Sequence[int] = ()) -> Score:
    """Return the query losses f(w) and f(U(w)) before and after adapting meta-parameters w with the inner loop U."""
    own = replace(inner, answer_steps=(), answer_heads=(), answer_rules=())  # Further answers would be thrown away.
    answers: Answers = lambda state, support, x: answer_by_inner_loop(own, meta, support, x)  # noqa: E731
    return score_answers(answer_task(answers, {}, task, prefixes), task)[""]


def truncate_support(task: Task, points: int) -> Task:
    """Return the task with only the first ``points`` samples of its support set."""
    return task._replace(support=select_samples(task.support, slice(points)))


def points_needed(score: Score, size: int, proficiency: float) -> int | None:
    """Return the smallest scored number of support samples that reaches ``proficiency``; None if none does.

    This is the learning efficiency of Finn et al. (ICML 2019, section 5), among the scored prefixes and the whole
    support set of ``size`` samples. The proficiency is a minimum accuracy, or, without accuracies, a maximum loss.
    """
    whole = PrefixScore(size, score.loss_after, score.accuracy)
    for found in (*score.prefixes, whole):
        if found.loss <= proficiency if found.accuracy is None else found.accuracy >= proficiency:
            return found.points
    return None


def answer_as_scored(learner: Learner, task: Task, prefixes: Sequence[int] = ()) -> TaskAnswers:
    """Return a learner's answers to the next round's task, which count as scored; see ``answer_task``.

    A learner that is no ``ScoredLearner`` is scored twice: once by its own ``scores``, which may count its tasks.
    """
    if isinstance(learner, ScoredLearner):
        return learner.answer_task(task, prefixes)
    learner.scores(task, prefixes)
    return answer_task(learner.answers, learner.state(), task, prefixes)


class ScoredTasks:
    """The queue of tasks that have been scored but not yet learned."""

    def __init__(self) -> None:
        """Start with no tasks."""
        self._tasks: list[Task] = []

    def add(self, task: Task) -> int:
        """Add a scored ``task`` (twice in a row counts once); return the number of tasks before it."""
        if not (self._tasks and self._tasks[-1] is task):
            self._tasks.append(task)
        return len(self._tasks) - 1

    def last(self) -> Task | None:
        """Return the task that was scored last, if it has not been learned."""
        return self._tasks[-1] if self._tasks else None

    def check_none(self) -> None:
        """Raise ``OrderError`` if a scored task has not been learned: its score could not be reproduced."""
        if self._tasks:
            raise OrderError(f"{len(self._tasks)} task(s) were scored but not learned: call learn() first")

    def take(self, tasks: Sequence[Task]) -> None:
        """Check that ``tasks`` are all scored tasks in their order, and clear the queue.

        Raises ``OrderError`` if a task was not scored, a scored one is missing, or there are none.
        """
        same = len(tasks) == len(self._tasks) and all(a is b for a, b in zip(tasks, self._tasks, strict=True))
        if not same or not tasks:
            raise OrderError(
                f"learn() got {len(tasks)} task(s), but {len(self._tasks)} are scored: score every task before "
                "learning it, and pass all scored tasks to learn() in their order"
            )
        self._tasks.clear()


class ScoredLearner(ABC):
    """A learner that is scored by what it answers, and that learns only what was scored before.

    A subclass calls ``self._scored.take(tasks)`` in ``learn``, and makes ``_scored`` anew in ``load``.
    """

    def __init__(self) -> None:
        """Start with no tasks that were scored but not learned."""
        self._scored = ScoredTasks()
        self._answer_query = Recorder(partial(answer_query, self.answers))

    @abstractmethod
    def state(self) -> State:
        """Return what the learner publishes."""

    @abstractmethod
    def answers(self, state: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
        """Return its predictions from what it published and a support set; a pure function."""

    def answer_task(self, task: Task, prefixes: Sequence[int] = ()) -> TaskAnswers:
        """Return the answers to the next round's task, which are to be scored; this does not change the learner."""
        self._scored.add(task)
        if self.draws_numbers():
            return answer_task(self.answers, self.state(), task, prefixes)
        return self._answer_query(self.state(), task.support, task.query.x, tuple(prefixes))

    def draws_numbers(self) -> bool:
        """Return whether the answers draw torch's random numbers, so that they cannot be recorded."""
        return False

    def scores(self, task: Task, prefixes: Sequence[int] = ()) -> dict[str, Score]:
        """Return a score for each of ``answers`` to the next round's task, without changing the learner."""
        return score_answers(self.answer_task(task, prefixes), task)

    def score(self, task: Task, prefixes: Sequence[int] = ()) -> Score:
        """Return the score of the learner's own answer."""
        return self.scores(task, prefixes)[""]
