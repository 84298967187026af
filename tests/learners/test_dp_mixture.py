"""The Dirichlet-process mixture: both EM steps from a reference, components that appear and vanish, several ranks."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import online_meta as om
from online_meta.batches import empty_like
from online_meta.learners import MemoryReplayBuffer, dp_mixture, ftml
from online_meta.learners.dp_mixture import DirichletProcessMixture, MixtureOptions, crp_prior, responsibilities
from online_meta.replay import ReplayPolicy, ReplayRequest
from online_meta.replay.all import all as every_round
from online_meta.replay.prioritised import prioritised
from online_meta.replay.uniform import uniform
from online_meta.testing.compare import assert_close
from online_meta.testing.learner_problems import LR, STEPS, frozen, net, setup, stream, weights_of
from tests.learners import slow
from tests.learners.ranks import Exchange, RankOf


def play(learner, tasks):
    return [(learner.score(task), learner.learn(task)) for task in tasks]


# The prior and the responsibilities.


@pytest.mark.parametrize("concentration", [0.3, 1.0, 4.0])
def test_the_prior_of_a_partition_is_the_chinese_restaurant_process(concentration):
    """Its probability is a^K prod_k (n_k - 1)! / (a (a + 1) ... (a + n - 1)), in any order of the tasks."""
    for tables in ([0, 1, 0, 2, 0, 1], [0, 0, 0, 1, 1, 2]):
        chance, counts = 1.0, []
        for table in tables:
            chance *= float(crp_prior(counts, concentration)[table])
            counts = [*counts, 0.0] if table == len(counts) else counts
            counts[table] += 1
        closed = (
            concentration**3 * math.factorial(2) * math.factorial(1) / math.prod(concentration + k for k in range(6))
        )
        assert chance == pytest.approx(closed, rel=1e-12)
    assert crp_prior([2.5, 0.5], 1.0).tolist() == pytest.approx([2.5 / 4, 0.5 / 4, 1.0 / 4])


def test_responsibilities_follow_bayes_rule():
    prior, losses = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), [0.7, 0.2, 1.9]
    joint = [p * math.exp(-8 * loss / 3.0) for p, loss in zip([0.5, 0.3, 0.2], losses, strict=True)]
    found = responsibilities(prior, losses, 8, 3.0)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([value / sum(joint) for value in joint], rel=1e-12)
    # Gaussian errors: 5 samples, mean square 0.6 and 0.5, variance 0.25, so temperature 0.5.
    odds = math.exp(-5 * 0.6 / (2 * 0.25)) / math.exp(-5 * 0.5 / (2 * 0.25))
    one, two = responsibilities(torch.tensor([0.5, 0.5]).double(), [0.6, 0.5], 5, 0.5).tolist()
    assert one / two == pytest.approx(odds, rel=1e-12)


def test_a_loss_that_is_not_finite_has_zero_responsibility():
    prior = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert responsibilities(prior, [1.0, math.nan, 1.0], 4, 1.0).tolist() == [0.5, 0.0, 0.5]
    assert responsibilities(prior, [math.inf, 1e9, math.nan], 4, 1.0).tolist() == [0.0, 1.0, 0.0]
    assert responsibilities(prior, [math.inf] * 3, 4, 1.0).tolist() == [0.0] * 3


# Expectation and maximisation against a reference.


def support_fit(weights, task):
    leaves = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
    adapted = slow.adapt(net(), leaves, task.support, LR, STEPS)
    return float(slow.loss_of(net(), adapted, task.support).detach())


def shares_of(weights, chances, task, temperature):
    joint = [
        c * math.exp(-len(task.support.y) * support_fit(w, task) / temperature)
        for w, c in zip(weights, chances, strict=True)
    ]
    return [value / sum(joint) for value in joint]


def maximise(weights, tasks, belong, lr):
    """Return the weights after a step of gradient descent on sum_k r_k f_k(U_k(w)) / sum_k r_k."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
    total = sum(
        share * slow.loss_of(net(), slow.adapt(net(), leaves, task.support, LR, STEPS), task.query)
        for task, share in zip(tasks, belong, strict=True)
    )
    grads = torch.autograd.grad(total / sum(belong), list(leaves.values()))
    return {name: (leaves[name] - lr * grad).detach() for name, grad in zip(leaves, grads, strict=True)}


