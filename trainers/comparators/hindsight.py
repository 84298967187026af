"""Estimate the loss of the best fixed meta-parameters in hindsight by training on all rounds so far."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from online_meta.batching.autotune import Autotuner
from online_meta.batching.plan import ExecutionPlan, signature_of
from online_meta.batching.programs import Programs, has_program
from online_meta.batching.task_sum import TaskSum, sum_skipping_nonfinite
from online_meta.learners import LearnerContext
from online_meta.meta_optimizer import order_like
from online_meta.regret.ledger import Comparator, is_finite_loss
from online_meta.regret.scoring import score_task
from online_meta.replay import ReplayRequest
from online_meta.replay._task_draw import DrawnTasks
from online_meta.replay.uniform import uniform
from online_meta.tree import add, norm, scale, zeros
from online_meta.types import Engine, Meta, Params, Task
from trainers.comparators import MIN_JUDGED_STEPS, RefreshRequest, RefreshResult, always_continue, limit_work
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
SCORE_COST = 0.5
"""The cost of a loss after adaptation, as a share of that of a meta-gradient. It is 0.3 to 0.6 of it."""
SMALL_SHARE = 0.1
"""The share of a budget for the meta-gradients at the end, and for the choice where the leader's start continues."""
BEST = "best"
"""The name under which a state keeps what the best start has lost, which is none of a start."""
LEADER = "leader"
"""The name of the start at the leader."""
MAX_OVERDUE_REFRESHES = 10
"""A late refresh makes at most the steps of this many refreshes on time. The first refresh makes all steps."""
RESTART_SEED_OFFSET = 2**40
"""Initial weights are drawn with round numbers from here on, which no run reaches."""


class Trained(NamedTuple):
    """The result of one start.

    Attributes:
        estimate: of its loss.
        converged: whether its loss has settled.
        saved: its engine's state.
        meta: its meta-parameters.
        work: what it has cost, in meta-gradients of one task.
    """

    estimate: Estimate
    converged: bool
    saved: Params
    meta: Meta
    work: float


class Found(NamedTuple):
    """What the best start has lost.

    Attributes:
        total: the sum of the losses.
        variance: of the sum, due to sampling.
        rounds: the number of rounds up to which they go.
        first: the first round that is covered.
        evaluated: the number of rounds whose loss was computed.
    """

    total: float = 0.0
    variance: float = 0.0
    rounds: int = 0
    first: int = 0
    evaluated: int = 0


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

    Within ``comparator_budget``, each start has an equal share. Its passes are as long as that allows, and starts that
    cannot be evaluated within their share wait for a later refresh; the leader's is always trained.
    """
    limit = limit_work(regret.comparator_budget, context.steps_per_round * context.batch, request)
    training = _make_training(context, regret, request, limit, should_continue, continues=bool(saved))
    trained = _train_all(
        training, _list_starts(context, regret.hindsight_restarts, _warm_start(context, request)), saved or {}
    )
    if trained is None:
        return None
    name, best = min(trained.items(), key=lambda one: (math.isnan(one[1].estimate.total), one[1].estimate.total))
    found = Found(*best.estimate, request.rounds, training.coverage.first, len(training.sample.rounds))
    comparator = _make_comparator(found)._replace(
        settled=best.converged, gradient_norm=_gradient_norm(training, best.meta)
    )
    states = {f"{start}.{key}": value for start, one in trained.items() for key, value in one.saved.items()}
    untouched = {key: value for key, value in (saved or {}).items() if key.partition(".")[0] not in (*trained, BEST)}
    return RefreshResult(comparator, {**untouched, **states, **_to_tensors(found, name)})


def extend(
    context: LearnerContext,
    regret: RegretSettings,
    request: RefreshRequest,
    saved: Params | None,
    should_continue: Callable[[], bool] = always_continue,
) -> RefreshResult | None:
    """Evaluate the best start of the last refresh on the rounds since, without training.

    If there was no refresh yet, ``warm_start`` is evaluated on all rounds. At most ``hindsight_rounds`` rounds are
    evaluated. As before, the loss is an upper bound of the minimum if every round was evaluated. It has not settled,
    because longer training may lower it.
    """
    before, meta = _restore(context, request, saved or {})
    limit = limit_work(regret.comparator_budget, context.steps_per_round * context.batch, request)
    coverage = find_coverage(context.buffer, range(before.rounds, request.rounds), request.skipped)
    sample = sample_rounds(coverage, int(min(regret.hindsight_rounds, limit / SCORE_COST)), context.seed)
    losses = _find_losses(context, meta, sample.rounds, regret.loss_cap, should_continue)
    if losses is None:
        return None
    since = estimate_sum(losses, sample.weights)
    found = before._replace(
        total=before.total + since.total,
        variance=before.variance + since.variance,
        rounds=request.rounds,
        first=before.first if before.rounds else coverage.first,
        evaluated=before.evaluated + len(losses),
    )
    return RefreshResult(_make_comparator(found), saved or {})


def _make_comparator(found: Found) -> Comparator:
    return Comparator(
        "hindsight",
        found.rounds,
        found.total,
        math.sqrt(found.variance),
        settled=False,
        first_round=found.first,
        evaluated=found.evaluated,
    )


def _to_tensors(found: Found, start: str) -> Params:
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in found._asdict().items()}
    values["start"] = torch.tensor(list(start.encode()), dtype=torch.uint8)
    return {f"{BEST}.{name}": value for name, value in values.items()}


def _restore(context: LearnerContext, request: RefreshRequest, saved: Params) -> tuple[Found, Meta]:
    """Return what the last refresh found, and its meta-parameters; nothing and the warm start if there was none."""
    values = {name: saved[f"{BEST}.{name}"] for name in Found._fields if f"{BEST}.{name}" in saved}
    if not values or values["rounds"] > request.rounds:  # Rounds that were not durable are played again.
        return Found(), _warm_start(context, request) or context.start
    start = bytes(saved[f"{BEST}.start"].tolist()).decode()
    engine = context.engine(context.start)
    engine.load(_select(saved, start))
    counts = {name: int(values[name]) for name in ("rounds", "first", "evaluated")}
    return Found(float(values["total"]), float(values["variance"]), **counts), engine.meta()


def _make_training(
    context: LearnerContext,
    regret: RegretSettings,
    request: RefreshRequest,
    limit: float,
    should_continue: Callable[[], bool],
    *,
    continues: bool,
) -> "_TrainingContext":
    coverage = find_coverage(context.buffer, range(request.rounds), request.skipped)
    # One evaluation costs half of the limit at most.
    sample = sample_rounds(coverage, int(min(regret.hindsight_rounds, limit)), context.seed)
    new = request.rounds
    if continues:
        new = min(request.rounds - request.covered, MAX_OVERDUE_REFRESHES * regret.every_rounds)
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
    return _TrainingContext(
        learner_context=context,
        coverage=coverage,
        sample=sample,
        steps_per_pass=math.ceil(regret.hindsight_steps * new) if len(coverage.rounds) else 0,
        max_passes=regret.hindsight_max_passes,
        loss_cap=regret.loss_cap,
        should_continue=should_continue,
        total=total,
        tuner=tuner,
        plans=tuple(_without_missing_program(plan, context.programs) for plan in request.plans),
        limit=limit,
    )


def _without_missing_program(plan: ExecutionPlan, place: Path | Programs | None) -> ExecutionPlan:
    """Return the plan, or without its compiled program the same computation as it was recorded."""
    if plan.batching != "compiled" or (place and plan.program and has_program(place, plan.program)):
        return plan
    return plan._replace(batching="traced")


def _list_starts(context: LearnerContext, restarts: int, leader: Meta | None) -> dict[str, Meta]:
    """Return the starts by name: the run's, random ones, and the leader if there is one."""
    starts = {"0": context.start}
    for at in range(1, restarts):
        starts[str(at)] = context.inner.init(context.draw_weights(RESTART_SEED_OFFSET + at))
    return starts if leader is None else {**starts, LEADER: leader}


