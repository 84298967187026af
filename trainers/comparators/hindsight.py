"""Estimate the loss of the best fixed meta-parameters in hindsight by training on all rounds so far."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from online_meta.batching.autotune import Autotuner
from online_meta.batching.task_sum import TaskSum, sum_skipping_nonfinite
from online_meta.learners import LearnerContext
from online_meta.meta_optimizer import order_like
from online_meta.regret.ledger import Comparator, is_finite_loss
from online_meta.regret.scoring import score_task
from online_meta.replay import ReplayRequest
from online_meta.replay._task_draw import DrawnTasks
from online_meta.replay.uniform import uniform
from online_meta.tree import add, norm, scale, zeros
from online_meta.types import Engine, Meta, Params
from trainers.comparators import MIN_JUDGED_STEPS, RefreshRequest, RefreshResult, always_continue
from trainers.comparators._sampling import (
    SEED_OFFSET,
    Coverage,
    Estimate,
    Sample,
    estimate_sum,
    find_coverage,
    sample_rounds,
)
from trainers.settings import RegretSettings

MIN_RELATIVE_FALL = 0.005
"""Relative fall of the loss in one pass below which training stops."""
MAX_GRADIENTS = 100
"""The rounds whose meta-gradients are averaged at the end, at most."""
LEADER = "leader"
"""The name of the start at the leader."""
MAX_OVERDUE_REFRESHES = 10
"""A late refresh makes at most the steps of this many refreshes on time. The first refresh makes all steps."""
RESTART_SEED_OFFSET = 2**40
"""Initial weights are drawn with round numbers from here on, which no run reaches."""


class Trained(NamedTuple):
    """The result of one start: the estimate of its loss, whether it settled, its engine's state, meta-parameters."""

    estimate: Estimate
    converged: bool
    saved: Params
    meta: Meta


def refresh(
    context: LearnerContext,
    regret: RegretSettings,
    request: RefreshRequest,
    saved: Params | None,
    should_continue: Callable[[], bool] = always_continue,
) -> RefreshResult | None:
    """Estimate min_w sum_{t<rounds} f_t(U_t(w)) by meta-steps on all rounds, from several starts.

    Each start is trained on uniformly drawn rounds in passes of ``hindsight_steps`` meta-steps for each new round, in
    each of which the learning rate falls to 0 (a cosine). It stops when a pass lowers its loss by less than 0.5 %, or
    after ``hindsight_max_passes``; the next refresh continues there. It has settled if that pass was long enough to
    visit each retained round once, and has ``MIN_JUDGED_STEPS`` steps. The first start is the run's, another is
    ``warm_start``, the others are drawn at random; the comparator is the best of them. At most ``hindsight_rounds``
    rounds are evaluated, spread evenly with a random offset. If all are evaluated, its loss is an upper bound of the
    minimum, so the regret is a lower bound, and the standard error is 0; otherwise it is that of a stratified sample.
    Retained rounds stand for those that random thinning has discarded, not for those that are gone by age.
    """
    everything = range(request.rounds)
    coverage = find_coverage(context.buffer, everything, request.skipped)
    eligible, sample = coverage.rounds, sample_rounds(coverage, regret.hindsight_rounds, context.seed)
    new = (
        min(request.rounds - request.covered, MAX_OVERDUE_REFRESHES * regret.every_rounds) if saved else request.rounds
    )
    steps_per_pass = math.ceil(regret.hindsight_steps * new) if len(eligible) else 0
    training = _make_training(context, regret, coverage, sample, steps_per_pass, should_continue)
    found: dict[str, Trained] = {}
    for name, start in _list_starts(context, regret.hindsight_restarts, request.warm_start).items():
        trained = _train(training, _engine(training, name, start, saved))
        if trained is None:
            return None
        found[name] = trained
    best = min(found.values(), key=lambda one: (math.isnan(one.estimate.total), one.estimate.total))
    comparator = Comparator(
        "hindsight",
        request.rounds,
        best.estimate.total,
        math.sqrt(best.estimate.variance),
        settled=best.converged,
        first_round=coverage.first,
        evaluated=len(sample.rounds),
        gradient_norm=_gradient_norm(training, best.meta),
    )
    return RefreshResult(
        comparator, {f"{name}.{key}": v for name, one in found.items() for key, v in one.saved.items()}
    )


