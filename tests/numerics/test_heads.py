"""Heads in closed form: what they are, against slow oracles in float64, and the meta-gradients through them."""

import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import online_meta as om
from online_meta.functional import features as features_of_models
from online_meta.functional.features import compute_features
from online_meta.inner import init_carry
from online_meta.preflight.preflight import unrolled
from online_meta.testing.compare import assert_close, relative_error
from tests.numerics.reference_loop import check_slope, join_parts, shifted

HEADS = ("ridge_head", "logistic_head", "nearest_centroid")
OF_NUMBERS = ("ridge_head",)
every_head = pytest.mark.parametrize("name", HEADS)


class Net(nn.Module):
    def __init__(self, outputs=3, bias=True, features=4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, features), nn.Softplus())
        self.head = nn.Linear(features, outputs, bias=bias)

    def forward(self, x):
        return self.head(self.body(x))


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options).double()


def task_of(kind, seed=0, support=12, query=7):
    """Return a task of three classes, labels or numbers a row."""
    random = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(3, 5, generator=random, dtype=torch.float64)

    def batch(size):
        y = torch.arange(size) % 3
        x = centres[y] + torch.randn(size, 5, generator=random, dtype=torch.float64)
        if kind == "classes":
            return om.Batch(x, y)
        noise = 0.3 * torch.randn(size, 3, generator=random, dtype=torch.float64)
        numbers = F.one_hot(y, 3) + x[:, :3].sin() + noise
        return om.Batch(x, numbers if kind == "numbers" else (numbers > 0.5).double())

    return om.Task(batch(support), batch(query))


LOSSES = {"classes": "cross_entropy", "labels": "bernoulli", "numbers": "mse"}


def setting(name, kind="classes", steps=0, fast=("*",), module=None, **options):
    """Return the module, the inner loop of a head and its meta-parameters, moved off their start."""
    module = net() if module is None else module
    rule = getattr(om.rules, name)(**{"lr": 0.1, **options})
    inner = om.Inner(om.model_loss(module, LOSSES[kind]), rule, steps, fast)
    meta = inner.init(dict(module.named_parameters()))
    return module, inner, om.Meta(meta.weights, shifted(meta.rule))


def adapted_head(inner, meta, support):
    adapted = inner.adapt(meta, support)
    return adapted["head.weight"], adapted.get("head.bias")


def rows_of(module, batch, bias=True):
    """Return the features of a batch, with ones if the head has a bias."""
    with torch.no_grad():
        found = module.body(batch.x)
    return torch.cat([found, torch.ones_like(found[:, :1])], 1) if bias else found


# What the heads are.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("support", [3, 40])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_ridge_head_is_the_least_squares_solution(kind, support, bias):
    module, inner, meta = setting("ridge_head", kind, module=net(bias=bias), strength=0.3, temperature=0.5)
    task = task_of(kind, support=support)
    z, y = rows_of(module, task.support, bias).numpy(), task.support.y.numpy()
    y = {"classes": lambda: np.eye(3)[y], "labels": lambda: 2 * y - 1, "numbers": lambda: y}[kind]()
    strength, scale = (float(meta.rule[one].exp()) for one in ("log_strength", "log_scale"))
    above = np.concatenate([z, np.sqrt(strength) * np.eye(z.shape[1])])
    right = np.linalg.lstsq(above, np.concatenate([y, np.zeros((z.shape[1], 3))]), rcond=None)[0]
    right = torch.from_numpy(right) * scale / (1.0 if kind == "numbers" else 0.5)
    weight, own_bias = adapted_head(inner, meta, task.support)
    found = weight.T if own_bias is None else torch.cat([weight.T, own_bias[None]])
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("support", [3, 40])
@pytest.mark.parametrize("kind", ["classes", "labels"])
def test_the_logistic_head_is_the_minimum_of_its_objective(kind, support, bias):
    """The objective is convex: where its gradient, by plain autograd, is zero, there is its minimum."""
    module, inner, meta = setting("logistic_head", kind, module=net(bias=bias), strength=0.3)
    given = task_of(kind, support=support).support._replace(weight=torch.linspace(0.2, 2.0, support).double())
    strength, scale = (meta.rule[one].exp() for one in ("log_strength", "log_scale"))
    parts = [one / scale for one in adapted_head(inner, meta, given) if one is not None]
    leaves = [one.detach().requires_grad_() for one in parts]
    logits = F.linear(rows_of(module, given, bias=False), *leaves)
    loss = {"classes": F.cross_entropy, "labels": F.binary_cross_entropy_with_logits}[kind]
    rows = loss(logits, given.y, reduction="none")
    rows = rows if kind == "classes" else rows.sum(1)
    objective = (given.weight * rows).sum() + strength / 2 * sum((one**2).sum() for one in leaves)
    assert all(slope.abs().max() < 1e-10 for slope in torch.autograd.grad(objective, leaves))


