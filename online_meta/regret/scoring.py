"""Score tasks, and enforce that each task is scored before it is learned."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from online_meta.answers import Answers, answer_by_inner_loop
from online_meta.batches import count_samples, empty_like, first_tensor, select_samples
from online_meta.functional.autodiff import outside_inference_mode
from online_meta.functional.double_backward import math_attention
from online_meta.inner import Inner
from online_meta.prediction import accuracy_of_prediction, loss_of, nll_of
from online_meta.regret.calibration import count_calibration
from online_meta.types import Batch, Calibration, Learner, Meta, Prediction, PrefixScore, Score, State, Task, Tensors


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


@outside_inference_mode
def answer_task(answers: Answers, state: State, task: Task, prefixes: Sequence[int] = ()) -> TaskAnswers:
    """Return what a learner answers to a task.

    Args:
        answers: the learner's answers.
        state: what it has published.
        task: the task.
        prefixes: numbers of first support samples to answer from as well; those not below the support size are ignored.
    """
    support, query = task
    size = count_samples(support)
    with torch.no_grad(), math_attention():  # To select the kernel at each call of the model is slower.
        return TaskAnswers(
            answers(state, empty_like(support), query.x),
            answers(state, support, query.x),
            tuple(
                (points, answers(state, select_samples(support, slice(points)), query.x))
                for points in prefixes
                if points < size
            ),
        )


def score_answers(found: TaskAnswers, task: Task) -> dict[str, Score]:
    """Score answers to a task: the losses of the predictions of the query set, by the suffixes of the answers.

    The loss before adaptation is that of the answer to an empty support set.
    """
    with torch.no_grad():
        scores = {}
        for suffix, prediction in found.whole.items():
            calibration = count_calibration(prediction, task.query.y, task.query.weight)
            prefix_scores = (
                PrefixScore(points, _loss(part[suffix], task), _accuracy(part[suffix], task))
                for points, part in found.parts
            )
            scores[suffix] = Score(
                _loss(found.before[suffix], task),
                _loss(prediction, task),
                _accuracy(prediction, task, calibration),
                tuple(prefix_scores),
                _nll(prediction, task),
                calibration,
            )
        return scores


def _loss(prediction: Prediction, task: Task) -> float:
    return float(loss_of(prediction, task.query.y, task.query.weight))


def _accuracy(prediction: Prediction, task: Task, calibration: Calibration | None = None) -> float | None:
    """Return the accuracy; None for an outcome without classes. The counts of ``calibration`` save its computation."""
    if any(component.outcome.probabilities is None for component in prediction):
        return None
    samples = 0 if calibration is None or task.query.weight is not None else sum(calibration.samples)
    if calibration is not None and samples and samples == first_tensor(task.query.y).numel():
        return sum(calibration.correct) / samples
    return float(accuracy_of_prediction(prediction, task.query.y, weight=task.query.weight))


def _nll(prediction: Prediction, task: Task) -> float | None:
    """Return the mean negative log-likelihood of the rows; None for an outcome that is no distribution."""
    for outcome in (component.outcome for component in prediction):
        if outcome.loss is not None and outcome.cdf is None and outcome.probabilities is None:
            return None
    rows, weight = nll_of(prediction, task.query.y), task.query.weight
    if weight is None:
        return float(rows.mean())
    weight = weight.to(rows)
    return float((weight * rows).sum() / weight.sum())


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

    @abstractmethod
    def state(self) -> State:
        """Return what the learner publishes."""

    @abstractmethod
    def answers(self, state: State, support: Batch, x: Tensors) -> dict[str, Prediction]:
        """Return its predictions from what it published and a support set; a pure function."""

    def answer_task(self, task: Task, prefixes: Sequence[int] = ()) -> TaskAnswers:
        """Return the answers to the next round's task, which are to be scored; this does not change the learner."""
        self._scored.add(task)
        return answer_task(self.answers, self.state(), task, prefixes)

    def scores(self, task: Task, prefixes: Sequence[int] = ()) -> dict[str, Score]:
        """Return a score for each of ``answers`` to the next round's task, without changing the learner."""
        return score_answers(self.answer_task(task, prefixes), task)

    def score(self, task: Task, prefixes: Sequence[int] = ()) -> Score:
        """Return the score of the learner's own answer."""
        return self.scores(task, prefixes)[""]
