"""Baselines without meta-learning: one classifier of all classes, and a simple classifier on its features."""

import warnings
from typing import NamedTuple

import torch
from online_meta.batches import only_tensor
from online_meta.types import Task, Tensors
from tests.experiments.glyphs.tasks import draw_letters
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 64


class EmbeddedTask(NamedTuple):
    """A task in feature space: unit vectors (n, features) and their labels (n,)."""

    support: Tensor
    support_y: Tensor
    query: Tensor
    query_y: Tensor


def train_embedding(module: nn.Module, letters: Tensor, steps: int, seed: int) -> None:
    """Train ``module`` to classify all ``letters``, with ``steps`` of Adam whose learning rate anneals to 0."""
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


def embed_task(module: nn.Module, task: Task) -> EmbeddedTask:
    """Return a task's features before the last layer of a ``Conv4``, normalised to length 1."""

    def features(x: Tensors) -> Tensor:
        with torch.no_grad():
            maps: Tensor = module.features(x)  # type: ignore[operator]
            return F.normalize(maps.flatten(1))

    return EmbeddedTask(
        *(
            only_tensor(part)
            for part in (features(task.support.x), task.support.y, features(task.query.x), task.query.y)
        )
    )


def score_logistic_regression(task: EmbeddedTask) -> float:
    """Return the accuracy of logistic regression on the frozen embedding (Tian et al., ECCV 2020)."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The fit warns that more iterations would improve it.
        model = LogisticRegression(C=10.0, max_iter=200).fit(task.support.numpy(), task.support_y.numpy())
    return float(model.score(task.query.numpy(), task.query_y.numpy()))


def score_nearest_centroid(task: EmbeddedTask) -> float:
    """Return the accuracy of the nearest class mean on the frozen embedding."""
    classes = torch.unique(task.support_y)
    centroids = torch.stack([task.support[task.support_y == label].mean(0) for label in classes])
    found = classes[torch.cdist(task.query, centroids).argmin(1)]
    return float((found == task.query_y).double().mean())
