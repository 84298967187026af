"""Comparators, which a run's regret is measured against, one a file.

A file offers ``refresh(context, regret, request, saved, should_continue, **options) -> RefreshResult | None``: it
continues from the state ``saved`` by its last call (None: there is none), and returns None when ``should_continue()``
became false first. The parameters after these five, with types and defaults, are the options of
``[regret.comparator_options.NAME]``. Options called ``source`` and ``options`` are by default the kind and the options
of the run's source, if it has only one. A file may also offer

- ``EXACT = True``: the loss is known exactly. Otherwise it is an estimate, and an upper bound of ``STANDS_FOR`` if it
  was evaluated on every round.
- ``STANDS_FOR``: what it estimates, "the best fixed meta-parameters" by default.
- ``check(context, task, **options)``: raises ``ValueError`` if the comparator cannot be computed for such a task.
- ``EXAMPLE_OPTIONS``: options for the contract tests, where the defaults do not fit tasks with two numbers in x.
- ``extend(context, regret, request, saved, should_continue)``: the same as ``refresh`` without training: what the last
  refresh found, evaluated on the rounds since. It is called at the end of a run, when there is no time to train; of an
  exact comparator, ``refresh`` is.
"""

import math
import sys
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any, NamedTuple

from online_meta import registry
from online_meta.batching.plan import ExecutionPlan
from online_meta.regret.ledger import Comparator, Regret
from online_meta.types import Meta, Params


class RefreshRequest(NamedTuple):
    """A request for the comparator's loss over the rounds 0..``rounds`` - 1.

    Attributes:
        rounds: the number of rounds.
        covered: the number of rounds of the last refresh.
        skipped: rounds that count for no learner, so that they are left out.
        warm_start: meta-parameters that may be close to a good answer, such as the newest leader.
        plans: the execution plans that the trainer has found for the leading learner. A comparator measures plans of
            its own only for tasks of other shapes.
    """

    rounds: int
    covered: int = 0
    skipped: Collection[int] = ()
    warm_start: Meta | None = None
    plans: tuple[ExecutionPlan, ...] = ()


class RefreshResult(NamedTuple):
    """A refreshed comparator, and the state from which its next refresh continues."""

    comparator: Comparator
    saved: Params


class ComparatorUnavailable(RuntimeError):
    """A comparator cannot be refreshed any more, in this run."""


MIN_JUDGED_STEPS = 50
"""A shorter pass of training shows nothing about whether the loss has stopped falling."""

FUNCTION = "refresh"
"""Each file offers ``refresh``; see ``Refresh``."""

PROVIDED = ("context", "regret", "request", "saved", "should_continue")
"""The parameters of ``refresh`` that the program gives. Any further ones, with defaults, are options."""

Refresh = Callable[..., RefreshResult | None]


def always_continue() -> bool:
    """Return True."""
    return True


def limit_work(budget: float | None, gradients: int, request: RefreshRequest) -> float:
    """Return the meta-gradients of one task that a refresh may compute, at least 2; infinity without a ``budget``.

    Args:
        budget: ``regret.comparator_budget``.
        gradients: those that the leading learner computes in a round.
        request: the refresh.
    """
    new_rounds = max(request.rounds - request.covered, 1)
    return math.inf if budget is None else max(2.0, budget * gradients * new_rounds)


def load_comparator(kind: str) -> ModuleType:
    """Return the module of a comparator: a file of this folder, another package's, or that of an import path.

    Raises ``ValueError`` if there is none.
    """
    return registry.load_module(sys.modules[__name__], kind)


def is_exact(kind: str) -> bool:
    """Return whether a comparator's loss is known exactly, so that it is no estimate; False if it cannot be loaded."""
    try:
        return bool(getattr(load_comparator(kind), "EXACT", False))
    except ValueError:  # A comparator of another package, in a run of an earlier environment.
        return False


def is_upper_bound(comparator: Comparator, rounds: int) -> bool:
    """Return whether an estimate's loss is at least that of what it stands for, so that regret is a lower bound.

    It is if its loss was computed on each of the ``rounds`` that count. A sum that is estimated from a sample of the
    rounds may be too low.
    """
    if is_exact(comparator.kind):
        return False
    if comparator.evaluated is None:  # Lines of 0.1.0: without sampling there was no standard error.
        return comparator.standard_error == 0
    return comparator.evaluated >= rounds


def describe_target(kind: str) -> str:
    """Return what a comparator stands for, such as "the best fixed meta-parameters"."""
    try:
        return str(getattr(load_comparator(kind), "STANDS_FOR", "the best fixed meta-parameters"))
    except ValueError:
        return "the best that it knows"


def describe_comparator(comparator: Comparator | None, regret: Regret) -> dict[str, Any]:
    """Return how far a comparator can be trusted, for the report and the API.

    Args:
        comparator: a newest evaluation; None for nothing known.
        regret: against it.

    Returns:
        ``exact``: whether its loss is known exactly; ``lower_bound``: whether the regret is a lower bound of the true
        one; ``settled`` and ``gradient_norm`` of ``Comparator``; ``evaluated``: the rounds whose loss was computed.
    """
    if comparator is None:
        return {}
    return {
        "exact": is_exact(comparator.kind),
        "lower_bound": is_upper_bound(comparator, regret.rounds),
        "settled": comparator.settled,
        "evaluated": comparator.evaluated,
        "gradient_norm": comparator.gradient_norm,
    }
