"""T-nets and MT-nets descend in a learned metric, and MT-nets with masks over rows."""

import pytest
import torch

import online_meta as om
from online_meta.inner import init_carry
from online_meta.testing.compare import assert_close
from tests.numerics.problems import problem
from tests.numerics.reference_loop import STEPS, check_against_reference, shifted

LR = 0.1
every_problem = pytest.mark.parametrize("name", ["mlp_tanh", "conv_batch_norm"])
every_fast = pytest.mark.parametrize("fast", [("*",), ("head.*",), ("body.*",)], ids=["all", "head", "body"])


def matrix_of(rule, name):
    """Return T of the layer of a weight, or None; each layer of the problems has one weight and one bias."""
    return rule.get(name.replace("bias", "weight"))


def times(matrix, value):
    """Return T W or T b, with T along the first dimension."""
    return torch.einsum("ab,b...->a...", matrix, value)


def loop(mask=lambda rule, name, value: 1.0):
    """Return the reference loop: W and b descend, and the model computes with T W and T b."""

    def reference(weights, adapts, rule, gradient):
        def see(phi):
            everything = {**weights, **phi}
            transformed = {n: matrix_of(rule, n) for n in everything if matrix_of(rule, n) is not None}
            return {**everything, **{n: times(matrix, everything[n]) for n, matrix in transformed.items()}}

        phi = {name: weights[name] for name in adapts}
        for _ in range(STEPS):
            grads = gradient(phi, see)
            phi = {name: phi[name] - LR * mask(rule, name, phi[name]) * grads[name] for name in phi}
        return see(phi)

    return reference


@every_fast
@every_problem
def test_a_t_net_descends_in_a_learned_metric(name, fast):
    check_against_reference(om.rules.t_net(lr=LR), loop(), name, fast)


def test_an_effective_weight_moves_by_t_t_transposed_times_its_gradient():
    given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(given.module, given.loss), om.rules.t_net(lr=LR), 1)
    meta = inner.init(given.weights())
    meta = om.Meta(meta.weights, shifted(meta.rule))
    before = inner.rule.view(meta.rule, meta.weights)
    leaves = {name: value.clone().requires_grad_() for name, value in before.items()}
    grads = dict(
        zip(leaves, torch.autograd.grad(inner.loss(leaves, given.task().support), [*leaves.values()]), strict=True)
    )
    metric = {n: matrix_of(meta.rule, n) @ matrix_of(meta.rule, n).T for n in before}
    right = {n: before[n] - LR * times(metric[n], grads[n]) for n in before}
    assert_close(inner.adapt(meta, given.task().support), right, 1e-12)


@pytest.mark.parametrize("make", [om.rules.t_net, om.rules.mt_net])
def test_every_layer_has_a_matrix_except_norms_contexts_and_slow_layers(make):
    def matrices(name, fast):
        given = problem(name)
        inner = om.Inner(om.model_loss(given.module, given.loss), make(), 1, fast)
        rule = inner.init(given.weights()).rule
        return {n: tuple(matrix.shape) for n, matrix in rule.items() if not n.endswith(".logits")}

    assert matrices("conv_batch_norm", ("*",)) == {"body.0.weight": (4, 4), "head.weight": (3, 3)}
    assert matrices("conv_batch_norm", ("head.*",)) == {"head.weight": (3, 3)}
    assert matrices("conv_batch_norm", ("body.1.*",)) == {}
    assert make().init({"context": torch.zeros(3)}) == {}


