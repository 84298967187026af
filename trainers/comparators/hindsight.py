"""The best fixed meta-parameters in hindsight: trained on all rounds so far, an estimate from above."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from online_meta.draws import Draw
from online_meta.finite import sum_finite
from online_meta.path_finder import PathFinder
from online_meta.regret import Comparator
from online_meta.replay.uniform import uniform
from online_meta.score import score_task
from online_meta.setup import LearnerSetup
from online_meta.summing import TaskSum
from online_meta.types import Engine, Meta, Params
from trainers.comparing import Answered, Asked, always
from trainers.sampling import STREAM, Estimate, Sample, counted_rounds, estimate_sum, sample_rounds
from trainers.settings import RegretSettings

FALL = 0.005
"""By how much of itself a loss has to fall in a lap for another one to follow."""
MOST_REFRESHES = 10
"""A refresh that comes late makes no more steps than so many that come in time; the first one makes all."""
FRESH = 2**40
"""Weights for the starts are drawn as for rounds that no run gets to."""


class Trained(NamedTuple):
    """What came of one start: an estimate of its loss, whether that had stopped falling, and its engine's state."""

    estimate: Estimate
    settled: bool
    saved: Params


def refresh(
    setup: LearnerSetup,
    regret: RegretSettings,
    asked: Asked,
    saved: Params | None,
    proceed: Callable[[], bool] = always,
) -> Answered | None:
    """Estimate min_w sum_{t<rounds} f_t(U_t(w)) by meta-steps on all rounds, from several starts.

    Each start is trained on uniformly drawn rounds in laps of ``hindsight_steps`` for each new round, until its loss
    falls by less than 0.5 % in a lap, or for ``hindsight_laps`` of them; the next refresh goes on from there. The first
    start is the run's, the others are drawn at random. The comparator is the best of them. Whatever is found is no
    better than the minimum, so the loss is an upper bound of it and the regret against it a lower bound. At most
    ``hindsight_rounds`` rounds, spread evenly with a random offset, are evaluated; with fewer than all, the standard
    error of the sum is that of a stratified sample. Those that retention has thinned out are stood for by others.
    """
    everything = range(asked.rounds)
    counted = counted_rounds(setup.past, everything, asked.skipped)
    sample = sample_rounds(counted, everything, asked.skipped, regret.hindsight_rounds, setup.seed)
    new = min(asked.rounds - asked.covered, MOST_REFRESHES * regret.every_rounds) if saved else asked.rounds
    lap = math.ceil(regret.hindsight_steps * new) if len(counted) else 0
    total = TaskSum(setup.gradient, setup.programs)
    how, limit = setup.how, setup.memory_limit
    finder = PathFinder(total, setup.batch, how=how, memory_limit=limit, folder=setup.programs, compiles=False)
    course = _Course(setup, counted, sample, lap, regret.hindsight_laps, proceed, total, finder)
    found: list[Trained] = []
    for start in range(regret.hindsight_starts):
        trained = _train(course, _engine(setup, start, saved))
        if trained is None:
            return None
        found.append(trained)
    best = min(found, key=lambda one: (math.isnan(one.estimate.total), one.estimate.total))
    lost, variance = best.estimate
    comparator = Comparator("hindsight", asked.rounds, lost, math.sqrt(variance), best.settled)
    return Answered(comparator, {f"{at}.{name}": v for at, one in enumerate(found) for name, v in one.saved.items()})


class _Course(NamedTuple):
    """What every start goes through."""

    setup: LearnerSetup
    counted: Sequence[int]
    sample: Sample
    lap: int
    laps: int
    proceed: Callable[[], bool]
    total: TaskSum
    finder: PathFinder


def _engine(setup: LearnerSetup, start: int, saved: Params | None) -> Engine:
    first = setup.start if start == 0 else setup.inner.init(setup.fresh(FRESH + start))
    engine = setup.engine(first)
    mark = f"{start}."
    own = {name.removeprefix(mark): value for name, value in (saved or {}).items() if name.startswith(mark)}
    if own:
        engine.load(own)
    return engine


def _train(course: _Course, engine: Engine) -> Trained | None:
    best: Trained | None = None
    for lap in range(course.laps):
        if not _run(course, engine, range(lap * course.lap, (lap + 1) * course.lap)):
            return None
        estimate = _evaluate(course, engine.meta())
        if estimate is None:
            return None
        before = best.estimate.total if best else math.inf
        falls = course.lap > 0 and estimate.total < before - FALL * abs(estimate.total)
        if best is None or estimate.total < before:
            best = Trained(estimate, False, engine.save())
        if not falls:
            return best._replace(settled=True)
    return best


def _run(course: _Course, engine: Engine, steps: range) -> bool:
    setup, evenly, gradient = course.setup, uniform(), sum_finite(course.total)
    for step in steps:
        if not course.proceed():
            return False
        newest = int(course.counted[-1])
        picks = evenly.pick({}, Draw(setup.seed + STREAM, newest, step, course.counted, setup.batch))
        tasks = [setup.past[pick.round] for pick in picks]
        course.total.follow(course.finder.find(engine.meta(), tasks))
        engine.apply(*gradient(engine.meta(), tasks, picks))
    return True


def _evaluate(course: _Course, meta: Meta) -> Estimate | None:
    losses = []
    for round in course.sample.rounds:
        if not course.proceed():
            return None
        losses.append(score_task(course.setup.inner, meta, course.setup.past[round]).loss_after)
    return estimate_sum(losses, course.sample.weights)
