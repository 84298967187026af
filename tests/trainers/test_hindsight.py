"""The hindsight comparator approaches the exact minimum, and its standard error holds over many seeds."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import online_meta as om
from online_meta.batching.plan import ExecutionPlan, signature_of
from online_meta.batching.task_sum import TaskSum
from online_meta.learners import LearnerContext, MemoryReplayBuffer
from online_meta.regret.scoring import score_task
from online_meta.replay import ReplayRequest
from online_meta.replay.uniform import uniform
from online_meta.testing.learner_problems import frozen
from trainers.comparators import RefreshRequest, always_continue
from trainers.comparators._sampling import SEED_OFFSET
from trainers.comparators.hindsight import SCORE_COST, extend, refresh
from trainers.settings import RegretSettings

DIMENSIONS = 3
LR = 0.1


def task(seed):
    """Return the task of a noisy linear map of x, (n, 3) -> (n, 1)."""
    random = torch.Generator().manual_seed(300 + seed)
    slope = torch.tensor([[1.0], [-2.0], [0.5]]) + torch.randn(DIMENSIONS, 1, generator=random)

    def batch(n):
        x = torch.randn(n, DIMENSIONS, generator=random).double()
        return om.Batch(x, x @ slope.double() + 0.1 * torch.randn(n, 1, generator=random).double())

    return om.Task(batch(5), batch(6))


def regression(tasks, lr=0.05, batch=8, seed=0, accessed=None):
    """Return a learner context for a linear map, adapted by one step of gradient descent."""
    module = nn.Linear(DIMENSIONS, 1, bias=False).double()
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=LR), steps=1)
    buffer = RecordingBuffer(tasks, accessed if accessed is not None else [])
    return LearnerContext(
        inner=inner,
        gradient=om.exact(inner),
        start=inner.init({"weight": torch.zeros(1, DIMENSIONS, dtype=torch.float64)}),
        draw_weights=lambda round: {},
        engine=lambda meta: om.MetaOptimizer(meta, "adam", lr),
        replay=uniform(),
        batch=batch,
        steps_per_round=1,
        seed=seed,
        buffer=buffer,
    )


class RecordingBuffer(MemoryReplayBuffer):
    """A replay buffer that records which rounds are read."""

    def __init__(self, tasks, accessed):
        super().__init__()
        self.accessed = accessed
        for round, one in enumerate(tasks):
            self.add(round, one)

    def __getitem__(self, round):
        self.accessed.append(round)
        return super().__getitem__(round)


def best_fixed_loss(tasks):
    """Return min_w sum_t f_t(U_t(w)): U_t(w) = (I - 2 lr/n X'X) w + 2 lr/n X'y, so it is least squares in w."""
    rows, targets = [], []
    for support, query in tasks:
        x, y = support.x.numpy(), support.y.numpy()
        step = 2 * LR / len(x)
        m, c = np.eye(DIMENSIONS) - step * x.T @ x, step * x.T @ y
        q, size = query.x.numpy(), math.sqrt(len(query.x))
        rows.append(q @ m / size)
        targets.append((query.y.numpy() - q @ c) / size)
    return float(np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[1][0])


def refresh_hindsight(
    setup, rounds, steps, evaluate, saved, skipped=(), should_continue=always_continue, starts=1, max_passes=1
):
    """Refresh with ``steps`` meta-steps per pass, evaluated on ``evaluate`` rounds."""
    steps_per_round = (steps - 0.5) / rounds if steps else 0.0  # so that rounding up gives ``steps``
    regret = RegretSettings(
        hindsight_steps=steps_per_round,
        hindsight_rounds=evaluate,
        hindsight_restarts=starts,
        hindsight_max_passes=max_passes,
    )
    return refresh(setup, regret, RefreshRequest(rounds, 0, skipped), saved, should_continue)


ROUNDS = 14
TASKS = [task(t) for t in range(ROUNDS)]


def test_the_estimate_approaches_the_minimum_from_above():
    best = best_fixed_loss(TASKS)
    setup, saved, found = regression(TASKS), None, []
    for _ in range(6):
        estimate = refresh_hindsight(setup, ROUNDS, 60, ROUNDS, saved)
        saved = estimate.saved
        found.append(estimate.comparator.cumulative_loss)
        assert estimate.comparator[:2] == ("hindsight", ROUNDS)
        assert estimate.comparator.standard_error == 0.0
    untrained = refresh_hindsight(setup, ROUNDS, 0, ROUNDS, None).comparator.cumulative_loss
    assert all(loss >= best for loss in (untrained, *found))
    assert untrained > 1.2 * best
    assert found[-1] < 1.01 * best
    assert found[-1] < found[0] < untrained


def test_full_batches_reach_the_minimum():
    setup = regression(TASKS, batch=ROUNDS, lr=0.05)
    loss = refresh_hindsight(setup, ROUNDS, 250, ROUNDS, None).comparator.cumulative_loss
    best = best_fixed_loss(TASKS)
    assert best <= loss * (1 + 1e-12)
    assert loss == pytest.approx(best, rel=1e-6)


def test_a_round_is_evaluated_without_the_further_answers_of_the_run():
    steps = []

    def update(rule, carry, seen, step):
        steps.append(step)
        return sgd.update(rule, carry, seen, step)

    sgd, setup = om.rules.sgd(lr=LR), regression(TASKS)
    counting = replace(setup.inner, rule=sgd._replace(update=update))
    alone, further = (
        refresh_hindsight(replace(setup, inner=inner), ROUNDS, 0, ROUNDS, None).comparator
        for inner in (setup.inner, replace(counting, answer_steps=(0, 5, 20)))
    )
    assert steps == [0] * ROUNDS, "one step for each round, as the run learns"
    assert further == alone


def test_only_rounds_before_the_refresh_are_used():
    accessed = []
    setup = regression(TASKS, accessed=accessed)
    refresh_hindsight(setup, 6, 20, 100, None)
    assert set(accessed) == set(range(6))


def test_a_refresh_is_deterministic_and_continues_from_its_saved_state():
    setup = regression(TASKS)
    one, two = (refresh_hindsight(setup, ROUNDS, 5, 7, None) for _ in range(2))
    assert one.comparator == two.comparator
    assert frozen(one.saved) == frozen(two.saved)
    further = refresh_hindsight(setup, ROUNDS, 5, 7, one.saved)
    assert frozen(further.saved) != frozen(one.saved)
    assert float(further.saved["0.optimizer.step.weights.weight"]) == 10
    assert frozen(setup.start.weights) == frozen(regression(TASKS).start.weights)


def test_the_comparator_samples_independently_of_the_learners():
    accessed = []
    setup = regression(TASKS, batch=3, seed=4, accessed=accessed)
    refresh_hindsight(setup, ROUNDS, 2, 1, None)
    sample, rounds = uniform().sample, range(ROUNDS)
    drawn = [
        [p.round for p in sample({}, ReplayRequest(4 + SEED_OFFSET, ROUNDS - 1, step, rounds, 3))] for step in range(2)
    ]
    assert [accessed[:3], accessed[3:6]] == drawn
    assert drawn[0] != [p.round for p in sample({}, ReplayRequest(4, ROUNDS - 1, 0, rounds, 3))]


def test_skipped_rounds_are_neither_trained_on_nor_counted():
    accessed, skipped = [], {0, 5, ROUNDS - 1}
    found = refresh_hindsight(regression(TASKS, accessed=accessed), ROUNDS, 20, 100, None, skipped)
    assert set(accessed) == set(range(ROUNDS)) - skipped
    assert float(found.saved["0.optimizer.step.weights.weight"]) == 20
    left = [one for round, one in enumerate(TASKS) if round not in skipped]
    alone = refresh_hindsight(regression(left), len(left), 0, 100, found.saved)
    assert found.comparator.as_of_round == ROUNDS
    assert found.comparator.cumulative_loss == pytest.approx(alone.comparator.cumulative_loss, rel=1e-12)
    assert found.comparator.cumulative_loss >= best_fixed_loss(left)


def test_the_loss_is_zero_when_every_round_was_skipped():
    accessed = []
    found = refresh_hindsight(regression(TASKS, accessed=accessed), 3, 20, 100, None, {0, 1, 2})
    assert found.comparator == om.Comparator("hindsight", 3, 0.0, 0.0, evaluated=0)
    assert accessed == []


@pytest.mark.parametrize("allowed", [0, 3, 20, 25])
def test_a_refresh_stops_when_it_may_not_continue(allowed):
    accessed, left = [], allowed

    def should_continue():
        nonlocal left
        left -= 1
        return left >= 0

    setup = regression(TASKS, batch=2, accessed=accessed)
    assert refresh_hindsight(setup, ROUNDS, 20, ROUNDS, None, (), should_continue) is None
    assert len(accessed) == 2 * min(allowed, 20) + max(allowed - 20, 0)


def test_a_poison_round_skips_no_step_of_the_comparators_training():
    poisoned = TASKS[3]._replace(query=om.Batch(TASKS[3].query.x, TASKS[3].query.y * 1e200))
    tasks = [*TASKS[:3], poisoned, *TASKS[4:]]
    found = refresh_hindsight(regression(tasks, batch=ROUNDS), ROUNDS, 10, 100, None)
    assert float(found.saved["0.optimizer.step.weights.weight"]) == 10


def test_a_round_without_a_finite_loss_is_charged_at_the_cap():
    poison = TASKS[3]._replace(query=om.Batch(TASKS[3].query.x, TASKS[3].query.y * 1e200))
    with_poison = refresh_hindsight(regression([*TASKS, poison]), ROUNDS + 1, 0, 100, None).comparator
    alone = refresh_hindsight(regression(TASKS), ROUNDS, 0, 100, None).comparator
    assert with_poison.cumulative_loss == pytest.approx(alone.cumulative_loss + RegretSettings().loss_cap, rel=1e-9)


def losses_only(losses, seed):
    """Return a learner context whose task t has loss losses[t] for any weights."""

    def loss(params, batch):
        return batch.y.mean() + 0 * params["w"]

    inner = om.Inner(loss, om.rules.sgd(), steps=0)
    tasks = [om.Task(batch, batch) for batch in (om.Batch(y, y) for y in losses[:, None])]
    base = regression(tasks, seed=seed)
    return LearnerContext(
        **{
            **vars(base),
            "inner": inner,
            "gradient": om.exact(inner),
            "start": inner.init({"w": torch.zeros((), dtype=torch.float64)}),
        }
    )


@pytest.mark.parametrize(("rounds", "evaluate"), [(40, 20), (30, 20), (50, 20)])
def test_the_standard_error_of_a_sampled_evaluation_covers_the_truth(rounds, evaluate):
    """This also holds if the strata that rounds are sampled from differ in size (1 and 2, or 2 and 3)."""
    errors, standard_errors = [], []
    for seed in range(300):
        losses = torch.randn(rounds, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 2
        found = refresh_hindsight(losses_only(losses, seed), rounds, 0, evaluate, None).comparator
        errors.append(found.cumulative_loss - float(losses.sum()))
        standard_errors.append(found.standard_error)
    errors, standard_errors = np.array(errors), np.array(standard_errors)
    assert abs(errors.mean()) < 3 * errors.std() / math.sqrt(len(errors)), "the estimate is unbiased"
    assert np.sqrt(np.square(standard_errors).mean()) == pytest.approx(errors.std(), rel=0.12)
    assert 0.88 < (np.abs(errors) < 1.96 * standard_errors).mean() < 0.98


def test_a_sampled_evaluation_is_unbiased_with_strata_of_unequal_size():
    """A round alone in its stratum has weight one; rounds that share a stratum also stand for the others in it."""
    losses = torch.tensor([0.0, 8.0, 1.0, 0.0, 9.0, 2.0, 0.0, 7.0, 1.0, 0.0, 6.0, 1.0], dtype=torch.float64)
    found = [
        refresh_hindsight(losses_only(losses, seed), 12, 0, 8, None).comparator.cumulative_loss for seed in range(600)
    ]
    assert abs(np.mean(found) - 35.0) < 3.3 * np.std(found) / math.sqrt(600)


def test_the_standard_error_is_conservative_for_drifting_losses():
    covered = 0
    for seed in range(100):
        losses = torch.linspace(5, 1, 60, dtype=torch.float64)
        found = refresh_hindsight(losses_only(losses, seed), 60, 0, 15, None).comparator
        covered += abs(found.cumulative_loss - float(losses.sum())) < 1.96 * found.standard_error
    assert covered >= 95


def test_a_single_sampled_round_represents_all_rounds():
    losses = torch.full((7,), 3.0, dtype=torch.float64)
    assert refresh_hindsight(losses_only(losses, 0), 7, 0, 1, None).comparator.cumulative_loss == 21.0


def valley(start):
    """Return a learner context with two minima in w: a loss of 1 + 0.1 at 2, and the deeper one of 0.1 at -2."""

    def loss(params, batch):
        w = params["w"]
        return 0.1 + (w - 2).square() * (w + 2).square() / 16 + (w + 2) / 4 + 0 * batch.y.mean()

    inner = om.Inner(loss, om.rules.sgd(), steps=0)
    batch = om.Batch(torch.zeros(2), torch.zeros(2))
    base = regression([om.Task(batch, batch)] * 3, lr=0.05, batch=3)
    fields = {"inner": inner, "gradient": om.exact(inner), "start": inner.init({"w": torch.tensor(start).double()})}
    return LearnerContext(**{**vars(base), **fields, "draw_weights": lambda round: {"w": torch.tensor(-1.5).double()}})


def test_the_comparator_is_the_best_of_several_starts():
    setup = valley(2.5)
    alone = refresh_hindsight(setup, 3, 100, 3, None)
    both = refresh_hindsight(setup, 3, 100, 3, None, starts=2)
    assert alone.comparator.cumulative_loss > 3 * 1.0
    assert both.comparator.cumulative_loss < 3 * 0.11
    further = refresh_hindsight(setup, 3, 10, 3, both.saved, starts=2)
    assert {name.partition(".")[0] for name in further.saved} == {"0", "1", "best"}
    assert float(further.saved["0.weights.w"]) == pytest.approx(2, abs=0.2), "each start continues from its own state"
    assert float(further.saved["1.weights.w"]) == pytest.approx(-2, abs=0.2)


def test_the_comparator_is_trained_until_its_loss_stops_falling():
    setup = regression(TASKS, batch=4, lr=0.02)
    losses, settled = [], []
    for max_passes in (1, 2, 4, 60):
        found = refresh_hindsight(setup, ROUNDS, 10, ROUNDS, None, max_passes=max_passes).comparator
        losses.append(found.cumulative_loss)
        settled.append(found.settled)
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < 0.97 * losses[1] < 0.97 * 0.97 * losses[0], "the loss was still falling"
    assert settled == [False] * 4, "ten steps are too few to judge"
    assert losses[3] < 1.05 * best_fixed_loss(TASKS)


def test_it_settles_only_after_a_pass_that_is_long_enough_to_judge():
    setup = regression(TASKS, batch=ROUNDS, lr=0.05)
    found = [refresh_hindsight(setup, ROUNDS, steps, ROUNDS, None, max_passes=8).comparator for steps in (8, 60)]
    assert [one.settled for one in found] == [False, True], "eight steps are too few to judge"
    assert found[1].cumulative_loss == pytest.approx(best_fixed_loss(TASKS), rel=1e-2)
    assert found[1].evaluated == ROUNDS


def test_the_gradient_norm_certifies_a_minimum():
    setup = regression(TASKS, batch=ROUNDS, lr=0.05)
    start, end = (refresh_hindsight(setup, ROUNDS, steps, ROUNDS, None).comparator for steps in (0, 250))
    grads = torch.stack([setup.gradient(setup.start, task).grads.weights["weight"] for task in TASKS])
    assert start.gradient_norm == pytest.approx(float(grads.mean(0).norm()), rel=1e-12)
    assert end.gradient_norm < 1e-3 * start.gradient_norm


def test_it_starts_from_the_leader_too():
    setup = valley(2.5)
    leader = om.Meta({"w": torch.tensor(-1.8, dtype=torch.float64)}, {})
    few = RegretSettings(hindsight_steps=20.0, hindsight_restarts=1, hindsight_max_passes=1)
    alone, both = (refresh(setup, few, RefreshRequest(3, warm_start=start), None) for start in (None, leader))
    assert both.comparator.cumulative_loss < 3 * 0.3 < 3 * 1.0 < alone.comparator.cumulative_loss
    assert leader.weights["w"] == -1.8
    worse = om.Meta({"w": torch.tensor(3.5, dtype=torch.float64)}, {})
    later = refresh(setup, few, RefreshRequest(3, 3, warm_start=worse), both.saved)
    assert later.comparator.cumulative_loss <= both.comparator.cumulative_loss, "the better of the two is continued"


def test_a_pass_that_raises_the_loss_is_discarded():
    setup = regression(TASKS, batch=2, lr=3.0)
    one, two = (refresh_hindsight(setup, ROUNDS, 3, ROUNDS, None, max_passes=max_passes) for max_passes in (1, 9))
    assert two.comparator.cumulative_loss <= one.comparator.cumulative_loss
    at_best = refresh_hindsight(setup, ROUNDS, 0, ROUNDS, two.saved).comparator
    assert at_best.cumulative_loss == two.comparator.cumulative_loss


def test_a_late_refresh_makes_a_bounded_number_of_steps():
    regret = RegretSettings(hindsight_steps=1.0, every_rounds=1, hindsight_restarts=1, hindsight_max_passes=1)
    setup = regression(TASKS)
    first = refresh(setup, regret, RefreshRequest(ROUNDS), None)
    later = refresh(setup, regret, RefreshRequest(ROUNDS), first.saved)
    made = [float(one.saved["0.optimizer.step.weights.weight"]) for one in (first, later)]
    assert made == [ROUNDS, ROUNDS + 10]


def count_work(setup):
    """Return the learner context, and a list of the work of what it computes, in meta-gradients."""
    work = []

    def gradient(meta, task):
        work.append(1.0)
        return setup.gradient(meta, task)

    def update(rule, carry, seen, step):  # A gradient calls it, too; see below.
        work.append(SCORE_COST)
        return sgd.update(rule, carry, seen, step)

    sgd = om.rules.sgd(lr=LR)
    counting = replace(setup.inner, rule=sgd._replace(update=update))
    return replace(setup, inner=counting, gradient=gradient), work


@pytest.mark.parametrize("leader", [None, om.Meta({"weight": torch.ones(1, DIMENSIONS, dtype=torch.float64)}, {})])
@pytest.mark.parametrize("budget", [0.25, 1.0, 3.0, 20.0])
def test_a_refresh_keeps_to_its_budget_and_the_next_one_continues(budget, leader):
    """``context.gradient`` was built before the rule counts, so that only evaluations call the counting rule."""
    setup, work = count_work(regression(TASKS, batch=4))
    settings = RegretSettings(comparator_budget=budget, hindsight_steps=5.0, hindsight_restarts=1)
    one = refresh(setup, settings, RefreshRequest(7, 0, (), leader), None)
    assert sum(work) <= budget * 4 * 7
    work.clear()
    two = refresh(setup, settings, RefreshRequest(ROUNDS, 7, (), leader), one.saved)
    assert 0.3 * budget * 4 * 7 < sum(work) <= budget * 4 * 7
    assert two.comparator.evaluated == min(ROUNDS, int(budget * 4 * 7))
    assert (two.comparator.standard_error == 0.0) == (two.comparator.evaluated == ROUNDS)
    again = refresh(setup, settings, RefreshRequest(ROUNDS, 7, (), leader), one.saved)
    assert (again.comparator, frozen(again.saved)) == (two.comparator, frozen(two.saved)), "it is deterministic"


def test_a_large_budget_is_none():
    settings = [RegretSettings(comparator_budget=budget, hindsight_restarts=1) for budget in (None, 1e6)]
    found = [refresh(regression(TASKS), one, RefreshRequest(ROUNDS), None).comparator for one in settings]
    assert found[0] == found[1]


def test_it_is_extended_by_the_losses_of_the_best_start_on_the_rounds_since():
    setup, accessed = regression(TASKS), []
    refreshed = refresh_hindsight(setup, 9, 60, 100, None, skipped={3})
    there = {key.removeprefix("0."): value for key, value in refreshed.saved.items() if key.startswith("0.")}
    engine = setup.engine(setup.start)
    engine.load(there)
    later = regression(TASKS, accessed=accessed)
    found = extend(later, RegretSettings(), RefreshRequest(ROUNDS, 9, {3, 10}), refreshed.saved).comparator
    rounds = [round for round in range(ROUNDS) if round not in (3, 10)]
    losses = [score_task(setup.inner, engine.meta(), TASKS[round]).loss_after for round in rounds]
    assert accessed == [9, 11, 12, 13], "only the rounds since are read"
    assert found.cumulative_loss == pytest.approx(math.fsum(losses), rel=1e-12)
    assert found[:2] == ("hindsight", ROUNDS)
    assert (found.standard_error, found.evaluated, found.settled) == (0.0, len(rounds), False)
    assert found.cumulative_loss >= best_fixed_loss([TASKS[round] for round in rounds])


@pytest.mark.parametrize("saved", [None, {}])
def test_the_leader_is_judged_if_there_was_no_refresh(saved):
    leader = om.Meta({"weight": torch.ones(1, DIMENSIONS, dtype=torch.float64)}, {})
    setup = regression(TASKS)
    found = extend(setup, RegretSettings(), RefreshRequest(ROUNDS, 0, (), leader), saved).comparator
    losses = [score_task(setup.inner, leader, task).loss_after for task in TASKS]
    assert found.cumulative_loss == pytest.approx(math.fsum(losses), rel=1e-12)
    assert found.evaluated == ROUNDS


def test_an_extension_by_many_rounds_is_a_sample_with_a_standard_error():
    setup = losses_only(torch.linspace(1, 2, 60, dtype=torch.float64), 0)
    refreshed = refresh_hindsight(setup, 10, 0, 100, None)
    settings = RegretSettings(hindsight_rounds=20)
    found = extend(setup, settings, RefreshRequest(60, 10), refreshed.saved).comparator
    assert found.evaluated == 10 + 20
    assert abs(found.cumulative_loss - 90.0) < 4 * found.standard_error < 10.0


def test_an_extension_stops_when_it_may_not_continue():
    setup = regression(TASKS)
    assert extend(setup, RegretSettings(), RefreshRequest(ROUNDS), None, lambda: False) is None


@pytest.mark.parametrize("batching", ["traced", "compiled"])
def test_the_plans_of_the_trainer_are_followed_and_nothing_is_compiled(batching, monkeypatch):
    """Of a program that is not there, the recording is computed."""
    setup = regression(TASKS[:1] * ROUNDS)
    plan = ExecutionPlan(batching, 8, signature_of(TASKS[0]), "0" * 64)
    computed = []
    build = TaskSum._build_stacked_sum
    monkeypatch.setattr(TaskSum, "_build_stacked_sum", lambda *given: (computed.append(given[1]), build(*given))[1])
    request, settings = RefreshRequest(ROUNDS, 0, (), None, (plan,)), RegretSettings(hindsight_restarts=1)
    found = refresh(setup, settings, request, None).comparator
    assert computed == [plan._replace(batching="traced")]
    alone = refresh(setup, settings, request._replace(plans=()), None).comparator
    assert found.cumulative_loss == pytest.approx(alone.cumulative_loss, rel=1e-9)
