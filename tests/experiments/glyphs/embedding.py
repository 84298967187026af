"""The baseline that needs no meta-learning: one classifier of all classes, and a simple one on its features."""

import warnings
from typing import NamedTuple

import torch
from online_meta.types import Task
from tests.experiments.glyphs.tasks import draw_letters
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 64


class Embedded(NamedTuple):
    """A task in the space of features: unit vectors (n, features), and their labels (n,)."""

    support: Tensor
    support_y: Tensor
    query: Tensor
    query_y: Tensor


def train_embedding(module: nn.Module, letters: Tensor, steps: int, seed: int) -> None:
    """Train ``module`` to tell all ``letters`` apart, by ``steps`` steps of Adam that anneal to 0."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        labels = torch.randint(len(letters), (BATCH,), generator=random)
        loss = F.cross_entropy(module(draw_letters(random, letters[labels])), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def embed(module: nn.Module, task: Task) -> Embedded:
    """Return a task's features before the last layer of a ``Conv4``, each of length 1."""

    def features(x: Tensor) -> Tensor:
        with torch.no_grad():
            maps: Tensor = module.features(x)  # type: ignore[operator]
            return F.normalize(maps.flatten(1))

    return Embedded(features(task.support.x), task.support.y, features(task.query.x), task.query.y)


def embedding_accuracy(task: Embedded) -> float:
    """Return the accuracy of logistic regression on the frozen embedding (Tian et al., ECCV 2020)."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fit that would gain by more iterations
        model = LogisticRegression(C=10.0, max_iter=200).fit(task.support.numpy(), task.support_y.numpy())
    return float(model.score(task.query.numpy(), task.query_y.numpy()))


def nearest_centroid(task: Embedded) -> float:
    """Return the accuracy of the nearest class mean on the frozen embedding."""
    classes = torch.unique(task.support_y)
    centroids = torch.stack([task.support[task.support_y == label].mean(0) for label in classes])
    found = classes[torch.cdist(task.query, centroids).argmin(1)]
    return float((found == task.query_y).double().mean())
