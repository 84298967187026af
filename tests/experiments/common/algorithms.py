"""Describe the algorithms that the tables compare as data, so that a table can state what it ran."""

from dataclasses import dataclass, field
from typing import Any

import online_meta.metagrads
import online_meta.rules
from online_meta import registry
from online_meta.inner import Inner
from online_meta.types import LossFn, MetaGradient


@dataclass(frozen=True)
class Algorithm:
    """Describe one row of a table: the inner loop, the estimator of the meta-gradient, and the outer optimizer.

    Attributes:
        fast: which weights adapt: "all", "head", "body" or "context".
        batch: the number of tasks per meta-step.
        how: the batching mode of ``over_tasks``.
    """

    label: str
    paper: str
    rule: str = "sgd"
    lr: float = 0.01
    options: dict[str, Any] = field(default_factory=dict)
    gradient: str = "exact"
    gradient_options: dict[str, Any] = field(default_factory=dict)
    fast: str = "all"
    steps: int = 1
    optimizer: str = "adam"
    meta_lr: float = 1e-3
    batch: int = 25
    how: str = "compiled"


def build_algorithm(
    algorithm: Algorithm, loss: LossFn, globs: dict[str, tuple[str, ...]]
) -> tuple[Inner, MetaGradient]:
    """Return the inner loop and the estimator of a row; ``globs`` maps the values of ``fast`` to weight names.

    Raises ``ValueError`` for an unknown name.
    """
    rule = registry.load(online_meta.rules, algorithm.rule)(lr=algorithm.lr, **algorithm.options)
    inner = Inner(loss, rule, algorithm.steps, globs[algorithm.fast])
    return inner, registry.load(online_meta.metagrads, algorithm.gradient)(inner, **algorithm.gradient_options)