def _make_training(
    context: LearnerContext,
    regret: RegretSettings,
    coverage: Coverage,
    sample: Sample,
    steps_per_pass: int,
    should_continue: Callable[[], bool],
) -> "_TrainingContext":
    total = TaskSum(context.gradient, context.programs, masks=getattr(context.inner.loss, "masks", None))
    tuner = Autotuner(
        total,
        context.batch,
        batching=context.batching,
        memory_limit=context.memory_limit,
        folder=context.programs,
        compiles=False,
        pad_sizes=context.pad_sizes,
    )
    passes, cap = regret.hindsight_max_passes, regret.loss_cap
    return _TrainingContext(
        context, coverage.rounds, sample, steps_per_pass, passes, cap, should_continue, total, tuner
    )


def _list_starts(context: LearnerContext, restarts: int, warm_start: Meta | None) -> dict[str, Meta]:
    """Return the starts by name: the run's, the leader if there is one, and random ones."""
    starts = {"0": context.start}
    if warm_start is not None:
        # Programs take weights in the order of the run's start; a file does not keep that order.
        starts[LEADER] = order_like(warm_start, context.start)
    for at in range(1, restarts):
        starts[str(at)] = context.inner.init(context.draw_weights(RESTART_SEED_OFFSET + at))
    return starts


def _gradient_norm(context: "_TrainingContext", meta: Meta) -> float | None:
    """Return the global norm of the mean meta-gradient, from at most ``MAX_GRADIENTS`` sampled rounds; None if none."""
    learner_context, apart = context.learner_context, -(-len(context.sample.rounds) // MAX_GRADIENTS) or 1
    rounds, weights = context.sample.rounds[::apart], context.sample.weights[::apart]
    if not rounds:
        return None
    total = zeros(meta)
    for round, weight in zip(rounds, weights, strict=True):
        grads = learner_context.gradient(meta, learner_context.buffer[round]).grads
        if math.isfinite(float(norm(grads))):
            total = add(total, scale(grads, weight / sum(weights)))
    found = float(norm(total))
    return found if math.isfinite(found) else None


class _TrainingContext(NamedTuple):
    """What every start goes through."""

    learner_context: LearnerContext
    eligible: NDArray[np.int64]
    sample: Sample
    steps_per_pass: int
    max_passes: int
    loss_cap: float
    should_continue: Callable[[], bool]
    total: TaskSum
    tuner: Autotuner


def _engine(context: "_TrainingContext", name: str, start: Meta, saved: Params | None) -> Engine:
    """Return the engine of a start: where the last refresh left it, or anew if the leader is better than that."""
    engine = context.learner_context.engine(start)
    prefix = f"{name}."
    own = {key.removeprefix(prefix): value for key, value in (saved or {}).items() if key.startswith(prefix)}
    if not own:
        return engine
    continued = context.learner_context.engine(start)
    continued.load(own)
    if name != LEADER:
        return continued
    here, there = (_evaluate(context, one.meta()) for one in (engine, continued))
    return engine if here is not None and there is not None and here.total < there.total else continued


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
            best = Trained(estimate, False, engine.save(), _copy(engine.meta()))
        if not falls:
            return best._replace(converged=_is_judged(context))
    return best


def _copy(meta: Meta) -> Meta:
    return Meta(*({name: value.detach().clone() for name, value in part.items()} for part in meta))


def _is_judged(context: _TrainingContext) -> bool:
    """Return whether a pass is long enough to show that the loss does not fall any more."""
    visits = math.ceil(len(context.eligible) / context.learner_context.batch)
    return not len(context.eligible) or context.steps_per_pass >= max(visits, MIN_JUDGED_STEPS)


def _run(context: _TrainingContext, engine: Engine, steps: range) -> bool:
    learner_context, uniform_policy, gradient = (
        context.learner_context,
        uniform(),
        sum_skipping_nonfinite(context.total),
    )
    eligible: Sequence[int] = context.eligible  # type: ignore[assignment]  # 8 bytes each
    for step in steps:
        if not context.should_continue():
            return False
        newest = int(context.eligible[-1])
        samples = uniform_policy.sample(
            {}, ReplayRequest(learner_context.seed + SEED_OFFSET, newest, step, eligible, learner_context.batch)
        )
        drawn = DrawnTasks(
            learner_context.draw, learner_context.buffer, learner_context.seed + SEED_OFFSET, newest, step
        )
        tasks = [drawn[sample.round] for sample in samples]
        context.total.follow(context.tuner.find(engine.meta(), tasks))
        engine.lr_scale = (1 + math.cos(math.pi * (step - steps.start) / len(steps))) / 2
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