def reference(tasks, options, lr, steps):
    """Return the components' weights, their counts, and all responsibilities, when every round is revisited."""
    start, weights, counts, said = weights_of(net()), [], [], []
    for t, task in enumerate(tasks):
        shares = shares_of([*weights, start], [*counts, options.concentration], task, options.temperature)
        room = len(weights) < options.most
        before, counts = counts, [count * (1 - 1 / options.horizon) for count in counts]
        if room and shares[-1] == max(shares):
            weights, counts = [*weights, start], [*counts, 1.0]
        else:
            shares = shares_of(weights, before, task, options.temperature)
            counts = [count + share for count, share in zip(counts, shares, strict=True)]
        for _ in range(steps):
            each = [shares_of(weights, counts, one, options.temperature) for one in tasks[: t + 1]]
            said += [share for shares in each for share in shares]
            weights = [
                maximise(w, tasks[: t + 1], [shares[place] for shares in each], lr) for place, w in enumerate(weights)
            ]
    return weights, counts, said


def test_both_em_steps_agree_with_the_reference():
    tasks, options = stream(5), MixtureOptions(concentration=2.0, temperature=6.0, most=3, horizon=50.0)
    weights, counts, said = reference(tasks, options, 0.1, 2)
    context = setup(replay=every_round(), engine=lambda meta: om.MetaOptimizer(meta, "sgd", 0.1))
    learner = DirichletProcessMixture(context, options)
    learned = [one for _, one in play(learner, tasks)]
    assert len(weights) >= 2
    assert sum(0.05 < share < 0.95 for share in said) > len(said) / 4, "many responsibilities are shared"
    assert min(said) > dp_mixture.NEGLIGIBLE, "no responsibility is negligible: the reference leaves none out"
    assert [count for count in learner.counts if count] == pytest.approx(counts, rel=1e-9)
    for place, expected in enumerate(weights):
        saved = learner.save()
        assert_close({name: saved[f"{place}.weights.{name}"] for name in expected}, expected, 1e-9)
    assert learned[-1].replayed == (0, 1, 2, 3, 4) * 2
    assert len(learned[-1].steps) == 2 * len(weights)


# Two clusters that no single initialisation fits.


def linear():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(3, 2).double()


def clustered(sign, seed):
    """Return a task of the cluster of slopes near +2 or near -2."""
    random = torch.Generator().manual_seed(seed)
    slope = 2.0 * sign + 0.2 * torch.randn(3, 2, generator=random, dtype=torch.float64)

    def batch(size):
        x = torch.randn(size, 3, generator=random, dtype=torch.float64)
        return om.Batch(x, x @ slope)

    return om.Task(batch(5), batch(5))


def two_clusters(rounds):
    return [clustered(1 if t // 4 % 2 == 0 else -1, t) for t in range(rounds)]


def clustered_setup(**changes):
    module = linear()
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=0.02), 1)
    fields = {"inner": inner, "gradient": om.exact(inner), "start": inner.init(weights_of(module))}
    return setup(**{**fields, "engine": lambda meta: om.MetaOptimizer(meta, "adam", 0.1), "batch": 4, **changes})


def late_loss(learner):
    return sum(score.loss_after for score, _ in play(learner, two_clusters(32))[-8:]) / 8


def test_the_mixture_finds_two_clusters_and_fits_both():
    mixture = dp_mixture.build(clustered_setup())
    loss = late_loss(mixture)
    assert sum(count > 0 for count in mixture.counts) == 2
    assert sum(mixture.counts) == pytest.approx(32, rel=0.05)
    assert max(mixture.counts) < 17
    assert 10 * loss < late_loss(ftml.build(clustered_setup()))
    alone = dp_mixture.build(clustered_setup(), most=1)
    assert 10 * loss < late_loss(alone)
    assert sum(count > 0 for count in alone.counts) == 1


def test_concentration_and_temperature_set_the_number_of_components():
    def components(**options):
        learner = dp_mixture.build(clustered_setup(), most=8, **options)
        play(learner, two_clusters(12))
        return sum(count > 0 for count in learner.counts)

    assert components(temperature=1e6, concentration=1e-3) == 1
    assert components(temperature=1e6, concentration=1e9) == 8
    assert components() == 2


