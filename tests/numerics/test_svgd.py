"""Stein variational gradient descent, its particles and the chaser loss against loops that are written out."""

import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import online_meta as om
from online_meta.inner import init_carry
from online_meta.metagrads.chaser import chaser
from online_meta.rules.svgd import PREFIX, measure_kernel
from online_meta.testing.compare import assert_close
from online_meta.types import Carry, Seen
from tests.numerics.problems import problem
from tests.numerics.reference_loop import join_parts

LR, M, STEPS, SIGMA, PRECISION = 0.3, 4, 3, 0.5, 0.7


def setting(particles=M, steps=STEPS, precision=PRECISION, fast=("*",)):
    given = problem("mlp_tanh")
    loss = om.model_loss(given.module, "gaussian_of_noise", loss_options={"sigma": SIGMA})
    inner = om.Inner(loss, om.rules.svgd(lr=LR, particles=particles, precision=precision), steps, fast)
    return given.module, inner, inner.init(given.weights()), given.task()


class Unrolled:
    """Bayesian MAML as its paper has it: a vector for each particle, sums over pairs, and one graph."""

    def __init__(self, module, meta, fast):
        self.module, self.leaves = module, {n: v.clone().requires_grad_() for n, v in join_parts(meta).items()}
        self.names, self.fast = [*meta.weights], [n for n in meta.weights if fast in ("*", n.partition(".")[0])]
        stacked = {n: [self.leaves[f"weights/{n}"], *self.leaves.get(f"rule/{PREFIX}{n}", [])] for n in self.fast}
        self.start = [torch.cat([stacked[n][m].flatten() for n in self.fast]) for m in range(M)]

    def nll(self, theta, batch):
        """Return the nll of each row."""
        shapes = [self.leaves[f"weights/{n}"].shape for n in self.fast]
        parts = theta.split([shape.numel() for shape in shapes])
        own = {n: part.view(shape) for n, part, shape in zip(self.fast, parts, shapes, strict=True)}
        weights = {n: own.get(n, self.leaves[f"weights/{n}"]) for n in self.names}
        output = functional_call(self.module, weights, (batch.x,))
        return -torch.distributions.Normal(output, SIGMA).log_prob(batch.y).sum(1)

    def step(self, thetas, batch):
        n, pairs = len(batch.y), [(a - b).square().sum() for i, a in enumerate(thetas) for b in thetas[:i]]
        width = sorted(pairs, key=lambda pair: float(pair.detach()))[(len(pairs) - 1) // 2] / math.log(M)
        scores = [
            torch.autograd.grad(
                -self.nll(theta, batch).sum() - PRECISION / 2 * theta.square().sum(), theta, create_graph=True
            )[0]
            for theta in thetas
        ]
        moved = []
        for theta in thetas:
            total = torch.zeros_like(theta)
            for other, score in zip(thetas, scores, strict=True):

                def kernel(at, theta=theta):
                    return torch.exp(-(at - theta).square().sum() / width)

                total = total + kernel(other) * score + torch.func.grad(kernel)(other)
            moved.append(theta + LR / n / M * total)
        return moved

    def adapt(self, support, steps=STEPS):
        thetas = self.start
        for _ in range(steps):
            thetas = self.step(thetas, support)
        return thetas

    def gradient(self, loss):
        found = torch.autograd.grad(loss, [*self.leaves.values()], materialize_grads=True)
        return dict(zip(self.leaves, found, strict=True))


@pytest.mark.parametrize("fast", ["*", "head"])
def test_the_exact_gradient_of_the_mixture_is_that_of_an_unrolled_loop(fast):
    module, inner, meta, task = setting(fast=(fast if fast == "*" else "head.*",))
    found = om.exact(inner)(meta, task)
    loop = Unrolled(module, meta, fast)
    each = torch.stack([loop.nll(theta, task.query) for theta in loop.adapt(task.support)])
    loss = (math.log(M) - torch.logsumexp(-each, 0)).mean()
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-12, atol=0)
    assert_close(join_parts(found.grads), loop.gradient(loss), 1e-12)