def test_newtons_method_finds_the_minimum_far_from_its_start():
    """Separable classes, large features and a weak penalty: whole steps from 0 would overshoot."""
    torch.manual_seed(0)
    module = nn.Linear(3, 3).double()
    x, y = 100 * torch.randn(200, 3).double().relu(), torch.arange(200) % 3
    inner = om.Inner(om.model_loss(module, "cross_entropy"), om.rules.logistic_head(strength=1e-4), 0)
    adapted = inner.adapt(inner.init(dict(module.named_parameters())), om.Batch(x, y))
    leaves = [value.requires_grad_() for value in adapted.values()]
    objective = F.cross_entropy(F.linear(x, *leaves), y, reduction="sum")
    objective = objective + 1e-4 / 2 * sum((one**2).sum() for one in leaves)
    assert all(slope.abs().max() < 1e-8 for slope in torch.autograd.grad(objective, leaves))


def test_the_nearest_centroid_has_the_logits_of_prototypical_networks():
    module, inner, meta = setting("nearest_centroid")
    task = task_of("classes")
    logits = functional_call(module, inner.adapt(meta, task.support), (task.query.x,))
    support, query = (rows_of(module, batch, bias=False) for batch in task)
    scale = float(meta.rule["log_scale"].exp())
    for row, feature in enumerate(query):
        right = []
        for label in range(3):
            centroid = torch.stack([one for one, y in zip(support, task.support.y, strict=True) if y == label]).mean(0)
            right.append(-scale * float(((feature - centroid) ** 2).sum()))
        torch.testing.assert_close(logits[row].log_softmax(0), torch.tensor(right).double().log_softmax(0))


def test_a_class_without_samples_has_a_logit_far_below():
    module, inner, meta = setting("nearest_centroid")
    given = task_of("classes").support
    given = om.Batch(given.x[given.y != 1], given.y[given.y != 1])
    share = functional_call(module, inner.adapt(meta, given), (given.x,)).softmax(1)
    assert bool(share.isfinite().all())
    assert float(share[:, 1].max()) < 1e-6


@every_head
def test_weights_count_samples_and_padding_may_hold_anything(name):
    kind = "classes"
    _, inner, meta = setting(name, kind)
    given = task_of(kind).support
    times = torch.arange(12) % 3
    repeated = om.Batch(given.x.repeat_interleave(times, 0), given.y.repeat_interleave(times, 0))
    x = torch.where(times[:, None] > 0, given.x, torch.nan)
    weighted = om.Batch(x, given.y, weight=times.double())
    assert_close(inner.adapt(meta, weighted), inner.adapt(meta, repeated), 1e-9)


@every_head
def test_samples_of_the_ignored_class_do_not_count(name):
    _, inner, meta = setting(name)
    given = task_of("classes").support
    ignored = given._replace(y=torch.where(torch.arange(12) < 4, -100, given.y))
    assert_close(inner.adapt(meta, ignored), inner.adapt(meta, om.Batch(given.x[4:], given.y[4:])), 1e-9)


