"""Run one learner on a stream of tasks in memory, for the tables that compare learners."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from deploy.commands.compare import Replay, collect_entries, describe_failures, play_replays
from deploy.exits import CommandError
from deploy.reports.comparison import Entry
from online_meta.learners import LearnerContext, MemoryReplayBuffer
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.regret.ledger import MAIN_LEARNER, Comparator
from online_meta.regret.scoring import score_task
from online_meta.rules.adam import adam
from online_meta.types import Learner, Meta, Score, Task
from rich.progress import Progress
from torch import Tensor, nn
from trainers.build import build_context, build_learners
from trainers.comparators import RefreshRequest, dynamic
from trainers.loop.batching_plan import PlanSelector
from trainers.models import mlp
from trainers.settings import TrainerSettings


class Centred(nn.Module):
    """Subtract the mean of each channel from the images before they enter a network.

    The colour of the background then matters less, and inverting an image flips its sign.
    """

    def __init__(self, network: nn.Module) -> None:
        """Wrap ``network``."""
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, ..., height, width) of 0..255 to logits (n, ways)."""
        shades = images.to(next(self.network.parameters()).dtype) / 255
        logits: Tensor = self.network(shades - shades.mean((-2, -1), keepdim=True))
        return logits


def centred_mlp(inputs: int, ways: int, hidden: Sequence[int]) -> nn.Module:
    """Return a perceptron on images with ``inputs`` values, with layers of ``hidden`` units."""
    return Centred(mlp(inputs, ways, tuple(hidden)))


TUNED = "FTML's start, trained as from scratch"
"""The label in the tables for the scores of ``train_leader``, which are a by-product of FTML's runs."""


class Round(NamedTuple):
    """Result of one round.

    Attributes:
        learner: the learner, after it has learned the task.
        score: the score on the task before it was learned.
        seconds: CPU seconds for scoring and learning.
    """

    learner: Learner
    score: Score
    seconds: float


def play_stream(
    settings: TrainerSettings,
    name: str,
    tasks: Iterable[Task],
    programs: Path,
    change: Callable[[LearnerContext], LearnerContext] = lambda context: context,
    prefixes_from: int = 0,
    on_task: Callable[[Learner, Task], None] = lambda learner, task: None,
) -> Iterator[Round]:
    """Run a learner on a stream with one thread, and yield its rounds.

    After the first round, a learner that sums meta-gradients selects an execution plan for tasks of that shape. The
    plan is compiled if the settings ask for it.

    Args:
        settings: the settings of the run.
        name: the name of FTML or of one of the baselines in ``settings``.
        tasks: the stream.
        programs: the folder for compiled programs.
        change: maps the context that the learner is built from.
        prefixes_from: the first round in which prefixes of the support set are scored.
        on_task: called with the learner and each task before it is scored. Its time is not counted.
    """
    torch.set_num_threads(1)
    context = change(build_context(settings, MemoryReplayBuffer(), programs))
    learner = build_learners(settings, context)[name]
    for round, task in enumerate(tasks):
        on_task(learner, task)
        began = time.process_time()
        score = learner.score(task, settings.regret.prefixes if round >= prefixes_from else ())
        learner.learn(task)
        yield Round(learner, score, time.process_time() - began)
        if round == 0 and hasattr(learner, "task_sum"):
            find_plans(settings, {name: learner}, context, programs)


class Training(NamedTuple):
    """How *from scratch* trains a network on a support set: ``steps`` of Adam with learning rate ``lr``."""

    steps: int
    lr: float


def train_leader(settings: TrainerSettings, training: Training, learner: Learner, task: Task) -> Score:
    """Train a learner's leader on a task as *from scratch* trains random weights, and return its score.

    This measures the value of the initialisation when both adapt in the same way. Raises ``TypeError`` for a learner
    that follows no leader.
    """
    if not isinstance(learner, FollowTheMetaLeader):
        raise TypeError(f"a {type(learner).__name__} has no leader")
    context = build_context(settings, MemoryReplayBuffer())
    inner = replace(context.inner, rule=adam(training.lr), steps=training.steps)
    return score_task(inner, Meta(learner.engine.meta().weights, {}), task, settings.regret.prefixes)


def finish_replays(replays: dict[str, list[Replay]], jobs: int) -> dict[str, list[Entry]]:
    """Play replays, ``jobs`` in parallel, and return what they recorded, under the same keys.

    What is finished is not played again. Raises ``CommandError`` if one fails; the others are played first.
    """
    rounds: dict[Replay, int] = {}
    every = [one for some in replays.values() for one in some]
    with Progress() as progress:
        bar = progress.add_task("rounds", total=sum(one.rounds for one in every))

        def show(one: Replay, played: int) -> None:
            rounds[one] = played
            progress.update(bar, completed=sum(rounds.values()))

        failures = play_replays(every, jobs, show)
    if failures:
        raise CommandError(failures[0].code, "; ".join(describe_failures(failures)))
    return {key: collect_entries(some) for key, some in replays.items()}


def build_past_context(settings: TrainerSettings, tasks: Sequence[Task]) -> LearnerContext:
    """Return the context of a run that has learned all ``tasks``, which are kept in memory."""
    buffer = MemoryReplayBuffer()
    for t, task in enumerate(tasks):
        buffer.add(t, task)
    return build_context(settings, buffer)


def find_task_optima(settings: TrainerSettings, tasks: Sequence[Task], programs: Path) -> Comparator:
    """Estimate the loss of the best initialisation for each task, with the comparator ``dynamic``.

    The search starts from FTML's last leader, as a daemon starts from its newest leader. From random weights it ends
    in poor minima, above the loss of the learners.
    """
    *_, last = play_stream(without_prefixes(settings), MAIN_LEARNER, tasks, programs)
    assert isinstance(last.learner, FollowTheMetaLeader)
    request = RefreshRequest(len(tasks), warm_start=last.learner.engine.meta())
    result = dynamic.refresh(build_past_context(settings, tasks), settings.regret, request, None)
    assert result is not None, "nothing stops the search"
    return result.comparator


def without_prefixes(settings: TrainerSettings) -> TrainerSettings:
    """Return the settings without the scoring of prefixes."""
    return replace(settings, regret=replace(settings.regret, prefixes=()))


def find_plans(
    settings: TrainerSettings, learners: Mapping[str, Learner], context: LearnerContext, programs: Path
) -> None:
    """Select execution plans for learners that sum meta-gradients, for tasks of the shape of the first one."""
    plan_selector = PlanSelector(learners, settings.engine, settings.meta.batch, programs, 0.0)
    like = [context.buffer[0]]
    plan_selector.find({}, like)
    plan_selector.wait()
    plan_selector.follow(plan_selector.find({}, like))
    plan_selector.close()
