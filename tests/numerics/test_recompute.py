"""Blocks recomputed in the backward pass give the same gradients of every order, with less memory."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

import online_meta as om
from online_meta.batching.autotune import choose_plan
from online_meta.functional import activation_checkpoint
from online_meta.functional.activation_checkpoint import recompute_on_backward
from online_meta.memory import peak_bytes
from online_meta.preflight.preflight import preflight
from online_meta.testing.compare import assert_close, relative_error
from online_meta.testing.learned_rules import whole_seam
from online_meta.testing.oracle import unrolled_maml, unrolled_reptile
from online_meta.testing.unrolled import Loop
from tests.numerics.problems import RANDOM, problem
from tests.numerics.reference_loop import join_parts, shifted
from trainers.build import build_loss, build_module
from trainers.models import transformer
from trainers.settings import ModelSettings

GLOBS = {
    "mlp_tanh": ("body",),
    "mlp_dropout": ("[0123]",),
    "layer_norm": ("body", "head"),
    "conv_batch_norm": ("body.?",),
    "conv_dropout": ("body.?",),
    "sequence_transformer": ("body.*",),
    "sequence_transformer_dropout": ("body.*",),
    "sequence_gru_dropout": ("*",),
    "sequence_torch_gru": ("body",),
    "tokens_transformer": ("*",),
}
RULES = {
    "sgd": om.rules.sgd(lr=0.1),
    "momentum": om.rules.momentum(lr=0.05),
    "adam": om.rules.adam(lr=0.01),
    "meta_sgd": om.rules.meta_sgd(lr=0.1, per="layer_and_step"),
    "meta_curvature": om.rules.meta_curvature(lr=0.1),
    "t_net": om.rules.t_net(lr=0.1),
    "mt_net": om.rules.mt_net(lr=0.1),
    "whole_seam": whole_seam(lr=0.1),
}
every_model = pytest.mark.parametrize("name", GLOBS)


def losses(given, globs):
    """Return the loss with and without recomputation."""
    return tuple(om.model_loss(given.module, given.loss, recompute=some) for some in (globs, ()))


@pytest.mark.parametrize("fast", [("*",), ("head.*",)], ids=["all", "head"])
@every_model
def test_exact_is_the_gradient_of_the_unrolled_loop(name, fast):
    given = problem(name)
    fast = fast if any(weight.startswith("head.") for weight in given.weights()) else ("*",)
    loss, _ = losses(given, GLOBS[name])
    inner = om.Inner(loss, om.rules.sgd(lr=0.1), 3, fast)
    for seed in range(3):
        found = om.exact(inner)(inner.init(given.weights()), given.task(seed))
        right = unrolled_maml(given.module, given.loss, given.weights(), given.task(seed), lr=0.1, steps=3, fast=fast)
        first = unrolled_maml(
            given.module, given.loss, given.weights(), given.task(seed), lr=0.1, steps=3, fast=fast,
            constant_gradients=True,
        )  # fmt: skip
        assert_close(found.grads.weights, right.grads.weights, 1e-10)
        torch.testing.assert_close(found.loss, right.loss, rtol=1e-12, atol=0)
        assert relative_error(first.grads.weights, right.grads.weights) > 1e-4


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_gets_its_exact_gradient(rule):
    given = problem("sequence_transformer")
    inner = om.Inner(losses(given, ("body.*",))[0], rule, 3)
    meta = inner.init(given.weights())
    meta = om.Meta(meta.weights, shifted(meta.rule))
    right = Loop(given.module, given.loss, rule, 3, ("*",)).gradient(meta, given.task(1))
    assert_close(join_parts(om.exact(inner)(meta, given.task(1)).grads), join_parts(right.grads), 1e-10)


@pytest.mark.parametrize(
    ("estimator", "rule"),
    [
        (om.first_order, om.rules.sgd(lr=0.1)),
        (partial(om.exact, rematerialise=True), om.rules.momentum(lr=0.05)),
        (partial(om.exact, step_weights=[0.2, 0.3, 0.5]), om.rules.sgd(lr=0.1)),
        (partial(om.implicit, iterations=3), om.rules.proximal(lr=0.05, strength=2.0)),
        (om.warp_grad, om.rules.t_net(lr=0.1)),
    ],
    ids=["first_order", "rematerialise", "step_weights", "implicit", "warp_grad"],
)
@pytest.mark.parametrize("name", ["sequence_transformer", "sequence_transformer_dropout", "conv_batch_norm"])
def test_every_estimator_agrees_with_and_without_recomputation(name, estimator, rule):
    given = problem(name)
    found, plain = (
        estimator(inner)(inner.init(given.weights()), given.task(2))
        for inner in (om.Inner(loss, rule, 3) for loss in losses(given, GLOBS[name]))
    )
    assert_close(join_parts(found.grads), join_parts(plain.grads), 1e-10)


def test_reptile_with_recomputation_equals_the_torch_reference():
    given = problem("sequence_transformer")
    inner = om.Inner(losses(given, ("body.*",))[0], om.rules.sgd(lr=0.1), 3)
    found = om.reptile(inner)(inner.init(given.weights()), given.task())
    right = unrolled_reptile(given.module, given.loss, given.task(), lr=0.1, steps=3)
    assert_close(found.grads.weights, right, 1e-10)


@pytest.mark.parametrize("name", RANDOM)
def test_dropout_is_replayed_bit_for_bit_without_changing_the_generator(name):
    given = problem(name)
    answers = []
    for loss in losses(given, ("*",)):
        inner = om.Inner(loss, om.rules.sgd(lr=0.1), 2)
        torch.manual_seed(3)
        found = om.exact(inner)(inner.init(given.weights()), given.task())
        answers.append((found, torch.rand(1)))
    (found, after), (plain, before) = answers
    assert torch.equal(after, before)
    assert torch.equal(found.loss, plain.loss)
    assert_close(found.grads.weights, plain.grads.weights, 1e-10)


def break_recomputation(monkeypatch, how):
    """Break recomputation with new random numbers, with other weights, or without second derivatives."""
    if how == "drawn anew":
        monkeypatch.setattr(activation_checkpoint, "capture_generator_state", lambda devices: nullcontext)
    elif how == "first order":
        plain = activation_checkpoint._pull
        monkeypatch.setattr(
            activation_checkpoint, "_pull", lambda *given: tuple(grad.detach() for grad in plain(*given))
        )
    else:
        apply = activation_checkpoint._apply

        def stale(function, again, release, tensors):
            return apply(function, lambda *now: again(*[tensor * 0.9 for tensor in now]), release, tensors)

        monkeypatch.setattr(activation_checkpoint, "_apply", stale)


@pytest.mark.parametrize("how", ["drawn anew", "first order", "other weights"])
def test_broken_recomputation_is_detected(monkeypatch, how):
    given = problem("sequence_transformer_dropout")
    inner = om.Inner(losses(given, ("body.*",))[0], om.rules.sgd(lr=0.1), 3)
    right = unrolled_maml(given.module, given.loss, given.weights(), given.task(), lr=0.1, steps=3)
    break_recomputation(monkeypatch, how)
    found = om.exact(inner)(inner.init(given.weights()), given.task())
    assert relative_error(found.grads.weights, right.grads.weights) > 1e-4


class Tied(nn.Module):
    """Two blocks that share one weight, and one block called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.second[0].weight = self.first[0].weight

    def forward(self, x):
        return self.last(self.last(self.second(self.first(x))))[:, :2]