@every_head
def test_without_support_samples_the_head_is_that_of_the_meta_parameters(name):
    _, inner, meta = setting(name)
    given = task_of("classes").support
    for nothing in (om.Batch(given.x[:0], given.y[:0]), given._replace(weight=torch.zeros(12).double())):
        found = inner.adapt(meta, nothing)
        assert all(torch.equal(found[key], value) for key, value in meta.weights.items())
    slopes = om.exact(inner)(meta, om.Task(om.Batch(given.x[:0], given.y[:0]), given)).grads
    assert slopes.weights["head.weight"].any()
    assert not any(slope.any() for slope in slopes.rule.values())


@every_head
def test_in_float32_the_head_keeps_its_dtype(name):
    module = net().float()
    _, inner, meta = setting(name, module=module)
    given = task_of("classes").support
    found = inner.adapt(meta, given._replace(x=given.x.float()))
    assert {value.dtype for value in found.values()} == {torch.float32}


# Meta-gradients.


def cases():
    return [
        (name, kind)
        for name in HEADS
        for kind in LOSSES
        if kind == "classes" or name == "ridge_head" or (name, kind) == ("logistic_head", "labels")
    ]


@pytest.mark.parametrize(("name", "kind"), cases())
@pytest.mark.parametrize("support", [4, 12])
@pytest.mark.parametrize(("steps", "fast"), [(0, ("*",)), (0, ("head.*",)), (2, ("*",)), (2, ("head.*",))])
def test_the_meta_gradient_through_a_head_is_exact(name, kind, support, steps, fast):
    """Against the unrolled loop by plain autograd and central differences, for two tasks; with fewer samples or more
    than features."""
    _, inner, meta = setting(name, kind, steps, fast)
    found = []
    for seed in (1, 2):
        task = task_of(kind, seed, support)
        found.append(om.exact(inner)(meta, task))
        right = unrolled(inner, meta, task)
        torch.testing.assert_close(found[-1].loss, right.loss, rtol=1e-12, atol=0)
        assert_close(join_parts(found[-1].grads), join_parts(right.grads), 1e-9)
        check_slope(inner, meta, task, found[-1])
    assert relative_error(join_parts(found[0].grads), join_parts(found[1].grads)) > 1e-3
    assert found[0].grads.weights["body.0.weight"].any()


@every_head
def test_a_gradient_that_does_not_pass_through_the_features_is_caught(name, monkeypatch):
    """With constant features the gradient of the body is another one, which the comparison notices."""
    _, inner, meta = setting(name)
    task = task_of("classes")
    right = om.exact(inner)(meta, task)
    plain = compute_features

    def constant(*arguments):
        prefix, values = plain(*arguments)
        return features_of_models.Features(prefix, values.detach())

    monkeypatch.setattr(features_of_models, "compute_features", constant)
    wrong = om.exact(inner)(meta, task)
    assert torch.equal(wrong.loss, right.loss)
    assert relative_error(wrong.grads.weights, right.grads.weights) > 1e-2
    with pytest.raises(AssertionError):
        check_slope(inner, meta, task, wrong)


@every_head
def test_a_head_has_second_derivatives(name):
    """Of the loss of the weights after adapting, along a line of weights, by plain autograd and central differences."""
    module, inner, meta = setting(name)
    task = task_of("classes")
    random = torch.Generator().manual_seed(1)
    along = {n: torch.randn(v.shape, generator=random, dtype=v.dtype) for n, v in meta.weights.items()}

    def loss(t):
        weights = {n: v + t * along[n] for n, v in meta.weights.items()}
        phi = init_carry(inner, om.Meta(weights, meta.rule), task.support).phi
        return F.cross_entropy(functional_call(module, phi, (task.query.x,)), task.query.y)

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(loss(t), t, create_graph=True)
    (second,) = torch.autograd.grad(first, t)
    width = 1e-4
    with torch.no_grad():
        right = (loss(t + width) - 2 * loss(t) + loss(t - width)) / width**2
    assert float(second) == pytest.approx(float(right), rel=1e-4)


