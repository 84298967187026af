"""Estimate the loss of the best fixed meta-parameters in hindsight by training on all rounds so far."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from online_meta.batching.autotune import Autotuner
from online_meta.batching.task_sum import TaskSum, sum_skipping_nonfinite
from online_meta.learners import LearnerContext
from online_meta.regret.ledger import Comparator, is_finite_loss
from online_meta.regret.scoring import score_task
from online_meta.replay import ReplayRequest
from online_meta.replay.uniform import uniform
from online_meta.types import Engine, Meta, Params
from trainers.comparators import RefreshRequest, RefreshResult, always_continue
from trainers.comparators._sampling import (
    SEED_OFFSET,
    Estimate,
    Sample,
    estimate_sum,
    list_eligible_rounds,
    sample_rounds,
)
from trainers.settings import RegretSettings

MIN_RELATIVE_FALL = 0.005
"""Relative fall of the loss in one pass below which training stops."""
MAX_OVERDUE_REFRESHES = 10
"""A late refresh makes at most the steps of this many refreshes on time. The first refresh makes all steps."""
RESTART_SEED_OFFSET = 2**40
"""Initial weights are drawn with round numbers from here on, which no run reaches."""


class Trained(NamedTuple):
    """The result of one start: the estimate of its loss, whether it had stopped falling, and the engine's state."""

    estimate: Estimate
    converged: bool
    saved: Params


def refresh(
    context: LearnerContext,
    regret: RegretSettings,
    request: RefreshRequest,
    saved: Params | None,
    should_continue: Callable[[], bool] = always_continue,
) -> RefreshResult | None:
    """Estimate min_w sum_{t<rounds} f_t(U_t(w)) by meta-steps on all rounds, from several starts.

    Each start is trained on uniformly drawn rounds in passes of ``hindsight_steps`` meta-steps for each new round. It
    stops when a pass lowers its loss by less than 0.5 %, or after ``hindsight_max_passes``; the next refresh continues
    there. The first start is the run's, the others are drawn at random; the comparator is the best of them. Its loss is
    an upper bound of the minimum, so the regret is a lower bound. At most ``hindsight_rounds`` rounds are evaluated,
    spread evenly with a random offset. The standard error is that of a stratified sample, 0 if all are evaluated.
    Retained rounds stand for those that retention has discarded.
    """
    everything = range(request.rounds)
    eligible = list_eligible_rounds(context.buffer, everything, request.skipped)
    sample = sample_rounds(eligible, everything, request.skipped, regret.hindsight_rounds, context.seed)
    new = (
        min(request.rounds - request.covered, MAX_OVERDUE_REFRESHES * regret.every_rounds) if saved else request.rounds
    )
    steps_per_pass = math.ceil(regret.hindsight_steps * new) if len(eligible) else 0
    total = TaskSum(context.gradient, context.programs)
    batching, limit = context.batching, context.memory_limit
    tuner = Autotuner(
        total,
        context.batch,
        batching=batching,
        memory_limit=limit,
        folder=context.programs,
        compiles=False,
    )
    training = _TrainingContext(
        context,
        eligible,
        sample,
        steps_per_pass,
        regret.hindsight_max_passes,
        regret.loss_cap,
        should_continue,
        total,
        tuner,
    )
    found: list[Trained] = []
    for start in range(regret.hindsight_restarts):
        trained = _train(training, _engine(context, start, saved))
        if trained is None:
            return None
        found.append(trained)
    best = min(found, key=lambda one: (math.isnan(one.estimate.total), one.estimate.total))
    loss, variance = best.estimate
    comparator = Comparator("hindsight", request.rounds, loss, math.sqrt(variance), best.converged)
    return RefreshResult(
        comparator, {f"{at}.{name}": v for at, one in enumerate(found) for name, v in one.saved.items()}
    )


class _TrainingContext(NamedTuple):
    """What every start goes through."""

    learner_context: LearnerContext
    eligible: Sequence[int]
    sample: Sample
    steps_per_pass: int
    max_passes: int
    loss_cap: float
    should_continue: Callable[[], bool]
    total: TaskSum
    tuner: Autotuner


def _engine(learner_context: LearnerContext, start: int, saved: Params | None) -> Engine:
    first = (
        learner_context.start
        if start == 0
        else learner_context.inner.init(learner_context.draw_weights(RESTART_SEED_OFFSET + start))
    )
    engine = learner_context.engine(first)
    prefix = f"{start}."
    own = {name.removeprefix(prefix): value for name, value in (saved or {}).items() if name.startswith(prefix)}
    if own:
        engine.load(own)
    return engine


def _train(context: _TrainingContext, engine: Engine) -> Trained | None:
    best: Trained | None = None
    for index in range(context.max_passes):
        if not _run(context, engine, range(index * context.steps_per_pass, (index + 1) * context.steps_per_pass)):
            return None
        estimate = _evaluate(context, engine.meta())
        if estimate is None:
            return None
        before = best.estimate.total if best else math.inf
        falls = context.steps_per_pass > 0 and estimate.total < before - MIN_RELATIVE_FALL * abs(estimate.total)
        if best is None or estimate.total < before:
            best = Trained(estimate, False, engine.save())
        if not falls:
            return best._replace(converged=True)
    return best


def _run(context: _TrainingContext, engine: Engine, steps: range) -> bool:
    learner_context, uniform_policy, gradient = (
        context.learner_context,
        uniform(),
        sum_skipping_nonfinite(context.total),
    )
    for step in steps:
        if not context.should_continue():
            return False
        newest = int(context.eligible[-1])
        samples = uniform_policy.sample(
            {}, ReplayRequest(learner_context.seed + SEED_OFFSET, newest, step, context.eligible, learner_context.batch)
        )
        tasks = [learner_context.buffer[sample.round] for sample in samples]
        context.total.follow(context.tuner.find(engine.meta(), tasks))
        engine.apply(*gradient(engine.meta(), tasks, samples))
    return True


def _evaluate(context: _TrainingContext, meta: Meta) -> Estimate | None:
    losses = []
    for round in context.sample.rounds:
        if not context.should_continue():
            return None
        loss = score_task(context.learner_context.inner, meta, context.learner_context.buffer[round]).loss_after
        losses.append(loss if is_finite_loss(loss) else context.loss_cap)
    return estimate_sum(losses, context.sample.weights)