def _warm_start(context: LearnerContext, request: RefreshRequest) -> Meta | None:
    # Programs take weights in the order of the run's start; a file does not keep that order.
    return None if request.warm_start is None else order_like(request.warm_start, context.start)


def _gradient_norm(context: "_TrainingContext", meta: Meta) -> float | None:
    """Return the global norm of the mean meta-gradient, from at most ``MAX_GRADIENTS`` sampled rounds; None if none."""
    learner_context, sample = context.learner_context, _thin(context.sample, context.limit_small(MAX_GRADIENTS))
    if not sample.rounds:
        return None
    total = zeros(meta)
    for round, weight in zip(*sample, strict=True):
        grads = learner_context.gradient(meta, learner_context.buffer[round]).grads
        if math.isfinite(float(norm(grads))):
            total = add(total, scale(grads, weight / sum(sample.weights)))
    found = float(norm(total))
    return found if math.isfinite(found) else None


def _thin(sample: Sample, max_count: int) -> Sample:
    """Return every n-th round of a sample, at most ``max_count`` of them."""
    apart = -(-len(sample.rounds) // max_count) or 1
    return Sample(sample.rounds[::apart], sample.weights[::apart])


class _TrainingContext(NamedTuple):
    """What every start goes through."""

    learner_context: LearnerContext
    coverage: Coverage
    sample: Sample
    steps_per_pass: int
    max_passes: int
    loss_cap: float
    should_continue: Callable[[], bool]
    total: TaskSum
    tuner: Autotuner
    plans: tuple[ExecutionPlan, ...]
    limit: float

    @property
    def evaluation_cost(self) -> float:
        """The cost of an evaluation, in meta-gradients of one task."""
        return SCORE_COST * len(self.sample.rounds)

    def limit_small(self, count: int) -> int:
        """Return ``count``, or a smaller number within a small share of the limit."""
        return int(min(count, max(1.0, SMALL_SHARE * self.limit)))

    def choose_steps(self, share: float) -> int:
        """Return the steps of a pass that costs at most ``share`` together with its evaluation."""
        affordable = (share - self.evaluation_cost) / self.learner_context.batch
        return int(min(self.steps_per_pass, max(0.0, affordable)))


def _train_all(context: _TrainingContext, starts: dict[str, Meta], saved: Params) -> dict[str, Trained] | None:
    """Train the starts within the limit, each with an equal share of what the ones before it have left.

    One that cannot even be evaluated within its share waits for a later refresh, but for the last one, the leader's.
    """
    left, trained = context.limit * (1 - 2 * SMALL_SHARE), dict[str, Trained]()
    for at, (name, start) in enumerate(starts.items()):
        share = left / (len(starts) - at)
        if share < context.evaluation_cost + context.learner_context.batch and at + 1 < len(starts):
            continue
        one = _train(context, _engine(context, name, start, saved), share)
        if one is None:
            return None
        trained[name], left = one, left - one.work
    return trained


def _engine(context: _TrainingContext, name: str, start: Meta, saved: Params) -> Engine:
    """Return the engine of a start: where the last refresh left it, or anew if the leader is better than that."""
    engine = context.learner_context.engine(start)
    own = _select(saved, name)
    if not own:
        return engine
    continued = context.learner_context.engine(start)
    continued.load(own)
    if name != LEADER:
        return continued
    few = _thin(context.sample, context.limit_small(len(context.sample.rounds) or 1))
    here, there = (_evaluate(context, one.meta(), few) for one in (engine, continued))
    return engine if here is not None and there is not None and here.total < there.total else continued


def _select(saved: Params, start: str) -> Params:
    prefix = f"{start}."
    return {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}


def _train(context: _TrainingContext, engine: Engine, share: float) -> Trained | None:
    best: Trained | None = None
    work = 0.0
    for index in range(context.max_passes):
        steps = context.choose_steps(share - work)
        if best is not None and steps < context.steps_per_pass:
            break
        first = index * context.steps_per_pass
        if not _run(context, engine, range(first, first + steps)):
            return None
        estimate = _evaluate(context, engine.meta(), context.sample)
        if estimate is None:
            return None
        work += steps * context.learner_context.batch + context.evaluation_cost
        before = best.estimate.total if best else math.inf
        falls = steps > 0 and estimate.total < before - MIN_RELATIVE_FALL * abs(estimate.total)
        if best is None or estimate.total < before:
            best = Trained(estimate, False, engine.save(), _copy(engine.meta()), work)
        if not falls:
            return best._replace(converged=_is_judged(context, steps), work=work)
    return best and best._replace(work=work)


def _copy(meta: Meta) -> Meta:
    return Meta(*({name: value.detach().clone() for name, value in part.items()} for part in meta))


def _is_judged(context: _TrainingContext, steps: int) -> bool:
    """Return whether a pass is long enough to show that the loss does not fall any more."""
    eligible = len(context.coverage.rounds)
    return not eligible or steps >= max(math.ceil(eligible / context.learner_context.batch), MIN_JUDGED_STEPS)


def _run(context: _TrainingContext, engine: Engine, steps: range) -> bool:
    learner_context, uniform_policy, gradient = (
        context.learner_context,
        uniform(),
        sum_skipping_nonfinite(context.total),
    )
    eligible: Sequence[int] = context.coverage.rounds  # type: ignore[assignment]  # 8 bytes each
    for step in steps:
        if not context.should_continue():
            return False
        newest = int(eligible[-1])
        samples = uniform_policy.sample(
            {}, ReplayRequest(learner_context.seed + SEED_OFFSET, newest, step, eligible, learner_context.batch)
        )
        drawn = DrawnTasks(
            learner_context.draw, learner_context.buffer, learner_context.seed + SEED_OFFSET, newest, step
        )
        tasks = [drawn[sample.round] for sample in samples]
        _follow_plans(context, engine.meta(), tasks)
        engine.lr_scale = (1 + math.cos(math.pi * (step - steps.start) / len(steps))) / 2
        engine.apply(*gradient(engine.meta(), tasks, samples))
    return True


def _follow_plans(context: _TrainingContext, meta: Meta, tasks: Sequence[Task]) -> None:
    """Follow the trainer's plans, and measured ones for tasks of other shapes."""
    total, known = context.total, {plan.signature for plan in context.plans}
    total.follow(context.plans)
    new = [task for task in tasks if signature_of(total.fit(task)) not in known]
    if new:
        total.follow((*context.plans, *context.tuner.find(meta, new, context.plans)))


def _evaluate(context: _TrainingContext, meta: Meta, sample: Sample) -> Estimate | None:
    losses = _find_losses(context.learner_context, meta, sample.rounds, context.loss_cap, context.should_continue)
    return None if losses is None else estimate_sum(losses, sample.weights)


def _find_losses(
    context: LearnerContext, meta: Meta, rounds: Sequence[int], loss_cap: float, should_continue: Callable[[], bool]
) -> list[float] | None:
    """Return the loss of each round after adaptation, ``loss_cap`` if it is not finite; None if interrupted."""
    losses = []
    for round in rounds:
        if not should_continue():
            return None
        loss = score_task(context.inner, meta, context.buffer[round]).loss_after
        losses.append(loss if is_finite_loss(loss) else loss_cap)
    return losses