def test_an_unused_component_is_pruned_and_its_slot_reused():
    learner = dp_mixture.build(clustered_setup(), horizon=6.0, fewest=0.3)
    play(learner, two_clusters(8))
    first, second = learner.counts[:2]
    assert min(first, second) > 0.3
    rounds = math.ceil(math.log(second / 0.3) / -math.log(1 - 1 / 6))
    play(learner, [clustered(1, 100 + t) for t in range(rounds - 1)])
    assert learner.counts[1] == pytest.approx(second * (5 / 6) ** (rounds - 1), rel=1e-6), "only time decayed the count"
    play(learner, [clustered(1, 200)])
    assert learner.counts[1] == 0.0
    assert not any(name.startswith("1.") for name in learner.save())
    assert learner.counts[0] > 4

    task, other = clustered(-1, 300), dp_mixture.build(clustered_setup(replay=ReplayPolicy(lambda memory, request: [])))
    learner._sampler = other._sampler  # Both revisit only the new round.
    play(learner, [task])
    play(other, [task])
    restarted, first = learner.save(), other.save()
    assert {n[2:]: v for n, v in frozen(restarted).items() if n.startswith("1.")} == {
        n[2:]: v for n, v in frozen(first).items() if n.startswith("0.")
    }, "it starts with the run's first parameters and a new optimizer"


# Saving and loading.


def test_a_loaded_mixture_continues_bit_for_bit_with_any_number_of_components():
    tasks = [*two_clusters(9), *[clustered(1, 50 + t) for t in range(16)], *two_clusters(3)]
    options = {"horizon": 5.0, "fewest": 0.3}
    whole = dp_mixture.build(clustered_setup(), **options)
    states, said, numbers = [], [], []
    for t, task in enumerate(tasks):
        states.append(whole.save())
        numbers.append(sum(count > 0 for count in whole.counts))
        said += play(whole, [task])
        assert whole._context.buffer.available(t + 1)
    assert {0, 1, 2} <= set(numbers)
    assert 1 in numbers[numbers.index(2) :], "a component was pruned"
    end = frozen(whole.save())
    for stop in (0, 3, 7, 20, len(tasks) - 1):  # The same learner loads older and newer states.
        whole.load(states[stop], stop)
        assert frozen(whole.save()) == frozen(states[stop])
        assert play(whole, tasks[stop:]) == said[stop:]
        assert frozen(whole.save()) == end


def test_partial_saves_add_up_to_the_whole_state():
    learner = dp_mixture.build(clustered_setup())
    play(learner, two_clusters(8))
    whole, halves = learner.save(), [learner.save(keep) for keep in (is_even, lambda name: not is_even(name))]
    assert frozen({**halves[0], **halves[1]}) == frozen(whole)
    assert not set(halves[0]) & set(halves[1])
    assert halves[0]
    assert halves[1]


def is_even(name):
    return sum(name.encode()) % 2 == 0


# Scoring does not see the query set.


TORN = om.Task(clustered(1, 500).support, clustered(-1, 501).query)
"""A task whose support set is from one cluster and whose query set is from the other."""


def mixture_loss(learner, weigh):
    """Return the query loss on ``TORN`` of the mean output of all components, weighted by their fit to ``weigh``."""
    inner, counts = learner.inner, [count for count in learner.counts if count]
    metas = [*learner._metas(), learner._context.start]
    adapted = [inner.adapt(meta, TORN.support) for meta in metas]
    fits = [float(inner.loss(inner.adapt(meta, weigh), weigh)) for meta in metas]
    shares = responsibilities(crp_prior(counts, 1.0), fits, len(weigh.x), 1.0)
    output = sum(share * inner.loss.output(params, TORN.query.x) for share, params in zip(shares, adapted, strict=True))
    return float(F.mse_loss(output, TORN.query.y))