class ManyInputsAndOutputs(nn.Module):
    """A block with several nested inputs and outputs, some of them not float tensors."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixed = nn.Linear(4, 4)
            self.register_buffer("shift", torch.tensor(0.3))

        def forward(self, x, pair, *, which, index):
            left, right = pair
            made = torch.tanh(self.mixed(x) + left * right + self.shift)
            return {"sum": made + x, "rest": (made.index_select(1, index), which, None)}

    def __init__(self):
        super().__init__()
        self.block = self.Block()

    def forward(self, x):
        found = self.block(x, (x.sin(), x.cos()), which="any", index=torch.tensor([0, 2]))
        assert found["rest"][1:] == ("any", None)
        return found["sum"][:, :2] + found["rest"][0]


@pytest.mark.parametrize(("module", "globs"), [(Tied, ("first", "second", "last")), (ManyInputsAndOutputs, ("block",))])
def test_tied_weights_and_blocks_with_many_inputs_and_outputs(module, globs):
    torch.manual_seed(0)
    made, task = module().double(), problem("mlp_tanh").task()
    inner = om.Inner(om.model_loss(made, "mse", recompute=globs), om.rules.sgd(lr=0.1), 3)
    weights = {name: weight.detach().clone() for name, weight in made.named_parameters()}
    found = om.exact(inner)(inner.init(weights), task)
    right = unrolled_maml(made, "mse", weights, task, lr=0.1, steps=3)
    assert_close(found.grads.weights, right.grads.weights, 1e-10)


def test_the_third_derivative_is_right_too():
    function = recompute_on_backward(lambda x, w: (torch.sin(w * x).exp(),))
    x, w = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.4, 1.3))
    assert torch.autograd.gradgradcheck(
        lambda x, w: torch.autograd.grad(function(x, w)[0], x, create_graph=True), (x, w)
    )


def test_a_glob_that_matches_nothing_is_refused_with_the_nearest_name():
    module = problem("sequence_transformer").module
    with pytest.raises(ValueError, match=r"recompute = 'boddy' matches none of .* did you mean 'body'"):
        om.model_loss(module, "mse", recompute=("boddy",))


def test_a_layer_that_returns_integers_is_refused():
    class Argmax(nn.Module):
        def forward(self, x):
            return x.argmax(1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.where = nn.Linear(4, 2), Argmax()

        def forward(self, x):
            return self.body(x) + self.where(x)[:, None]

    module = Net().double()
    inner = om.Inner(om.model_loss(module, "mse", recompute=("where",)), om.rules.sgd(), 1)
    with pytest.raises(TypeError, match="the layer 'where' returns an integer tensor"):
        om.exact(inner)(inner.init(dict(module.named_parameters())), problem("mlp_tanh").task())


def test_recomputation_runs_task_by_task():
    given = problem("sequence_transformer")
    loss, plain = losses(given, ("body.*",))
    inner, other = (om.Inner(one, om.rules.sgd(lr=0.1), 2) for one in (loss, plain))
    meta, tasks = inner.init(given.weights()), [given.task(seed) for seed in range(3)]
    right = om.over_tasks(om.exact(other), batching="loop")(meta, tasks)
    for limit in (None, 10**9):
        choice = choose_plan(om.exact(inner), meta, tasks, 3, limit)
        assert choice.plan.batching == "loop"
        assert "task by task" in str(choice.measured[-1].rejection)
    found = om.over_tasks(om.exact(inner), batching="loop")(meta, tasks)
    assert_close(found.grads.weights, right.grads.weights, 1e-10)
    with pytest.raises(RuntimeError, match="task by task"):
        om.over_tasks(om.exact(inner), batching="vmap")(meta, tasks)


@pytest.mark.parametrize("name", ["sequence_transformer_dropout", "conv_batch_norm"])
def test_preflight_accepts_recomputation(name):
    given = problem(name)
    inner = om.Inner(losses(given, GLOBS[name])[0], om.rules.sgd(lr=0.01), 2)
    report = preflight(inner, inner.init(given.weights()), [given.task(0), given.task(1)])
    assert not report.problems
    assert any("task by task" in note for note in report.notes)


def test_the_graph_of_a_step_has_the_size_of_one_block():
    """Eight blocks need the inputs of eight blocks and the inside of one, in addition to what the estimator stores."""
    torch.manual_seed(0)

    def peak(layers, globs, estimator=om.exact):
        module = transformer(5, 64, features=8, width=32, heads=4, layers=layers)
        inner = om.Inner(om.model_loss(module, "cross_entropy", recompute=globs), om.rules.sgd(lr=0.1), 1)
        meta = inner.init(dict(module.named_parameters()))
        batch = om.Batch(torch.randn(10, 64, 8), torch.arange(10) % 5)
        return peak_bytes(lambda: estimator(inner)(meta, om.Task(batch, batch)))

    plain, ours = ((peak(8, globs) - peak(2, globs)) / 6 for globs in ((), ("body.*",)))
    assert ours < 0.15 * plain
    assert peak(8, ("body.*",)) < 0.35 * peak(8, ())


def test_settings_select_the_recomputed_blocks():
    args = {"outputs": 2, "length": 5, "features": 3, "width": 8, "heads": 2}
    settings = ModelSettings("trainers.models:transformer", args, "mse", recompute=("body.*",))
    loss = build_loss(settings, build_module(settings, 0))
    assert loss.without_recompute is not None
    assert loss.without_recompute.without_recompute is None