@pytest.mark.parametrize("further", [1, 2])
def test_the_chaser_gradient_is_that_of_an_unrolled_loop_whose_leader_is_held(further):
    module, inner, meta, task = setting()
    found = chaser(inner, steps=further)(meta, task)
    loop = Unrolled(module, meta, "*")
    ends = leader = loop.adapt(task.support)
    everything = om.Batch(*(torch.cat(pair) for pair in zip(task.support, task.query, strict=True)))
    for _ in range(further):
        leader = loop.step(leader, everything)
    loss = torch.stack([(end - other.detach()).square().sum() for end, other in zip(ends, leader, strict=True)]).sum()
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-12, atol=0)
    assert_close(join_parts(found.grads), loop.gradient(loss), 1e-12)


@pytest.mark.parametrize("estimator", [om.exact, om.first_order])
def test_one_particle_is_maml_to_the_bit(estimator):
    _, inner, meta, task = setting(particles=1, precision=0.0)
    maml = replace(inner, rule=om.rules.sgd(lr=LR))
    assert meta.rule == {}
    pairs = zip(tree_leaves(estimator(inner)(meta, task)), tree_leaves(estimator(maml)(meta, task)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    (belief,) = replace(inner, posterior=om.posteriors.particles()).believe(meta, task.support)
    (point,) = maml.believe(meta, task.support)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(belief), tree_leaves(point), strict=True))


def test_many_particles_are_the_posterior_of_a_linear_model():
    """y = x theta + noise of 1, theta ~ N(0, 1 / PRECISION): the mean within 2 %, the variance within 10 %."""
    random = torch.Generator().manual_seed(0)
    count, n = 50, 6
    x = torch.randn(n, generator=random, dtype=torch.float64)
    y = 2 * x + torch.randn(n, generator=random, dtype=torch.float64)
    variance = 1 / float(x @ x + PRECISION)
    mean = variance * float(x @ y)
    rule = om.rules.svgd(lr=0.05 * n, particles=count, precision=PRECISION)
    thetas = torch.randn(count, generator=random, dtype=torch.float64)
    learned = {f"{PREFIX}w": thetas[1:]}
    for k in range(400):
        grads = (torch.outer(thetas, x) - y) @ x / n
        seen = Seen(torch.zeros(()), {"w": grads[0], f"{PREFIX}w": grads[1:]}, n)
        after = rule.update(learned, Carry({"w": thetas[0], f"{PREFIX}w": thetas[1:]}, {}), seen, k).phi
        thetas = torch.cat([after["w"][None], after[f"{PREFIX}w"]])
    assert float(thetas.mean()) == pytest.approx(mean, rel=0.02)
    assert float(thetas.var(correction=0)) == pytest.approx(variance, rel=0.1)


def test_particles_move_apart_along_the_slope_of_the_kernel():
    random = torch.Generator().manual_seed(0)
    thetas = torch.randn(3, 2, generator=random, dtype=torch.float64)
    phi = {"w": thetas[0], f"{PREFIX}w": thetas[1:]}
    rule = om.rules.svgd(lr=0.6, particles=3)
    seen = Seen(torch.zeros(()), {name: torch.zeros_like(value) for name, value in phi.items()}, 5)
    after = rule.update({f"{PREFIX}w": thetas[1:]}, Carry(phi, {}), seen, 0).phi
    moved = torch.cat([after["w"][None], after[f"{PREFIX}w"]]) - thetas
    width = float(measure_kernel({"w": thetas})[1])

    def kernel(a, b):
        return math.exp(-float((a - b).square().sum()) / width)

    for m in range(3):
        slope = torch.zeros(2, dtype=torch.float64)
        for j in range(3):
            for axis in range(2):
                step = 1e-6 * torch.eye(2, dtype=torch.float64)[axis]
                slope[axis] += (kernel(thetas[j] + step, thetas[m]) - kernel(thetas[j] - step, thetas[m])) / 2e-6
        torch.testing.assert_close(moved[m], 0.6 / 3 / 5 * slope, rtol=1e-6, atol=1e-9)
    spread = [float((one - one.mean(0)).square().sum()) for one in (thetas, thetas + moved)]
    assert spread[1] > spread[0]