def test_the_mixture_answers_with_all_components_weighted_by_the_support_set_alone():
    learner = DirichletProcessMixture(clustered_setup(), MixtureOptions())
    play(learner, two_clusters(12))
    found = learner.score(TORN).loss_after
    assert found == pytest.approx(mixture_loss(learner, TORN.support), rel=1e-9)
    assert found != pytest.approx(mixture_loss(learner, TORN.query), rel=1e-3), "the query set would weigh otherwise"
    prior = learner.answers(learner.state(), empty_like(TORN.support), TORN.query.x)[""]
    shares = prior[0].log_weights.exp()
    assert torch.allclose(shares.double(), crp_prior([count for count in learner.counts if count], 1.0))


def test_a_poison_task_creates_no_component_and_belongs_to_none():
    (bad,) = stream(1, seed=99)
    bad = bad._replace(support=bad.support._replace(y=bad.support.y * 1e200))
    learner, clean = dp_mixture.build(setup(replay=every_round())), dp_mixture.build(setup(replay=every_round()))
    assert play(learner, [bad])[0][1] == om.Learned((), ())
    assert not any(learner.counts)
    tasks = stream(3)
    said = play(learner, [*tasks[:2], bad, tasks[2]])
    play(clean, tasks[:2])
    assert {step.skipped for _, learned in said for step in learned.steps} == {None}
    assert sum(learner.counts) == pytest.approx(3.0, abs=0.02)


# Replay and ranks.


def test_the_newest_round_is_in_every_batch():
    requests = []

    def sample(memory, request):
        requests.append(request)
        return uniform().sample(memory, request)

    learner = dp_mixture.build(setup(replay=ReplayPolicy(sample)))
    for t, (_, learned) in enumerate(play(learner, stream(12))):
        for step in (0, 1):
            batch = learned.replayed[step * min(3, t + 1) : (step + 1) * min(3, t + 1)]
            drawn = [
                one.round
                for one in uniform().sample({}, ReplayRequest(5 + dp_mixture.SEED_OFFSET, t, step, range(t + 1), 3))
            ]
            assert t in batch
            assert list(batch) == (drawn if t in drawn else [*drawn[:-1], t])
    assert {request.batch for request in requests} == {3}


def test_a_measuring_replay_policy_is_replaced_by_uniform_replay():
    one, two = (dp_mixture.build(setup(replay=policy)) for policy in (prioritised(), uniform()))
    tasks = stream(6)
    assert play(one, tasks) == play(two, tasks)


class DistributedBuffer(MemoryReplayBuffer):
    """A replay buffer that returns only the rounds distributed to its rank."""

    def __init__(self, rank):
        super().__init__()
        self._rank, self._mine = rank, set()

    def distribute(self, shares):
        self._mine = set(shares[self._rank])

    def __getitem__(self, round):
        assert round in self._mine
        return super().__getitem__(round)


def play_ranks(world, in_order):
    exchange, tasks = Exchange(world), two_clusters(14)

    def make(rank):
        engine = lambda meta: RankOf(meta, exchange, rank, world, in_order, 0.05, "adam")  # noqa: E731
        context = clustered_setup(
            engine=engine, buffer=DistributedBuffer(rank), gather=lambda value: exchange.gather(rank, value)
        )
        return dp_mixture.build(context)

    learners = [make(rank) for rank in range(world)]  # Not in the threads: they share torch's generator.

    def play_rank(rank):
        return play(learners[rank], tasks), learners[rank].save()

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(play_rank, range(world)))


@pytest.mark.parametrize("in_order", [False, True])
def test_ranks_learn_the_same_as_a_single_process(in_order):
    ((said, alone),) = play_ranks(1, in_order)
    for ranks in (2, 3):
        found = play_ranks(ranks, in_order)
        assert all(frozen(saved) == frozen(found[0][1]) for _, saved in found)
        assert found[0][1].keys() == alone.keys()
        assert [learned.replayed for _, learned in found[0][0]] == [learned.replayed for _, learned in said]
        if in_order:
            assert frozen(found[0][1]) == frozen(alone)
        for name, value in alone.items():
            torch.testing.assert_close(found[0][1][name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [{"concentration": 0.0}, {"temperature": -1.0}, {"most": 0}, {"horizon": 1.0}, {"fewest": 1.0}, {"fewest": -0.1}],
)
def test_an_option_outside_its_range_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        dp_mixture.build(setup(), **options)
