"""Train a network for some minutes or steps, and score it on tasks of held-out scripts."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from online_meta import over_tasks
from online_meta.functional.model import accuracy_of, model_loss
from online_meta.meta_optimizer import MetaOptimizer
from online_meta.types import Meta, Task
from tests.experiments.common.algorithms import Algorithm, build_algorithm
from tests.experiments.common.tables import Row
from tests.experiments.glyphs.embedding import EMBEDDINGS, embed_task
from tests.experiments.glyphs.rows import WAYS, Plan, Training
from tests.experiments.glyphs.tasks import Letters, draw_letters, draw_tasks, turn_letters
from torch import Tensor, nn
from torch.nn import functional as F
from trainers.build import build_module
from trainers.settings import ModelSettings

BATCH = 64
"""Images in a step of an embedding's training."""

TEST_QUERIES = 15
CONTEXT = 32
GLOBS: dict[str, tuple[str, ...]] = {"all": ("*",), "head": ("head.*",), "body": ("body.*",), "context": ("context",)}


@dataclass(frozen=True)
class Budget:
    """Say when training ends: after ``minutes`` of processor time, or after ``steps`` if that is None."""

    minutes: float | None
    steps: int


class Job(NamedTuple):
    """What is trained and scored in one go.

    Attributes:
        name: of the plan.
        shots: support images per letter of the tasks that are scored, of which each makes a row.
        tasks: number of these tasks.
    """

    name: str
    plan: Plan
    shots: tuple[int, ...]
    budget: Budget
    seed: int
    tasks: int


class MetaTrained(NamedTuple):
    """What meta-training learned, and in how many meta-steps."""

    meta: Meta
    steps: int


def train_and_score(job: Job, letters: Letters) -> list[Row]:
    """Return the rows of a job: label, shots, accuracy with its interval, and what the training took."""
    return _score_embedding(job, letters) if job.plan.algorithm is None else _score_algorithm(job, letters)


def _score_embedding(job: Job, letters: Letters) -> list[Row]:
    began = time.process_time()
    training = job.plan.training
    classes = turn_letters(letters.train, training.turns)
    module = build_network(training, len(classes), job.seed)
    steps = train_embedding(module, training, classes, job.budget, job.seed)
    cost = {"steps": steps, "minutes": (time.process_time() - began) / 60}
    rows = []
    for shots in job.shots:
        embedded = [embed_task(module, task) for task in draw_test_tasks(letters, shots, job.tasks)]
        for label, (paper, score) in EMBEDDINGS.items():
            found = summarise([score(task) for task in embedded])
            rows.append({"label": label, "paper": paper, "shots": shots, **found, **cost})
    return rows


def _score_algorithm(job: Job, letters: Letters) -> list[Row]:
    algorithm, training = job.plan
    assert algorithm is not None
    rows, trained = [], None
    for shots in job.shots:
        if trained is None or training.shots is None:
            began = time.process_time()
            trained = meta_train(algorithm, training, letters.train, shots, job.budget, job.seed)
            cost = {"steps": trained.steps, "minutes": (time.process_time() - began) / 60}
        tasks = draw_test_tasks(letters, shots, job.tasks)
        found = summarise(score_meta(algorithm, training, trained.meta, tasks))
        rows.append({"label": algorithm.label, "paper": algorithm.paper, "shots": shots, **found, **cost})
    return rows


def draw_test_tasks(letters: Letters, shots: int, tasks: int) -> list[Task]:
    """Return test tasks of held-out scripts, which are the same for every row."""
    return draw_tasks(torch.Generator().manual_seed(2**31), letters.test, tasks, WAYS, shots, TEST_QUERIES)


def summarise(accuracies: list[float]) -> Row:
    """Return the mean accuracy and its 95 % interval over the tasks."""
    found = torch.tensor(accuracies, dtype=torch.float64)
    return {"accuracy": float(found.mean()), "interval": 1.96 * float(found.std()) / len(found) ** 0.5}