@every_head
def test_every_step_after_a_head_is_one_of_gradient_descent(name):
    module, inner, meta = setting(name, steps=1)
    task = task_of("classes")
    phi = {n: v.requires_grad_() for n, v in replace(inner, steps=0).adapt(meta, task.support).items()}
    loss = F.cross_entropy(functional_call(module, phi, (task.support.x,)), task.support.y)
    slopes = torch.autograd.grad(loss, [*phi.values()])
    right = {n: (v - 0.1 * g).detach() for (n, v), g in zip(phi.items(), slopes, strict=True)}
    assert_close(inner.adapt(meta, task.support), right, 1e-12)


@every_head
@pytest.mark.parametrize("batching", ["vmap", "traced", "compiled"])
def test_meta_gradients_through_a_head_run_as_programs(name, batching):
    _, inner, meta = setting(name)
    together, one_by_one = (om.over_tasks(om.exact(inner), how) for how in (batching, "loop"))
    for seeds in (range(3), range(3, 6)):
        tasks = [task_of("classes", seed) for seed in seeds]
        found, right = together(meta, tasks), one_by_one(meta, tasks)
        torch.testing.assert_close(found.loss, right.loss, rtol=1e-12, atol=0)
        assert relative_error(join_parts(found.grads), join_parts(right.grads)) < 1e-10


@every_head
def test_the_checks_of_a_model_accept_a_head(name):
    _, inner, meta = setting(name, steps=2)
    report = om.preflight(inner, meta, [task_of("classes", seed) for seed in range(2)])
    assert not report.problems


# Features.


def test_features_are_the_input_of_the_head_and_can_be_transformed():
    module, inner, meta = setting("ridge_head")
    x = task_of("classes").query.x
    changed = {name: 1.1 * value for name, value in meta.weights.items()}
    prefix, found = compute_features(inner.loss, changed, x)
    assert prefix == "head."
    body = {name.removeprefix("body."): value for name, value in changed.items() if name.startswith("body.")}
    torch.testing.assert_close(found, functional_call(module.body, body, (x,)), rtol=1e-12, atol=0)

    def total(weights, x):
        return (compute_features(inner.loss, weights, x).values ** 2).sum()

    def right(weights, x):
        body = {name.removeprefix("body."): value for name, value in weights.items() if name.startswith("body.")}
        return (functional_call(module.body, body, (x,)) ** 2).sum()

    xs = torch.stack([x, 2 * x])
    found, expected = (vmap(grad(one), (None, 0))(changed, xs) for one in (total, right))
    assert_close(found, expected, 1e-10)


def test_features_are_those_of_evaluation_mode():
    module = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    loss, params = om.model_loss(module, "cross_entropy"), dict(module.named_parameters())
    x = task_of("classes").query.x
    prefix, found = compute_features(loss, params, x)
    assert prefix == "2."
    torch.testing.assert_close(found, module[0](x), rtol=1e-12, atol=0)


def test_a_model_of_one_linear_layer_is_a_head_on_its_inputs():
    module = nn.Linear(5, 3).double()
    loss = om.model_loss(module, "cross_entropy")
    x = task_of("classes").query.x
    prefix, found = compute_features(loss, dict(module.named_parameters()), x)
    assert prefix == ""
    assert torch.equal(found, x)


def test_features_in_another_precision_have_the_dtype_of_the_parameters():
    module = net().float()
    loss = om.model_loss(module, "cross_entropy", precision=torch.bfloat16)
    x = task_of("classes").query.x.float()
    found = compute_features(loss, dict(module.named_parameters()), x).values
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, module.body(x), rtol=0.05, atol=0.05)


class Twice(Net):
    def forward(self, x):
        return self.head(self.head(self.body(x)))


