"""Runs on rainbow digits by the protocol of Follow the Meta-Leader: settings, tasks, minibatches and rows."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from online_meta.batches import select_samples
from online_meta.learners import LearnerContext, MemoryReplayBuffer
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.replay import generator
from online_meta.types import Batch, Learner, Meta, MetaGrad, PrefixScore, Score, Task
from streams.sources.rainbow_digits import load_digits, make_task
from tests.experiments.common.playing import Training, centred_mlp, play_stream, train_leader
from tests.experiments.common.tables import Row, load_row, read_commit, save_row
from torch import nn
from trainers.learner_settings import POOL
from trainers.settings import (
    EngineSettings,
    InnerSettings,
    MetaSettings,
    ModelSettings,
    RegretSettings,
    TrainerSettings,
)

WARM_UP = 20
HIDDEN = (100, 100)
TRAIN, TEST = 90, 10
"""Training images and test images per class in a task."""

PREFIXES = (10, 20, 50, 100, 200, 400)
ORDER, DRAWN = 1, 2
"""Separate the random draws of the order of images, and of minibatches, from others with the same seed."""


Curve = list[list[float | None]]
"""The accuracies on one task: pairs of a number of images and the accuracy after adapting to them."""


class Entry(NamedTuple):
    """One run: a learner, the number of its tasks, and the seed."""

    label: str
    rounds: int
    seed: int


LABELS = {
    "FTML": MAIN_LEARNER,
    "train on everything": "train_on_everything",
    "FTL + fine-tuning": "ftl_fine_tune",
    "from scratch": "from_scratch",
    "online Reptile": "online_reptile",
    "MOML": "moml",
    "pool": POOL,
}
STEPS = 30
OPTIONS: dict[str, dict[str, Any]] = {
    "from_scratch": {"steps": 40, "lr": 0.005},
    "moml": {"alpha": 0.1, "steps": 5 * STEPS},
}
DRAWS = (20, 20)
"""Sizes of the support set and of the query set that a meta-gradient draws from a past task."""


def digits_mlp() -> nn.Module:
    """Return the perceptron of the table."""
    return centred_mlp(3 * 28 * 28, 10, HIDDEN)


def make_settings(label: str, seed: int) -> TrainerSettings:
    """Return the settings of a run."""
    name = LABELS[label]
    others = () if name == MAIN_LEARNER else (name,)
    own = {name: OPTIONS[name]} if name in OPTIONS else {}
    return TrainerSettings(
        ModelSettings("tests.experiments.rainbow.runs:digits_mlp"),
        InnerSettings(steps=5, lr=0.1),
        MetaSettings(lr=1e-3, steps_per_round=STEPS, batch=25),
        regret=RegretSettings(
            comparator=(), baselines=others, options=own, prefixes=PREFIXES, baseline_optimizer="meta"
        ),
        engine=EngineSettings(batching="traced"),
        seed=seed,
    )


def make_tasks(seed: int, rounds: int) -> list[Task]:
    """Return the first tasks of a seed's stream, with their images in random order."""
    digits = load_digits()
    return [_shuffle(make_task(digits, seed, t, TRAIN, TEST), seed, t) for t in range(rounds)]


def _shuffle(task: Task, seed: int, t: int) -> Task:
    return task._replace(support=_draw_samples(task.support, len(task.support.x), seed, ORDER, t))


def _draw_samples(batch: Batch, count: int, *key: int) -> Batch:
    """Return ``count`` random samples of a batch, or all of them in random order if there are fewer."""
    chosen = torch.from_numpy(generator(*key).permutation(len(batch.x))[:count])
    return select_samples(batch, chosen)


class MinibatchBuffer(MemoryReplayBuffer):
    """A replay buffer that draws new images at every access: the minibatches D_k^tr and D_k^val of the paper."""

    def __init__(self, seed: int) -> None:
        """Create an empty buffer; the images are a function of ``seed`` and of the number of accesses."""
        super().__init__()
        self._seed, self._accesses = seed, 0

    def __getitem__(self, round: int, /) -> Task:
        """Return a minibatch of the task of that round."""
        return self.draw(super().__getitem__(round))

    def draw(self, task: Task) -> Task:
        """Return a task whose support and query set are disjoint random samples of the support set of ``task``."""
        self._accesses += 1
        few = _draw_samples(task.support, sum(DRAWS), self._seed, DRAWN, self._accesses)
        return Task(select_samples(few, slice(DRAWS[0])), select_samples(few, slice(DRAWS[0], None)))


def draw_minibatches(label: str, seed: int, context: LearnerContext) -> LearnerContext:
    """Return the context of a learner whose meta-gradients use minibatches."""
    buffer, gradient = MinibatchBuffer(seed), context.gradient

    def drawn(meta: Meta, task: Task) -> MetaGrad:
        return gradient(meta, buffer.draw(task))

    # MOML gets the whole new task instead of one from the buffer, so its gradient draws the minibatch.
    return replace(context, buffer=buffer, gradient=drawn if LABELS[label] == "moml" else gradient)


def run_entry(entry: Entry, work: Path) -> Row:
    """Return the row of one run; a saved row with the same configuration is loaded instead of computed.

    For each task after the warm-up, the row has the accuracies after each prefix of the support set and after all of
    it. For FTML it also has those of the leader when it is trained as *from scratch* trains random weights.
    """
    settings = make_settings(entry.label, entry.seed)
    training = Training(**OPTIONS["from_scratch"]) if LABELS[entry.label] == MAIN_LEARNER else None
    asked = {**entry._asdict(), "settings": asdict(settings), "draws": DRAWS}
    asked |= {"trained": training._asdict()} if training else {}
    file = work / f"{entry.label.replace(' ', '_')}-{entry.rounds}-{entry.seed}.json"
    if before := load_row(file, asked):
        return before
    seconds = 0.0
    curves: list[Curve] = []
    tuned: list[Curve] = []

    def train_and_score(learner: Learner, task: Task) -> None:
        if training and len(curves) >= WARM_UP:
            tuned.append(make_curve(train_leader(settings, training, learner, task), task))

    change = partial(draw_minibatches, entry.label, entry.seed)
    tasks = make_tasks(entry.seed, entry.rounds)
    played = play_stream(settings, LABELS[entry.label], tasks, work / "programs", change, WARM_UP, train_and_score)
    for task, (_, score, spent) in zip(tasks, played, strict=True):
        curves.append(make_curve(score, task))
        seconds += spent
    found = {"curves": curves[WARM_UP:], "tuned": tuned, "seconds": seconds, "commit": read_commit()}
    return save_row(file, {"asked": asked, **found})


def make_curve(score: Score, task: Task) -> Curve:
    """Return the accuracies after each prefix and after all of the support set, each with its number of points."""
    whole = PrefixScore(len(task.support.x), score.loss_after, score.accuracy)
    return [[found.points, found.accuracy] for found in (*score.prefixes, whole)]
