"""Cut rows without task boundaries by the loss of the run's own leader after it has adapted to their task.

A leader that has learned more cuts better, so each task begins only after all earlier ones have been learned. The
leader also depends on tasks from other sources, so another run may cut the same rows differently. Within a run the
guarantees hold, because each task is committed together with the position where it ends.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt, MinLen
from torch import Tensor

from online_meta.answers import Answers
from online_meta.batches import count_samples
from online_meta.batching.failures import describe_failure, is_task_failure
from online_meta.changepoints.leader_likelihood import ADAPTATION_SIZES, leader_likelihood
from online_meta.changepoints.segments import Likelihood, Segmenter
from online_meta.changepoints.task_free import estimate_errors, make_task
from online_meta.regret.scoring import answer_task, score_answers, truncate_support
from online_meta.types import Batch, Belief, LossFn, Score, State, Task
from streams.formats.rows import EncodeRow, Row
from streams.segmenting.by_change import cut_by_change, read_sample
from streams.segmenting.cutting import Cut, RowSource
from streams.spec import TaskSpec
from streams.types import Arrival, Rejected, TaskSource

log = logging.getLogger(__name__)


class LeaderContext(NamedTuple):
    """The access to the run that a source needs which cuts by the leader.

    Attributes:
        answers: what the learner answers with, which is scored, under the name "".
        believe: adapts the published state of the learner that answers to a support set, as it does when it answers.
        loss: the model's loss.
        squared_error: whether it is a mean squared error; otherwise it counts as a negative log-likelihood.
        latest_leader: returns the newest published state and the number of rounds that it has learned.
        count_rounds: returns the number of committed rounds.
        latest_tasks: returns the tasks of the newest n rounds, or fewer if fewer are retained.
    """

    answers: Answers
    believe: Callable[[State, Batch], Belief]
    loss: LossFn
    squared_error: bool
    latest_leader: Callable[[], tuple[State, int]]
    count_rounds: Callable[[], int]
    latest_tasks: Callable[[int], Sequence[Task]]


class NeedsLeader(NamedTuple):
    """A source that needs access to the run's leader: ``create(leader)`` returns it, or raises ``ValueError``."""

    create: Callable[[LeaderContext], TaskSource]


class LeaderOptions(NamedTuple):
    """Options of the likelihood "leader".

    Attributes:
        sizes: the numbers of samples of a task that the leader adapts on, ascending.
        window: the number of newest tasks from which expected errors are estimated.
        shape: the shape parameter of the errors' distribution; the smaller it is, the more tasks differ in difficulty.
    """

    sizes: Annotated[Sequence[Annotated[int, Ge(1)]], MinLen(1)] = ADAPTATION_SIZES
    window: Annotated[int, Ge(1)] = 20
    shape: Annotated[float, Gt(0)] = 1.0


class _OpenTask(NamedTuple):
    """A task that has begun.

    Attributes:
        state: the published state of the leader that cuts it.
        cut: the cut by that leader.
        memory: the state of the cut.
        first: the first rows of the task.
        rows: the number of its rows.
    """

    state: State
    cut: Cut
    memory: object
    first: tuple[Row, ...]
    rows: int


def cut_by_leader(
    leader: LeaderContext,
    options: LeaderOptions,
    segmenter: Callable[[Likelihood], Segmenter],
    encode: EncodeRow,
    spec: TaskSpec,
    most: int,
) -> Cut:
    """Return a cut by the loss of the leader as it is when the first row of a task arrives.

    The expected errors are those of the last tasks, scored by the leader that cut them, before it learned them. At the
    start they are those of the newest rounds, which the leader may have learned, and therefore slightly too small.

    If the model raises an exception on a row, the task ends before this row, and the next one begins with it. If the
    model also fails on the row alone, the row is rejected with the reason "model_error".

    Args:
        leader: access to the run.
        options: options of the likelihood.
        segmenter: builds the change detector for a likelihood.
        encode: returns the sample of a row and its label or target.
        spec: the shape and dtypes of the run's tasks.
        most: the largest number of rows in a task.

    Raises:
        ValueError: if an option is unknown or out of range, or the model cannot score single samples.
    """
    x, y = _empty_sample(spec)
    scores: deque[Score] = deque(maxlen=options.window)

    def score_rows(state: State, rows: Sequence[Row]) -> None:
        samples = [read_sample(row, encode, spec.ways) for row in rows]
        task = make_task([sample for sample in samples if sample is not None], options.sizes)
        if task is not None:
            scores.extend(_try_score(leader, state, task, options))

    def likelihood(state: State) -> Likelihood:
        errors = estimate_errors(scores, options.sizes, options.shape) if leader.squared_error else None
        believe = partial(leader.believe, state)
        return leader_likelihood(believe, leader.loss, x, y, sizes=options.sizes, errors=errors, shape=options.shape)

    def start_task() -> _OpenTask:
        state, _ = leader.latest_leader()
        if leader.squared_error and not scores:
            scores.extend(_score_latest(leader, state, options))
        cut = cut_by_change(segmenter(likelihood(state)), encode, spec.ways, most)
        return _OpenTask(state, cut, cut.start(), (), 0)

    def update(open_task: _OpenTask | None, row: Row) -> tuple[_OpenTask, int]:
        open_task = open_task or start_task()
        memory, count = _update_cut(open_task, row)
        first = open_task.first if len(open_task.first) == 2 * max(options.sizes) else (*open_task.first, row)
        if count and leader.squared_error:
            score_rows(open_task.state, first[:count])
        return open_task._replace(memory=memory, first=first, rows=open_task.rows + 1), count

    checked = likelihood(leader.latest_leader()[0])
    segmenter(checked)
    _check_likelihood(checked, x, y)
    return Cut(lambda: None, update)