class Tied(Net):
    def __init__(self):
        super().__init__(features=6)
        self.head = nn.Linear(6, 6)
        self.body[2] = self.head


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.head.weight.requires_grad_(False)


WITHOUT_HEAD = {
    "softmax": (nn.Sequential(nn.Linear(5, 3), nn.Softmax(1)), "output of the model is not that of a linear layer"),
    "twice": (Twice(features=3), "'head' is called 2 times"),
    "tied": (Tied(), "is tied to another one"),
    "frozen": (Frozen(), "'head' is frozen"),
    "sequence": (nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Linear(5, 3)), r"inputs of shape \(12, 1, 5\)"),
}


@pytest.mark.parametrize(("module", "message"), WITHOUT_HEAD.values(), ids=WITHOUT_HEAD)
def test_a_model_without_a_head_is_refused(module, message):
    _, inner, meta = setting("ridge_head", module=module.double())
    with pytest.raises(ValueError, match=message):
        inner.adapt(meta, task_of("classes").support)


def plain_loss(params, batch):
    return F.cross_entropy(batch.x @ params["w"], batch.y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: setting("ridge_head", fast=("body.*",)), r"replaces head.bias, head.weight.*fast = \['body.\*'\]"),
        (lambda: setting("nearest_centroid", module=net(bias=False)), "needs a head with a bias"),
        (lambda: setting("nearest_centroid", "numbers"), "answers classes, but the targets are numbers"),
        (lambda: setting("logistic_head", "numbers"), "answers classes and labels, but the targets are numbers"),
        (lambda: setting("ridge_head", "labels"), r"needs targets of shape \(12, 3\), not \(12,\)"),
    ],
)
def test_what_a_head_cannot_answer_is_refused(make, message):
    _, inner, meta = make()
    kind = "numbers" if "numbers" in message else "classes"
    with pytest.raises(ValueError, match=message):
        inner.adapt(meta, task_of(kind).support)


def test_other_losses_have_no_head():
    inner = om.Inner(plain_loss, om.rules.ridge_head(), 0)
    meta = inner.init({"w": torch.zeros(5, 3).double()})
    with pytest.raises(ValueError, match=r"made with om\.model_loss"):
        inner.adapt(meta, task_of("classes").support)
    poisson = om.Inner(om.model_loss(net(), "poisson"), om.rules.ridge_head(), 0)
    with pytest.raises(ValueError, match="answers cross_entropy, categorical, bernoulli, mse, gaussian_of_noise"):
        poisson.adapt(poisson.init(dict(net().named_parameters())), task_of("labels").support)


def test_a_logistic_head_of_many_unknowns_answers_and_has_no_meta_gradient(monkeypatch):
    _, inner, meta = setting("logistic_head")
    task = task_of("classes", support=30)
    right = inner.adapt(meta, task.support)
    monkeypatch.setattr(sys.modules[om.rules.logistic_head.__module__], "LARGEST", 14)  # There are 5 * 3 unknowns.
    found = inner.adapt(meta, task.support)
    assert not torch.equal(found["head.weight"], right["head.weight"]), "it was found in another way"
    assert_close(found, right, 1e-7)
    with pytest.raises(ValueError, match=r"has 30 samples, 5 features and 3 outputs: .* may be 14 at most"):
        om.exact(inner)(meta, task)
    _, labels, start = setting("logistic_head", "labels")
    with pytest.raises(ValueError, match="at most for labels and for meta-gradients; choose ridge_head"):
        labels.adapt(start, task_of("labels", support=30).support)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(om.rules.ridge_head, strength=0.0), "strength is 0.0"),
        (partial(om.rules.ridge_head, temperature=-1.0), "temperature is -1.0"),
        (partial(om.rules.logistic_head, strength=float("nan")), "strength is nan"),
        (partial(om.rules.logistic_head, newton_steps=0), "newton_steps is 0"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