def test_each_weight_of_a_layer_shares_its_matrix_with_its_own_bias():
    shapes = {"rnn.weight_ih_l0": (6, 3), "rnn.weight_hh_l0": (6, 2), "rnn.bias_ih_l0": (6,), "rnn.bias_hh_l0": (6,)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    rule = om.rules.t_net()
    learned = rule.init(weights)
    assert list(learned) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    learned["rnn.weight_hh_l0"] = 2 * learned["rnn.weight_hh_l0"]
    seen = rule.view(learned, weights)
    for name, weight in weights.items():
        assert torch.equal(seen[name], 2 * weight if "hh" in name else weight)


@every_problem
def test_a_t_net_starts_as_gradient_descent(name):
    given = problem(name)
    adapted = []
    for rule in (om.rules.sgd(lr=LR), om.rules.t_net(lr=LR)):
        inner = om.Inner(om.model_loss(given.module, given.loss), rule, STEPS)
        adapted.append(inner.adapt(inner.init(given.weights()), given.task().support))
    assert_close(*adapted, 1e-12)


def draw_noise(name, rule, seed, fast):
    """Return the noise that the rule draws for a task, by the weight whose rows it masks."""
    given = problem(name)
    inner = om.Inner(om.model_loss(given.module, given.loss), rule, 0, fast)
    state = init_carry(inner, inner.init(given.weights()), given.task(seed).support).state
    return {key.removesuffix(".logits"): value for key, value in state.items()}


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@every_fast
@every_problem
def test_an_mt_net_masks_rows_by_gumbel_softmax(name, fast, temperature):
    rule = om.rules.mt_net(lr=LR, temperature=temperature)
    draws = []  # the difference of the two Gumbel variables of each row

    def mask(learned, weight, value):
        owner = weight.replace("bias", "weight")
        if owner not in draws[-1]:
            return 1.0
        ahead = torch.exp((learned[f"{owner}.logits"] + draws[-1][owner]) / temperature)
        return (ahead / (ahead + 1)).reshape(-1, *[1] * (value.ndim - 1))

    plain = loop(mask)
    turn = iter([0, 0, 1, 1])  # check_against_reference runs it twice for each of two tasks

    def reference(*given):
        draws.append(draw_noise(name, rule, next(turn), fast))
        return plain(*given)

    check_against_reference(rule, reference, name, fast)


def test_the_noise_is_the_difference_of_two_gumbel_variables():
    torch.manual_seed(1)
    weights = {"head.weight": torch.zeros(20000, 1)}
    rule = om.rules.mt_net()
    logits = {"head.weight.logits": torch.zeros(200_000, dtype=torch.float64)}
    (draws,) = rule.start(logits, weights, None).state.values()
    levels = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    below = (draws[:, None] < levels).double().mean(0)
    torch.testing.assert_close(below, torch.sigmoid(levels), rtol=0, atol=5e-3)  # the logistic distribution


def test_each_task_has_its_own_mask():
    rule = om.rules.mt_net()
    first, again, other = (draw_noise("mlp_tanh", rule, seed, ("*",)) for seed in (0, 0, 1))
    assert list(first) == ["body.0.weight", "body.2.weight", "head.weight"]
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)


def test_rounded_masks_keep_rows_fixed_and_use_the_relaxed_derivative():
    given, task = problem("mlp_tanh"), problem("mlp_tanh").task()
    rule = om.rules.mt_net(lr=LR, straight_through=True)
    inner = om.Inner(om.model_loss(given.module, given.loss), rule, 1)
    meta = inner.init(given.weights())
    adapted, noise = inner.adapt(meta, task.support), draw_noise("mlp_tanh", rule, 0, ("*",))
    plain = om.Inner(inner.loss, om.rules.sgd(lr=LR), 1)
    moved = plain.adapt(plain.init(given.weights()), task.support)
    rows = torch.cat([noise["body.0.weight"] > 0, noise["body.2.weight"] > 0])
    assert rows.any()
    assert not rows.all()
    for name, value in adapted.items():
        open_rows = noise[name.replace("bias", "weight")] > 0
        torch.testing.assert_close(value[open_rows], moved[name][open_rows], rtol=1e-12, atol=1e-14)
        assert torch.equal(value[~open_rows], meta.weights[name][~open_rows])
    grads = om.exact(inner)(meta, task).grads.rule
    right = {}  # d f / d mask_j = -LR <grad f, grad L> over row j, d mask / d logit = p (1 - p)
    leaves = {n: v.clone().requires_grad_() for n, v in adapted.items()}
    query_grads = dict(
        zip(leaves, torch.autograd.grad(inner.loss(leaves, task.query), [*leaves.values()]), strict=True)
    )
    for name, draw in noise.items():
        share = torch.sigmoid(draw)
        pair = [name, name.replace("weight", "bias")]
        steps = [query_grads[n] * (moved[n] - meta.weights[n]) for n in pair]
        along = sum(step.reshape(len(draw), -1).sum(1) for step in steps)
        right[f"{name}.logits"] = along * share * (1 - share)
    assert_close({name: grads[name] for name in right}, right, 1e-10)


def test_a_temperature_that_is_not_positive_is_refused():
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"temperature is .*: it is positive"):
            om.rules.mt_net(temperature=temperature)