def test_the_median_of_the_distances_gives_the_width():
    thetas = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)  # 1, 4.24, 5 apart
    kernel, width = measure_kernel({"a": thetas[:, :1], "b": thetas[:, 1:]})
    assert float(width) == pytest.approx(18 / math.log(3))
    assert float(kernel[0, 1]) == pytest.approx(math.exp(-25 * math.log(3) / 18))


def test_particles_that_are_the_same_stay_finite():
    _, inner, meta, task = setting()
    same = om.Meta(
        meta.weights, {n: meta.weights[n.removeprefix(PREFIX)].expand(v.shape) for n, v in meta.rule.items()}
    )
    found = om.exact(inner)(same, task)
    assert all(leaf.isfinite().all() for leaf in tree_leaves(found))


def test_particles_start_like_initialisations_of_their_own():
    given = problem("mlp_tanh")
    inner = setting(particles=40)[1]
    weights = {**given.weights(), "head.bias": torch.zeros(2, dtype=torch.float64)}
    first, again = inner.init(weights).rule, inner.init(weights).rule
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not first[f"{PREFIX}head.bias"].any(), "a bias of zeros stays"
    weight, drawn = weights["body.2.weight"], first[f"{PREFIX}body.2.weight"]
    assert drawn.shape == (39, *weight.shape)
    assert float(drawn.std()) == pytest.approx(float(weight.std()), rel=0.1)
    assert len({tuple(one.flatten().tolist()) for one in drawn}) == 39
    moved = inner.init({**weights, "head.bias": torch.ones(2, dtype=torch.float64)}).rule
    assert not torch.equal(moved[f"{PREFIX}body.2.weight"], drawn), "other weights, other numbers"


def test_weights_that_do_not_adapt_are_shared():
    _, inner, meta, task = setting(fast=("head.*",))
    assert [*meta.rule] == [f"{PREFIX}head.weight", f"{PREFIX}head.bias"]
    (belief,) = replace(inner, posterior=om.posteriors.particles(), samples=M).believe(meta, task.support)
    assert belief.params.keys() == meta.weights.keys()
    for name, value in belief.params.items():
        shared = all(torch.equal(one, value[0]) for one in value)
        assert shared is not name.startswith("head.")


def test_padding_does_not_change_a_step():
    _, inner, meta, task = setting()
    rows = torch.tensor([0, 1, 2, 3, 4, 0, 0])
    padded = om.Batch(task.support.x[rows], task.support.y[rows], (torch.arange(7) < 5).double())
    posterior = replace(inner, posterior=om.posteriors.particles(), samples=M)
    found, right = (posterior.believe(meta, support)[0].params for support in (padded, task.support))
    assert_close(found, right, 1e-12)


def test_a_belief_without_samples_of_a_task_is_the_particles_that_are_learned():
    _, inner, meta, task = setting()
    carry = init_carry(inner, meta, task.support)
    assert carry.phi.keys() == meta.weights.keys() | meta.rule.keys()
    (belief,) = replace(inner, posterior=om.posteriors.particles(), samples=M).believe(meta, task.support, (0,))
    for name, value in belief.params.items():
        assert torch.equal(value, torch.cat([meta.weights[name][None], meta.rule[PREFIX + name]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: om.rules.svgd(particles=0), "particles is 0"),
        (lambda: om.rules.svgd(precision=-1.0), "precision is -1"),
        (lambda: chaser(setting()[1], steps=0), "steps is 0"),
        (lambda: om.exact(setting()[1], query_chunk=2), "query_chunk is 2, but the rule adapts several models"),
        (lambda: believe(setting()[1], 3), "samples is 3, but the rule has 4 particles: set samples = 4"),
        (
            lambda: believe(replace(setting()[1], rule=om.rules.sgd()), 1),
            'posterior = "particles" needs a rule .* use rule = "svgd" with options = { particles = 5 }',
        ),
    ],
)
def test_wrong_choices_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def believe(inner, samples):
    _, _, meta, task = setting()
    return replace(inner, posterior=om.posteriors.particles(), samples=samples).believe(meta, task.support)
