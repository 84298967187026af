"""One learner on a stream of tasks in memory, as the tables of learners play it."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from online_meta.past import MemoryPast
from online_meta.types import Learner, Past, Score, Task
from trainers.build import build_learners, build_setup
from trainers.paths import Steering
from trainers.settings import TrainerSettings


class Round(NamedTuple):
    """A round that was played: its ``score`` came before the ``learner`` learned its task, ``seconds`` are the CPU's.

    They are those of scoring and of learning.
    """

    learner: Learner
    score: Score
    seconds: float


def play_stream(
    settings: TrainerSettings, name: str, tasks: Iterable[Task], programs: Path, past: Past | None = None
) -> Iterator[Round]:
    """Play a stream by the learner of a ``name``, FTML or one of the baselines of ``settings``; yield its rounds.

    It takes one thread. Learners that sum meta-gradients go by a path for tasks like the first, found (and compiled,
    if the settings say so) before its round begins; programs lie in the folder ``programs``. ``past`` is where tasks
    are remembered, by default in memory.
    """
    torch.set_num_threads(1)
    setup = build_setup(settings, MemoryPast() if past is None else past, programs)
    learner = build_learners(settings, setup)[name]
    for place, task in enumerate(tasks):
        if place == 0:
            _find_path(Steering({name: learner}, settings.engine, settings.meta.batch, programs, 0.0), task)
        began = time.process_time()
        score = learner.score(task, settings.regret.prefixes)
        learner.learn(task)
        yield Round(learner, score, time.process_time() - began)


def _find_path(steering: Steering, task: Task) -> None:
    steering.find({}, [task])
    steering.wait()
    steering.follow(steering.find({}, [task]))
    steering.close()
