"""One learner on a stream of tasks in memory, as the tables of learners play it."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from online_meta.learners import LearnerContext, MemoryReplayBuffer
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.regret.ledger import MAIN_LEARNER, Comparator
from online_meta.regret.scoring import score_task
from online_meta.rules.adam import adam
from online_meta.types import Learner, Meta, ReplayBuffer, Score, Task
from torch import Tensor, nn
from trainers.build import build_context, build_learners
from trainers.comparators import RefreshRequest, dynamic
from trainers.loop.batching_plan import PlanSelector
from trainers.models import mlp
from trainers.settings import TrainerSettings


class Centred(nn.Module):
    """A network that sees each channel of an image without its mean.

    So the colour of the ground matters less, and an inverted image is the negative of what it was.
    """

    def __init__(self, network: nn.Module) -> None:
        """Put the images through ``network``."""
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, ..., height, width) of 0..255 to logits (n, ways)."""
        shades = images.to(next(self.network.parameters()).dtype) / 255
        logits: Tensor = self.network(shades - shades.mean((-2, -1), keepdim=True))
        return logits


def centred_mlp(inputs: int, ways: int, hidden: Sequence[int]) -> nn.Module:
    """Return a perceptron of images of so many numbers, with layers of ``hidden`` units."""
    return Centred(mlp(inputs, ways, tuple(hidden)))


TUNED = "FTML's start, trained as from scratch"
"""What tables call the scores of ``train_leader``: no run of its own, it stands beside FTML's."""


class Round(NamedTuple):
    """A round that was played: its ``score`` came before the ``learner`` learned its task, ``seconds`` are the CPU's.

    They are those of scoring and of learning.
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
    look: Callable[[Learner, Task], None] = lambda learner, task: None,
) -> Iterator[Round]:
    """Play a stream by the learner of a ``name``, FTML or one of the baselines of ``settings``; yield its rounds.

    It takes one thread. Learners that sum meta-gradients go by a path for tasks like the first that they remember,
    found (and compiled, if the settings say so) after its round; programs lie in the folder ``programs``. What
    learners are made from is as ``change`` returns it, tasks lying in memory. Before the round ``prefixes_from`` no
    prefix of a support set is judged. ``look`` is shown the learner and each task before it is learned; its time is
    not counted.
    """
    torch.set_num_threads(1)
    context = change(build_context(settings, MemoryReplayBuffer(), programs))
    learner = build_learners(settings, context)[name]
    for round, task in enumerate(tasks):
        look(learner, task)
        began = time.process_time()
        score = learner.score(task, settings.regret.prefixes if round >= prefixes_from else ())
        learner.learn(task)
        yield Round(learner, score, time.process_time() - began)
        if round == 0 and hasattr(learner, "task_sum"):
            _find_path(
                PlanSelector({name: learner}, settings.engine, settings.meta.batch, programs, 0.0), context.buffer
            )


class Training(NamedTuple):
    """How *from scratch* trains a network on a support set: so many ``steps`` of Adam with the rate ``lr``."""

    steps: int
    lr: float


def train_leader(settings: TrainerSettings, training: Training, learner: Learner, task: Task) -> Score:
    """Return the score of a learner's leader that is trained on a task as *from scratch* trains random weights.

    What the start is worth where both adapt alike. Raises ``TypeError`` for a learner that follows no leader.
    """
    if not isinstance(learner, FollowTheMetaLeader):
        raise TypeError(f"a {type(learner).__name__} has no leader")
    context = build_context(settings, MemoryReplayBuffer())
    inner = replace(context.inner, rule=adam(training.lr), steps=training.steps)
    return score_task(inner, Meta(learner.engine.meta().weights, {}), task, context.accuracy, settings.regret.prefixes)


def set_up_past(settings: TrainerSettings, tasks: Sequence[Task]) -> LearnerContext:
    """Return the set-up of a run whose rounds have all been played, its tasks lying in memory."""
    buffer = MemoryReplayBuffer()
    for t, task in enumerate(tasks):
        buffer.add(t, task)
    return build_context(settings, buffer)


def find_own_bests(settings: TrainerSettings, tasks: Sequence[Task], programs: Path) -> Comparator:
    """Return what each task's own best start would have lost, as ``dynamic`` estimates it.

    It is looked for from where FTML has come to in the end, as a daemon looks from its newest leader: from random
    weights the steps end in poor minima, above what learners lose.
    """
    *_, last = play_stream(without_prefixes(settings), MAIN_LEARNER, tasks, programs)
    assert isinstance(last.learner, FollowTheMetaLeader)
    request = RefreshRequest(len(tasks), warm_start=last.learner.engine.meta())
    result = dynamic.refresh(set_up_past(settings, tasks), settings.regret, request, None)
    assert result is not None, "nobody tells it to stop"
    return result.comparator


def without_prefixes(settings: TrainerSettings) -> TrainerSettings:
    """Return the settings of a run whose learning efficiency is not looked at."""
    return replace(settings, regret=replace(settings.regret, prefixes=()))


def _find_path(plan_selector: PlanSelector, buffer: ReplayBuffer) -> None:
    like = [buffer[0]]
    plan_selector.find({}, like)
    plan_selector.wait()
    plan_selector.follow(plan_selector.find({}, like))
    plan_selector.close()
