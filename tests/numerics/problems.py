"""The problems of ``online_meta.testing``, and more with the models of ``trainers.models``."""

from collections.abc import Callable

from torch import nn

from online_meta.testing import problems
from online_meta.testing.problems import WAYS, Net, Problem, regression_task, sequence_task
from trainers.models import conv4, gru, mlp, transformer

__all__ = ["EVERY", "MODELS", "RANDOM", "Net", "Problem", "problem", "regression_task", "sequence_task"]

MODELS: dict[str, Callable[[], nn.Module]] = problems.MODELS | {
    "mlp_context": lambda: mlp(4, 2, hidden=(6,), context=3),
    "conv_strided": lambda: conv4(2, 6, WAYS, filters=6, groups=1),
    "sequence_transformer": lambda: transformer(2, 5, features=3, width=8, heads=2, layers=1),
    "sequence_gru": lambda: gru(3, 2, hidden=4),
    "tokens_transformer": lambda: transformer(WAYS, 5, tokens=7, width=8, heads=2, layers=1),
}
"""Models that are deterministic functions of their weights and x."""

RANDOM: dict[str, Callable[[], nn.Module]] = problems.RANDOM | {
    "sequence_transformer_dropout": lambda: transformer(2, 5, features=3, width=8, heads=2, layers=1, dropout=0.2),
    "sequence_gru_dropout": lambda: gru(3, 2, hidden=4, layers=2, dropout=0.3),
}
"""Models that draw random numbers in training mode."""

EVERY = MODELS | RANDOM


def problem(name: str, seed: int = 0) -> Problem:
    """Return the problem called ``name``, with parameters redrawn so that no bias or scale is special."""
    return problems.problem(name, seed, EVERY)