class LeaderSource:
    """A ``TaskSource`` over rows that begins a task only after the leader has learned all earlier ones."""

    def __init__(self, samples: RowSource, leader: LeaderContext) -> None:
        """Take ``samples``, whose cut is ``cut_by_leader``."""
        self._samples = samples
        self._leader = leader
        self._unacked = 0

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the tasks after a position; None while no task is complete or the last one is not learned."""
        self._unacked = 0
        for arrival in self._samples.read(after):
            self._unacked += arrival is not None
            yield arrival
            if arrival is not None:
                yield from self._wait_until_learned()

    def ack(self, arrivals: Sequence[Arrival]) -> None:
        """Count arrivals that are durable or were rejected."""
        self._unacked -= len(arrivals)

    def _wait_until_learned(self) -> Iterator[None]:
        while self._unacked > 0:
            yield None
        count_rounds = self._leader.count_rounds()
        while self._leader.latest_leader()[1] < count_rounds:
            yield None


def _empty_sample(spec: TaskSpec) -> tuple[Tensor, Tensor]:
    """Return a sample, and a label or target, of zeros."""
    y_dtype = torch.int64 if spec.y == "class" else torch.float32
    x_shape = spec.require_single_input("change")
    return torch.zeros(x_shape, dtype=getattr(torch, spec.x_dtype)), torch.zeros(spec.y_shape, dtype=y_dtype)


def _score_latest(leader: LeaderContext, state: State, options: LeaderOptions) -> Iterator[Score]:
    """Yield scores of the newest rounds, each with a support set of the size that ``make_task`` would give it."""
    for task in leader.latest_tasks(options.window):
        size = max((size for size in options.sizes if size <= count_samples(task.support)), default=0)
        if size:
            yield from _try_score(leader, state, truncate_support(task, size), options)


def _update_cut(open_task: _OpenTask, row: Row) -> tuple[object, int]:
    """Return what the cut of a task returns for its next row; if the model fails, the task ends before this row.

    Raises ``Rejected`` if the model fails on the first row.
    """
    try:
        return open_task.cut.update(open_task.memory, row)
    except (Exception, SystemExit) as error:
        failure = _describe_model_failure(error)
        if not open_task.rows:
            raise Rejected("model_error", f"the model fails on the row at {row.begin}: {failure}") from error
        log.warning("a task ends before the row at %d, on which the model fails: %s", row.begin, failure)
        return open_task.memory, open_task.rows


def _try_score(leader: LeaderContext, state: State, task: Task, options: LeaderOptions) -> list[Score]:
    """Return the score of a task; none if the model raises an exception on it."""
    try:
        return [_score(leader, state, task, options.sizes)]
    except (Exception, SystemExit) as error:
        log.warning("a task is not used for the expected errors: %s", _describe_model_failure(error))
        return []


def _describe_model_failure(error: BaseException) -> str:
    """Return an exception of the model as one line; raise it if it is due to the machine."""
    if is_task_failure(error) or isinstance(error, SystemExit):  # a SystemExit would end the thread
        return describe_failure(error)
    raise error


def _score(leader: LeaderContext, state: State, task: Task, sizes: Sequence[int]) -> Score:
    """Score the leader's answer to a task, also after the first ``sizes`` samples of its support set."""
    return score_answers(answer_task(leader.answers, state, task, sizes), task)[""]


def _check_likelihood(likelihood: Likelihood, x: Tensor, y: Tensor) -> None:
    """Raise ``ValueError`` if the likelihood cannot score a single sample."""
    try:
        runs = likelihood.start()
        likelihood.score(likelihood.update(runs, x, y), x, y)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
        raise ValueError(f"likelihood = 'leader': the model cannot score single samples: {fault}") from error
