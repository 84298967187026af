"""Laplace's approximation against closed forms, brute force and finite differences."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_leaves, tree_map

import online_meta as om
from online_meta.functional.curvature import compute_precision
from online_meta.functional.keyed import keyed, normal_like_all
from online_meta.functional.randomness import INIT_STEP
from online_meta.inner import run_inner_loop
from online_meta.posteriors.laplace import laplace
from online_meta.testing.compare import assert_close, flat
from online_meta.testing.oracle import central_difference
from tests.numerics.problems import problem

SIGMA, STRENGTH, ROWS = 0.4, 1.7, 8
CURVATURES = ("full", "kron", "diag")
every_curvature = pytest.mark.parametrize("curvature", CURVATURES)


def noisy(module):
    return om.model_loss(module, "gaussian_of_noise", loss_options={"sigma": SIGMA})


@pytest.fixture(scope="module")
def linear_gaussian():
    """Return an inner loop, meta-parameters, a support set, its inputs with a 1, and the mode that the loop finds."""
    torch.manual_seed(0)
    module = nn.Linear(3, 1).double()
    x = torch.randn(ROWS, 3, dtype=torch.float64)
    y = torch.randn(ROWS, 1, dtype=torch.float64)
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    top = float(torch.linalg.eigvalsh(design.T @ design / SIGMA**2 / ROWS)[-1]) + STRENGTH / ROWS
    inner = om.Inner(noisy(module), om.rules.proximal(lr=1 / top, strength=STRENGTH / ROWS), 400)
    meta, support = inner.init(dict(module.named_parameters())), om.Batch(x, y)
    return inner, meta, support, design, run_inner_loop(inner, meta, support).phi


def as_vector(params):
    return torch.cat([params["weight"].flatten(), params["bias"]])


def covariance_of(precision, phi):
    """Return the covariance of the deviations that independent normal numbers give."""
    count = sum(value.numel() for value in phi.values())
    columns = []
    for one in torch.eye(count, dtype=torch.float64):
        parts = one.split([value.numel() for value in phi.values()])
        noise = {name: part.view(value.shape) for part, (name, value) in zip(parts, phi.items(), strict=True)}
        columns.append(torch.cat([part.flatten() for part in precision.deviate(noise).values()]))
    deviations = torch.stack(columns, 1)
    return deviations @ deviations.T


@pytest.mark.parametrize("curvature", ["full", "kron"])
def test_the_posterior_and_the_evidence_of_a_linear_model_are_exact(curvature, linear_gaussian):
    inner, meta, support, design, phi = linear_gaussian
    right = design.T @ design / SIGMA**2 + STRENGTH * torch.eye(4, dtype=torch.float64)
    start, residual = as_vector(meta.weights), support.y[:, 0] - design @ as_vector(meta.weights)
    mode = start + torch.linalg.solve(right, design.T @ residual / SIGMA**2)
    torch.testing.assert_close(as_vector(phi), mode, rtol=1e-10, atol=1e-10)

    precision = compute_precision(inner, meta, phi, support, curvature)
    torch.testing.assert_close(covariance_of(precision, phi), torch.linalg.inv(right), rtol=1e-10, atol=1e-10)
    pull = STRENGTH / 2 * (as_vector(phi) - start).square().sum()
    log_prior = 4 / 2 * math.log(STRENGTH) - pull
    found = -ROWS * inner.loss(phi, support) + log_prior - precision.log_det() / 2
    spread = SIGMA**2 * torch.eye(ROWS, dtype=torch.float64) + design @ design.T / STRENGTH
    evidence = torch.distributions.MultivariateNormal(design @ start, spread).log_prob(support.y[:, 0])
    torch.testing.assert_close(found, evidence, rtol=1e-10, atol=1e-10)


def brute_force(module, weights, batch, of_classes):
    """Return sum_i J_i^T F_i J_i over all weights in their order, by plain autograd, a sample at a time."""
    names, total = [*weights], 0.0
    for x in batch.x:
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        output = functional_call(module, leaves, (x[None],))[0]
        rows = [torch.autograd.grad(one, [*leaves.values()], retain_graph=True) for one in output]
        jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        p = output.detach().softmax(0)
        information = torch.diag(p) - p.outer(p) if of_classes else torch.eye(len(p), dtype=torch.float64) / SIGMA**2
        total = total + jacobian.T @ information.to(p) @ jacobian
    return total, names


def setting(name="mlp_tanh", steps=2, **options):
    given = problem(name)
    loss = noisy(given.module) if given.loss == "mse" else om.model_loss(given.module, "categorical")
    inner = om.Inner(loss, om.rules.sgd(lr=0.01), steps, **options)
    return given, inner, inner.init(given.weights()), given.task()


@pytest.mark.parametrize("name", ["mlp_tanh", "conv_group_norm"])
def test_the_whole_matrix_and_its_diagonal_are_those_of_brute_force(name):
    given, inner, meta, task = setting(name)
    right, _ = brute_force(given.module, meta.weights, task.support, given.loss == "cross_entropy")
    right = right + STRENGTH * torch.eye(len(right), dtype=torch.float64)
    for curvature, whole in (("full", right), ("diag", torch.diag(right.diagonal()))):
        precision = compute_precision(inner, meta, meta.weights, task.support, curvature, STRENGTH)
        torch.testing.assert_close(precision.log_det(), torch.logdet(whole), rtol=1e-10, atol=0)
        if len(right) < 100:
            covariance = covariance_of(precision, meta.weights)
            torch.testing.assert_close(covariance, torch.linalg.inv(whole), rtol=1e-9, atol=1e-11)


def test_a_kronecker_product_is_the_whole_block_of_a_layer_if_there_is_one_sample():
    given, inner, meta, task = setting()
    one = om.Batch(task.support.x[:1], task.support.y[:1])
    right, names = brute_force(given.module, meta.weights, one, of_classes=False)
    precision = compute_precision(inner, meta, meta.weights, one, "kron", STRENGTH)
    layers = [name.rpartition(".")[0] for name in names for _ in range(meta.weights[name].numel())]
    same = torch.tensor([[a == b for b in layers] for a in layers])
    blocks = torch.where(same, right, 0.0) + STRENGTH * torch.eye(len(right), dtype=torch.float64)
    torch.testing.assert_close(precision.log_det(), torch.logdet(blocks), rtol=1e-10, atol=0)
    torch.testing.assert_close(covariance_of(precision, meta.weights), torch.linalg.inv(blocks), rtol=1e-9, atol=1e-11)


def test_a_kronecker_product_is_the_whole_matrix_of_a_single_layer_with_one_sample():
    torch.manual_seed(0)
    module = nn.Linear(3, 4, bias=False).double()
    inner = om.Inner(om.model_loss(module, "categorical"), om.rules.sgd())
    meta = inner.init(dict(module.named_parameters()))
    one = om.Batch(torch.randn(1, 3, dtype=torch.float64), torch.tensor([2]))
    found, right = (
        compute_precision(inner, meta, meta.weights, one, curvature, STRENGTH) for curvature in ("kron", "full")
    )
    torch.testing.assert_close(found.log_det(), right.log_det(), rtol=1e-10, atol=0)
    covariances = [covariance_of(precision, meta.weights) for precision in (found, right)]
    torch.testing.assert_close(*covariances, rtol=1e-10, atol=1e-12)


def test_a_kronecker_product_has_the_mean_of_inputs_and_the_sum_of_gradients():
    given, inner, meta, task = setting(fast=("head.*",))
    phi = {name: meta.weights[name] for name in ("head.weight", "head.bias")}
    inputs = functional_call(
        given.module.body, {n[5:]: w for n, w in meta.weights.items() if n[:4] == "body"}, task.support.x
    )
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
    whole = torch.kron(torch.eye(2, dtype=torch.float64) * ROWS_OF_MLP / SIGMA**2, inputs.T @ inputs / ROWS_OF_MLP)
    right = torch.logdet(whole + STRENGTH * torch.eye(len(whole), dtype=torch.float64))
    found = compute_precision(inner, meta, phi, task.support, "kron", STRENGTH).log_det()
    torch.testing.assert_close(found, right, rtol=1e-10, atol=0)


ROWS_OF_MLP = 5


@every_curvature
def test_the_meta_gradient_is_the_slope_of_its_loss(curvature):
    _, inner, meta, task = setting()
    estimate = om.laplace(inner, eta=0.7, curvature=curvature, strength=STRENGTH)
    found = estimate(meta, task)
    adapted = run_inner_loop(inner, meta, task.support).phi
    log_det = compute_precision(inner, meta, adapted, task.support, curvature, STRENGTH).log_det()
    right = inner.loss(adapted, task.query) + 0.7 / 2 * log_det / len(task.query.y)
    torch.testing.assert_close(found.loss, right, rtol=1e-12, atol=0)
    random = torch.Generator().manual_seed(5)
    along = {n: torch.randn(v.shape, generator=random, dtype=v.dtype) for n, v in meta.weights.items()}
    slope = central_difference(lambda at: estimate(om.Meta(at, {}), task).loss, meta.weights, along, 1e-6)
    assert float(flat(found.grads.weights) @ flat(along)) == pytest.approx(slope, rel=1e-6)
    plain = float(flat(om.exact(inner)(meta, task).grads.weights) @ flat(along))
    assert abs(plain - slope) > 1e-3 * abs(slope), "the determinant counts"


def test_without_the_determinant_the_meta_gradient_is_the_exact_one_to_the_bit():
    _, inner, meta, task = setting()
    pairs = zip(
        tree_leaves(om.laplace(inner, eta=0.0)(meta, task)), tree_leaves(om.exact(inner)(meta, task)), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@every_curvature
def test_samples_are_the_mode_plus_draws_by_the_key_of_a_posterior(curvature):
    _, inner, meta, task = setting(posterior=laplace(curvature=curvature, strength=STRENGTH), samples=3, seed=7)
    (belief,) = inner.believe(meta, task.support)
    phi = run_inner_loop(inner, meta, task.support).phi
    precision = compute_precision(inner, meta, phi, task.support, curvature, STRENGTH)
    with keyed(task.support, INIT_STEP, "posterior", 7):
        drawn = [precision.deviate(normal_like_all(phi)) for _ in range(3)]
    for s, deviation in enumerate(drawn):
        assert_close(
            {n: value[s] for n, value in belief.params.items()}, {n: phi[n] + deviation[n] for n in phi}, 1e-12
        )
    (few,) = replace(inner, samples=2).believe(meta, task.support)
    assert all(torch.equal(value, belief.params[n][:2]) for n, value in few.params.items())
    (mode,) = replace(inner, samples=1).believe(meta, task.support)
    assert all(torch.equal(value[0], phi[n]) for n, value in mode.params.items())


@every_curvature
def test_padding_does_not_count_and_a_weight_of_two_is_a_sample_twice(curvature):
    _, inner, meta, task = setting()
    x, y = task.support

    def log_det(rows, weight):
        batch = om.Batch(x[rows], y[rows], None if weight is None else torch.tensor(weight, dtype=torch.float64))
        return compute_precision(inner, meta, meta.weights, batch, curvature, STRENGTH).log_det()

    right = log_det([0, 1, 2], None)
    torch.testing.assert_close(log_det([0, 1, 2, 3], [1, 1, 1, 0]), right, rtol=1e-12, atol=0)
    torch.testing.assert_close(log_det([0, 1], [2, 1]), log_det([0, 0, 1], None), rtol=1e-10, atol=0)


@every_curvature
@pytest.mark.parametrize(("rows", "weight", "n"), [(4, None, 4), (4, [1.0, 2.0, 0.0, 0.5], 3.5), (0, None, 1)])
def test_the_prior_of_proximal_is_that_of_the_rule(curvature, rows, weight, n):
    _, inner, meta, task = setting()
    pulled = replace(inner, rule=om.rules.proximal(lr=0.01, strength=0.3))
    weight = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    support = om.Batch(task.support.x[:rows], task.support.y[:rows], weight)
    found = compute_precision(pulled, meta, meta.weights, support, curvature).log_det()
    right = compute_precision(inner, meta, meta.weights, support, curvature, 0.3 * n).log_det()
    torch.testing.assert_close(found, right, rtol=1e-12, atol=0)


@every_curvature
def test_a_support_set_without_rows_leaves_the_prior(curvature):
    _, inner, meta, task = setting()
    nothing = om.Batch(task.support.x[:0], task.support.y[:0])
    precision = compute_precision(inner, meta, meta.weights, nothing, curvature, STRENGTH)
    count = sum(value.numel() for value in meta.weights.values())
    assert float(precision.log_det()) == pytest.approx(count * math.log(STRENGTH))
    noise = tree_map(torch.ones_like, meta.weights)
    assert_close(precision.deviate(noise), {n: v / STRENGTH**0.5 for n, v in noise.items()}, 1e-12)


@pytest.mark.parametrize("curvature", ["kron", "diag"])
def test_tasks_can_be_vectorised(curvature):
    given, inner, meta, _ = setting(posterior=laplace(curvature=curvature), samples=2)
    tasks = [given.task(seed) for seed in range(2)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *tasks)
    estimate = om.laplace(inner, eta=0.7, curvature=curvature)
    for work in (lambda task: estimate(meta, task), lambda task: inner.believe(meta, task.support)[0].params):
        together = vmap(work)(stacked)
        one_by_one = tree_map(lambda *leaves: torch.stack(leaves), *[work(task) for task in tasks])
        for found, right in zip(tree_leaves(together), tree_leaves(one_by_one), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)


def wide():
    return nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 2)).double()


def twice():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 2)).double()


def find(module, curvature="full", loss="mse", rule=None):
    """Return the precision for a model on the tasks of ``mlp_tanh``."""
    inner = om.Inner(om.model_loss(module, loss), rule or om.rules.sgd(), 1)
    meta = inner.init(dict(module.named_parameters()))
    return compute_precision(inner, meta, meta.weights, problem("mlp_tanh").task().support, curvature, 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: laplace(curvature="half"), "curvature is 'half': it is one of full, kron, diag"),
        (lambda: laplace(strength=0.0), "strength is 0.0"),
        (lambda: om.laplace(setting()[1], eta=-1.0), "eta is -1.0"),
        (lambda: om.laplace(setting()[1], curvature="half"), "curvature is 'half'"),
        (
            lambda: find(wide()),
            r'"full" is a matrix of 2,102 x 2,102 .* at most 2,000 are taken: use curvature = "kron"',
        ),
        (lambda: find(twice(), "kron"), r'"kron" needs weights of torch.nn.Linear layers .* 0.bias, 0.weight adapt'),
        (
            lambda: find(nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)).double(), "kron"),
            "1.bias, 1.weight adapt otherwise",
        ),
        (lambda: find(wide(), "kron", rule=om.rules.t_net()), "adapt otherwise"),
        (lambda: find(wide(), loss="objective"), "needs the curvature of the loss: use one of om.model_loss"),
        (
            lambda: om.laplace(replace(setting()[1], rule=om.rules.svgd())),
            "around one model, and the rule adapts several",
        ),
        (
            lambda: om.laplace(replace(setting()[1], rule=om.rules.proximal(strength=0.3)), strength=2.0),
            "prior of strength = 2, and the inner rule has one of its own, with strength = 0.3 .*: leave out",
        ),
    ],
)
def test_wrong_choices_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
