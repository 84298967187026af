"""Baselines without meta-learning: simple classifiers on the features of one classifier of all classes."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from online_meta.batches import only_tensor
from online_meta.types import Task, Tensors
from torch import Tensor, nn
from torch.nn import functional as F


class EmbeddedTask(NamedTuple):
    """A task in feature space: unit vectors (n, features) and their labels (n,)."""

    support: Tensor
    support_y: Tensor
    query: Tensor
    query_y: Tensor


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


EMBEDDINGS: dict[str, tuple[str, Callable[[EmbeddedTask], float]]] = {
    "good embedding, logistic regression": ("Tian et al., 2020", score_logistic_regression),
    "good embedding, nearest centroid": ("Snell et al., 2017", score_nearest_centroid),
}
"""The rows of the embedding: their papers, and how they score a task."""