def spend(budget: Budget, step: Callable[[float], None], clock: Callable[[], float] = time.process_time) -> int:
    """Call ``step(share)`` until the budget is spent, with the share in [0, 1) that was spent before; count the calls.

    ``clock`` returns seconds of processor time, so that other work on the machine takes nothing from the row. A budget
    in minutes gives another number of steps on another machine; a budget in steps gives the same result everywhere.
    """
    began, taken = clock(), 0
    while True:
        spent, all_of_it = (taken, budget.steps) if budget.minutes is None else (clock() - began, 60 * budget.minutes)
        if spent >= all_of_it:
            return taken
        step(spent / all_of_it)
        taken += 1


def anneal(share: float) -> float:
    """Return the factor of the learning rate, half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * share))


def build_network(training: Training, ways: int, seed: int, context: int = 0) -> nn.Module:
    """Return the network of a row with random weights."""
    model = {"channels": 1, "size": 28, "filters": training.filters, "pool": training.pool}
    return build_module(ModelSettings("trainers.models:conv4", {**model, "ways": ways, "context": context}), seed)


def build_task_network(algorithm: Algorithm, training: Training, ways: int, seed: int) -> nn.Module:
    """Return the network of a meta-learned row, with a context vector if the algorithm adapts one."""
    return build_network(training, ways, seed, CONTEXT if algorithm.fast == "context" else 0)


def train_embedding(module: nn.Module, training: Training, letters: Tensor, budget: Budget, seed: int) -> int:
    """Train ``module`` by Adam to classify all ``letters``, and return the number of steps; the rate anneals to 0."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(module.parameters(), training.rate)

    def step(share: float) -> None:
        labels = torch.randint(len(letters), (BATCH,), generator=random)
        loss = F.cross_entropy(module(draw_letters(random, letters[labels])), labels)
        for group in optimizer.param_groups:
            group["lr"] = training.rate * anneal(share)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return spend(budget, step)


def meta_train(
    algorithm: Algorithm, training: Training, letters: Tensor, shots: int, budget: Budget, seed: int
) -> MetaTrained:
    """Meta-train the network of a row on tasks of ``letters``."""
    module = build_task_network(algorithm, training, training.ways, seed)
    inner, gradient = build_algorithm(algorithm, model_loss(module, "cross_entropy"), GLOBS)
    weights, rule = inner.init(dict(module.named_parameters()))
    chosen = {name: torch.full_like(rule[name], value) for name, value in training.learned.items()}
    engine = MetaOptimizer(Meta(weights, {**rule, **chosen}), algorithm.optimizer, algorithm.meta_lr, 10.0)
    mean = over_tasks(gradient, algorithm.how)
    random = torch.Generator().manual_seed(seed)
    letters = turn_letters(letters, training.turns)

    def step(share: float) -> None:
        tasks = draw_tasks(random, letters, algorithm.batch, training.ways, training.shots or shots, training.queries)
        engine.lr_scale = anneal(share) if training.anneal else 1.0
        engine.apply(mean(engine.meta(), tasks), 1.0)

    steps = spend(budget, step)
    return MetaTrained(engine.meta(), steps)


def score_meta(algorithm: Algorithm, training: Training, meta: Meta, tasks: list[Task]) -> list[float]:
    """Return the accuracy on each task after adaptation.

    If training tasks had other numbers of letters, the rule makes the head for each task, and its shape is replaced.
    """
    module = build_task_network(algorithm, training, WAYS, 0)
    loss = model_loss(module, "cross_entropy")
    inner, _ = build_algorithm(algorithm, loss, GLOBS)
    if training.ways != WAYS:
        head = {name: value.detach() for name, value in module.named_parameters() if name.startswith("head.")}
        meta = Meta({**meta.weights, **head}, meta.rule)
    accuracy = accuracy_of(loss.output)
    with torch.no_grad():
        return [float(accuracy(inner.adapt(meta, task.support), task.query)) for task in tasks]
