"""The hindsight comparator: fixed meta-parameters trained on all rounds so far, an estimate from above."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from online_meta.draws import Draw, generator
from online_meta.finite import sum_finite
from online_meta.path_finder import PathFinder
from online_meta.regret import Comparator
from online_meta.replay.uniform import uniform
from online_meta.score import score_task
from online_meta.setup import LearnerSetup
from online_meta.summing import TaskSum
from online_meta.types import Params

STREAM = 2
"""Sets the comparator's draws apart from the learners' with the same seed."""


class Hindsight(NamedTuple):
    """A refreshed comparator, and the optimizer state from which the next refresh goes on."""

    comparator: Comparator
    saved: Params


def refresh_hindsight(
    setup: LearnerSetup,
    rounds: int,
    steps: int,
    evaluate: int,
    saved: Params | None,
    skipped: Collection[int] = (),
    proceed: Callable[[], bool] = lambda: True,
) -> Hindsight | None:
    """Estimate min_w sum_{t<rounds} f_t(U_t(w)) by ``steps`` meta-steps over all rounds, then evaluate.

    Training goes on from ``saved`` (None: from the run's initial parameters) on uniformly drawn rounds;
    whatever it finds is no better than the minimum, so the loss is an upper bound of it and the
    regret against it a lower bound. At most ``evaluate`` rounds, spread evenly with a random offset,
    are evaluated; with fewer than all, the standard error of the sum is that of a stratified sample.
    Rounds in ``skipped`` count for no learner, so they are left out. Those that retention has thinned out are stood
    for by those that it has kept.
    Returns None as soon as ``proceed()`` is false.
    """
    engine = setup.engine(setup.start)
    if saved is not None:
        engine.load(saved)
    total = TaskSum(setup.gradient, setup.programs)
    how, limit = setup.how, setup.memory_limit
    finder = PathFinder(total, setup.batch, how=how, memory_limit=limit, folder=setup.programs, compiles=False)
    gradient, evenly = sum_finite(total), uniform()
    kept = np.asarray(setup.past.kept(rounds), np.int64)
    counted: Sequence[int] = kept[np.isin(kept, list(skipped), invert=True)]  # type: ignore[assignment]  # 8 bytes each
    for step in range(steps if len(counted) else 0):
        if not proceed():
            return None
        picks = evenly.pick({}, Draw(setup.seed + STREAM, rounds - 1, step, counted, setup.batch))
        tasks = [setup.past[pick.round] for pick in picks]
        total.follow(finder.find(engine.meta(), tasks))
        engine.apply(*gradient(engine.meta(), tasks, picks))
    losses = []
    stretches = _stretches(len(counted), evaluate)
    share = (rounds - sum(round < rounds for round in skipped)) / max(1, len(counted))
    for index in _one_of_each(setup.seed, stretches):
        if not proceed():
            return None
        losses.append(score_task(setup.inner, engine.meta(), setup.past[int(counted[index])]).loss_after)
    return Hindsight(_summarise(losses, rounds, [share * len(stretch) for stretch in stretches]), engine.save())


def _stretches(count: int, evaluate: int) -> list[range]:
    """Cut 0..count - 1 into at most ``evaluate`` stretches of as equal a length as can be."""
    many = min(count, evaluate)
    return [range(count * k // many, count * (k + 1) // many) for k in range(many)]


def _one_of_each(seed: int, stretches: list[range]) -> list[int]:
    """Choose one index at random in each stretch."""
    random = generator(seed + STREAM, sum(map(len, stretches)))
    return [stretch[int(random.integers(len(stretch)))] for stretch in stretches]


def _summarise(losses: list[float], rounds: int, lengths: list[float]) -> Comparator:
    """Sum the losses, each standing for as many rounds as its stretch is long.

    A loss that stands for m rounds adds m (m - 1) s^2 to the variance, s^2 being that of all the losses:
    too much rather than too little where losses drift along the stream.
    """
    total, error = math.fsum(loss * m for loss, m in zip(losses, lengths, strict=True)), 0.0
    if len(losses) > 1:
        mean = math.fsum(losses) / len(losses)
        variance = math.fsum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1)
        error = math.sqrt(variance * sum(m * (m - 1) for m in lengths))
    return Comparator("hindsight", rounds, total, error)
