import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import online_meta as om
from tests.numerics.problems import EVERY, problem, regression_task
from tests.numerics.unsafe import UNSAFE, Checkpointed, Middle, between, plain, weight_normed
from trainers.models import conv4


def run_preflight(module, loss="mse", task=None, steps=3, **options):
    """Return the preflight report of a float32 module under ``model_loss``."""
    torch.manual_seed(0)
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=0.1), steps)
    task = regression_task() if task is None else task
    single = om.Task(*(om.Batch(*(t.float() if t.is_floating_point() else t for t in b)) for b in task))
    return om.preflight(inner, inner.init(dict(module.named_parameters())), [single, single], **options)


def raw_loss(module):
    """Return a loss around the module itself, as a user may write it, without the protections of ``model_loss``."""
    return lambda params, batch: F.mse_loss(functional_call(module, dict(params), (batch.x,)), batch.y)


def run_preflight_raw(module, loss=None, task=None):
    torch.manual_seed(0)
    inner = om.Inner(loss or raw_loss(module), om.rules.sgd(lr=0.1), 2)
    task = regression_task() if task is None else task
    return om.preflight(inner, inner.init(dict(module.double().named_parameters())), [task])


@pytest.mark.parametrize("name", EVERY)
def test_valid_models_have_no_problem(name):
    module, loss, make_task = problem(name)
    report = run_preflight(module.float(), loss, make_task())
    assert report.problems == ()
    assert not [note for note in report.notes if "differences" in note or "float64" in note]


@pytest.mark.parametrize("mistake", UNSAFE)
def test_each_mistake_is_explained(mistake):
    make, messages = UNSAFE[mistake]
    torch.manual_seed(0)
    report = run_preflight(make())
    assert len(report.problems) == 1
    for words in messages:
        assert words in report.problems[0]
    assert "\n" not in report.problems[0]


@pytest.mark.parametrize("how", ["whole", "plain"])
def test_the_advice_for_weight_normalisation_works(how):
    assert run_preflight(weight_normed(how)).problems == ()


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_the_deprecated_weight_norm_is_found_in_a_custom_loss():
    (found,) = run_preflight_raw(between(nn.utils.weight_norm(nn.Linear(6, 6)))).problems
    assert "layer '2' (Linear) is under weight normalisation" in found


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_found_in_a_custom_loss(reentrant):
    """The recomputation there uses the module's own weights, so the gradient is silently wrong."""
    (found,) = run_preflight_raw(Checkpointed(reentrant)).problems
    assert "(torch.utils.checkpoint)" in found
    assert "layer 'body'" in found or reentrant


def test_attention_with_the_default_kernel_is_found_in_a_custom_loss():
    module, _, make_task = problem("sequence_attention")
    (found,) = run_preflight_raw(module, task=make_task()).problems
    assert "make the loss with om.model_loss" in found
    assert run_preflight(module.float(), task=make_task()).notes == (
        "attention runs by torch's math kernel, the only one that can be differentiated twice",
    )


def test_a_value_detached_in_the_loss_itself_is_reported():
    module = plain()
    output = om.model_output(module)
    (found,) = run_preflight_raw(
        module, lambda p, b: F.mse_loss(output(p, b.x), b.y) * output(p, b.x).std().item()
    ).problems
    assert "though that of each layer is: the loss itself hides something" in found


def test_a_loss_without_layers_is_checked_too():
    weights = {"w": torch.ones(4, 2, dtype=torch.float64)}
    for loss, right in (
        (lambda p, b: F.mse_loss(b.x @ p["w"], b.y), True),
        (lambda p, b: p["w"].detach().sum(), False),
    ):
        inner = om.Inner(loss, om.rules.sgd(lr=0.1), 2)
        assert (om.preflight(inner, inner.init(weights), [regression_task()]).problems == ()) is right


def test_a_rule_that_detaches_gradients_is_found():
    def update(rule, carry, seen, step):
        return carry._replace(phi={n: w - 0.1 * seen.grads[n].detach() for n, w in carry.phi.items()})

    module = plain()
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd()._replace(update=update), 2)
    (found,) = om.preflight(inner, inner.init(dict(module.named_parameters())), [regression_task()]).problems
    assert "the inner rule hides something from autograd" in found


def test_an_exact_gradient_that_differs_from_the_unrolled_one_is_found(monkeypatch):
    monkeypatch.setattr(sys.modules["online_meta.preflight.preflight"], "exact", om.first_order)
    (found,) = run_preflight(plain()).problems
    assert "from that of the inner loop unrolled" in found


class WithUnusedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = plain(), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def test_weights_without_influence_are_a_note():
    report = run_preflight(WithUnusedWeights())
    assert report.problems == ()
    assert report.notes == ("at these weights the loss of the tasks tried has no gradient for idle.weight, idle.bias",)


class Single(nn.Linear):
    """A layer that computes in float32 for any input."""

    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class OnlySingle(nn.Linear):
    """A layer that cannot have float64 weights."""

    def forward(self, x):
        return super().forward(x.float())


@pytest.mark.parametrize("layer", [Single, OnlySingle])
def test_a_model_without_float64_support_is_checked_in_float32(layer):
    report = run_preflight(nn.Sequential(layer(4, 6), nn.Tanh(), layer(6, 2)))
    assert report.problems == ()
    assert "the model does not compute in float64" in report.notes[0]
    wrong = run_preflight(nn.Sequential(layer(4, 6), Middle(lambda x: x * x.detach()), layer(6, 2)))
    assert "forward uses .detach()" in wrong.problems[0]


