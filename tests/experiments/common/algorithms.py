"""The algorithms that the tables compare: data, so that a table says what it ran."""

from dataclasses import dataclass, field
from typing import Any

import online_meta.metagrads
import online_meta.rules
from online_meta import registry
from online_meta.inner import Inner
from online_meta.types import LossFn, MetaGradient


@dataclass(frozen=True)
class Algorithm:
    """One row of a table: the inner loop, the estimator, and the outer optimizer.

    ``fast`` says in words which weights adapt: "all", "head", "body" or "context". ``batch`` tasks make a meta-step;
    ``how`` is ``over_tasks``'s. ``draws`` says that the rule draws random numbers, which
    tasks that are stacked cannot do.
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
    """Return the inner loop and the estimator of a row; ``globs`` names the weights of a model's parts.

    Raises ``ValueError`` for a name that is not there.
    """
    rule = registry.load(online_meta.rules, algorithm.rule)(lr=algorithm.lr, **algorithm.options)
    inner = Inner(loss, rule, algorithm.steps, globs[algorithm.fast])
    return inner, registry.load(online_meta.metagrads, algorithm.gradient)(inner, **algorithm.gradient_options)
