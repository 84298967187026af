"""Comparators, which a run's regret is measured against, one a file.

A file offers ``refresh(context, regret, request, saved, should_continue, **options) -> RefreshResult | None``: it
continues from the state ``saved`` by its last call (None: there is none), and returns None when ``should_continue()``
became false first. The parameters after these five, with types and defaults, are the options of
``[regret.comparator_options.NAME]``. A file may also offer

- ``EXACT = True``: the loss is known exactly. Otherwise it is an upper bound of ``STANDS_FOR``.
- ``STANDS_FOR``: what it estimates, "the best fixed meta-parameters" by default.
- ``check(context, task)``: raises ``ValueError`` if the comparator cannot be computed for such a task.
"""

import sys
from collections.abc import Callable, Collection
from types import ModuleType
from typing import NamedTuple

from online_meta import registry
from online_meta.regret.ledger import Comparator
from online_meta.types import Meta, Params


class RefreshRequest(NamedTuple):
    """What would have been lost in the rounds 0..``rounds`` - 1?

    It was last asked as of round ``covered``. Rounds in ``skipped`` count for no learner, so they are left out.
    ``warm_start`` are meta-parameters that may be near a good answer, such as the newest leader.
    """

    rounds: int
    covered: int = 0
    skipped: Collection[int] = ()
    warm_start: Meta | None = None


class RefreshResult(NamedTuple):
    """A refreshed comparator, and the state from which its next refresh goes on."""

    comparator: Comparator
    saved: Params


class ComparatorUnavailable(RuntimeError):
    """A comparator cannot be refreshed any more, now or later."""


FUNCTION = "refresh"
"""Each file offers ``refresh``; see ``Refresh``."""

PROVIDED = ("context", "regret", "request", "saved", "should_continue")
"""The parameters of ``refresh`` that the program gives. Any further ones, with defaults, are options."""

Refresh = Callable[..., RefreshResult | None]


def always_continue() -> bool:
    """Proceed."""
    return True


def load_comparator(kind: str) -> ModuleType:
    """Return the module of a comparator: a file of this folder, another package's, or that of an import path.

    Raises ``ValueError`` if there is none.
    """
    return registry.load_module(sys.modules[__name__], kind)


def is_exact(kind: str) -> bool:
    """Return whether a comparator's loss is known exactly, so that it is no estimate."""
    return getattr(load_comparator(kind), "EXACT", False)


def describe_target(kind: str) -> str:
    """Return what a comparator stands for, such as "the best fixed meta-parameters"."""
    return getattr(load_comparator(kind), "STANDS_FOR", "the best fixed meta-parameters")