class Branching(nn.Linear):
    """A layer that branches on a value, so vmap cannot run it."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else 2 * x)


def test_a_model_that_vmap_cannot_run_is_a_note():
    report = run_preflight(Branching(4, 2))
    assert report.problems == ()
    (note,) = report.notes
    assert "does not run for many tasks at once by vmap" in note
    assert "the task loop is used" in note


@pytest.mark.parametrize("mistake", ["weight_norm", "wrong double backward"])
def test_a_wrong_second_derivative_is_a_note_if_it_is_not_used(mistake):
    torch.manual_seed(0)
    report = run_preflight(UNSAFE[mistake][0](), second=False)
    assert report.problems == ()
    assert any("second derivative" in note for note in report.notes)


@pytest.mark.parametrize("mistake", ["detach", "random", "running statistics"])
def test_a_wrong_first_derivative_is_always_a_problem(mistake):
    assert len(run_preflight(UNSAFE[mistake][0](), second=False).problems) == 1


def test_the_gradient_estimator_is_checked_too():
    def problems_of(answer):
        return run_preflight(plain(), gradient=answer).problems

    zero, endless = (om.Meta({"0.weight": torch.full((6, 4), value)}, {}) for value in (0.0, torch.inf))
    assert problems_of(lambda meta, task: om.MetaGrad(torch.ones(()), zero)) == ()
    (found,) = problems_of(lambda meta, task: om.MetaGrad(torch.ones(()), endless))
    assert "the meta-gradient for 0.weight is not finite where the loss is 1" in found
    (found, *_) = problems_of(lambda meta, task: om.MetaGrad(torch.rand(()), zero))
    assert "repeated calls give different meta-gradients" in found


def images(size):
    random = torch.Generator().manual_seed(0)
    x = torch.randint(256, (8, 1, size, size), generator=random, dtype=torch.uint8)
    return om.Task(om.Batch(x, torch.arange(8) % 3), om.Batch(x.flip(0), torch.arange(8) % 3))


def test_kinks_are_not_reported():
    torch.manual_seed(0)
    kinked = nn.Sequential(nn.Linear(4, 400), nn.ReLU(), nn.Linear(400, 300), nn.LeakyReLU(), nn.Linear(300, 2))
    assert run_preflight(kinked) == om.Preflight((), ())
    assert run_preflight(conv4(1, 16, 3, pool="max"), "cross_entropy", images(16)).problems == ()


def test_kinks_too_close_together_for_float32_are_only_a_note():
    """Differences with the step that float32 needs average over the kinks, and contradict the gradient."""
    torch.manual_seed(4)
    sizes = [(48, 64), (64, 64), (64, 3)]
    kinked = nn.Sequential(*(layer for size in sizes for layer in (OnlySingle(*size), nn.ReLU())))[:-1]
    inner = om.Inner(om.model_loss(kinked, "cross_entropy"), om.rules.sgd(lr=0.4), 1)
    random = torch.Generator().manual_seed(4)
    task = om.Task(*(om.Batch(torch.randn(8, 48, generator=random), torch.arange(8) % 3) for _ in range(2)))
    report = om.preflight(inner, inner.init(dict(kinked.named_parameters())), [task])
    assert report.problems == ()
    assert "or float32 is too coarse for its kinks" in report.notes[-1]


@pytest.mark.parametrize("norm", ["group", "batch", "layer", "instance", "none"])
def test_images_can_be_bytes(norm):
    torch.manual_seed(0)
    assert run_preflight(conv4(1, 32, 3, filters=8, norm=norm), "cross_entropy", images(32)) == om.Preflight((), ())


def test_preflight_changes_neither_its_arguments_nor_torchs_generator():
    module, loss, make_task = given = problem("mlp_dropout")
    inner, task = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=0.1), 2), make_task()
    meta = inner.init(given.weights())
    before = [tensor.clone() for tensor in tree_leaves((meta, task))]
    state = torch.get_rng_state()
    assert om.preflight(inner, meta, [task]).problems == ()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves((meta, task)), before, strict=True))
    assert torch.is_grad_enabled()
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_an_unknown_error_is_reported_with_its_own_message():
    (found,) = run_preflight(nn.Linear(7, 2)).problems
    assert found.startswith("the loss cannot be differentiated: RuntimeError: mat1 and mat2 shapes cannot be")
    with pytest.raises(ValueError, match="there is no task"):
        om.preflight(None, None, [])


class DropsAndDetaches(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.dropout, self.head = nn.Linear(4, 6), nn.Dropout(0.3), nn.Linear(6, 2)

    def forward(self, x):
        x = self.dropout(torch.tanh(self.body(x)))
        return self.head(x * x.detach())


def test_a_layer_with_dropout_is_reported_only_for_its_real_mistake():
    (found,) = run_preflight(DropsAndDetaches()).problems
    assert "the model itself (DropsAndDetaches) is not its slope: its forward uses .detach()" in found


def test_a_loss_with_high_curvature_is_checked_with_smaller_steps():
    """Instance normalisation divides 2x2 maps that hardly vary by their standard deviation."""
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    batch = om.Batch(torch.randint(256, (4, 3, 28, 28), generator=random, dtype=torch.uint8), torch.arange(4))
    assert run_preflight(conv4(norm="instance"), "cross_entropy", om.Task(batch, batch)) == om.Preflight((), ())
