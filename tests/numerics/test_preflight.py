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


def asked(module, loss="mse", task=None, steps=3, **options):
    """The preflight of a module in float32, as a user has it."""
    torch.manual_seed(0)
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=0.1), steps)
    task = regression_task() if task is None else task
    single = om.Task(*(om.Batch(*(t.float() if t.is_floating_point() else t for t in b)) for b in task))
    return om.preflight(inner, inner.init(dict(module.named_parameters())), [single, single], **options)


def raw(module):
    """A loss as a user may write it, around the module itself; nothing of ``model_loss`` protects it."""
    return lambda params, batch: F.mse_loss(functional_call(module, dict(params), (batch.x,)), batch.y)


def asked_raw(module, loss=None, task=None):
    torch.manual_seed(0)
    inner = om.Inner(loss or raw(module), om.rules.sgd(lr=0.1), 2)
    task = regression_task() if task is None else task
    return om.preflight(inner, inner.init(dict(module.double().named_parameters())), [task])


@pytest.mark.parametrize("name", EVERY)
def test_good_models_have_no_problem(name):
    module, loss, make_task = problem(name)
    report = asked(module.float(), loss, make_task())
    assert report.problems == ()
    assert not [note for note in report.notes if "differences" in note or "float64" in note]


@pytest.mark.parametrize("mistake", UNSAFE)
def test_a_mistake_is_explained(mistake):
    make, told = UNSAFE[mistake]
    torch.manual_seed(0)
    report = asked(make())
    assert len(report.problems) == 1
    for words in told:
        assert words in report.problems[0]
    assert "\n" not in report.problems[0]


@pytest.mark.parametrize("how", ["whole", "plain"])
def test_what_is_advised_for_weight_normalisation_works(how):
    assert asked(weight_normed(how)).problems == ()


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_the_old_weight_norm_is_found_in_a_loss_of_ones_own():
    (found,) = asked_raw(between(nn.utils.weight_norm(nn.Linear(6, 6)))).problems
    assert "layer '2' (Linear) is under weight normalisation" in found


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_found_in_a_loss_of_ones_own(reentrant):
    """There the weights are the module's own when it is computed again, so the gradient is silently wrong."""
    (found,) = asked_raw(Checkpointed(reentrant)).problems
    assert "(torch.utils.checkpoint)" in found
    assert "layer 'body'" in found or reentrant


def test_attention_by_the_default_kernel_is_found_in_a_loss_of_ones_own():
    module, _, make_task = problem("sequence_attention")
    (found,) = asked_raw(module, task=make_task()).problems
    assert "make the loss with om.model_loss" in found
    assert asked(module.float(), task=make_task()).notes == (
        "attention runs by torch's math kernel, the only one that can be differentiated twice",
    )


def test_what_the_loss_itself_hides_is_told():
    module = plain()
    output = om.model_output(module)
    (found,) = asked_raw(module, lambda p, b: F.mse_loss(output(p, b.x), b.y) * output(p, b.x).std().item()).problems
    assert "though that of each layer is: the loss itself hides something" in found


def test_a_loss_without_layers_is_examined_too():
    weights = {"w": torch.ones(4, 2, dtype=torch.float64)}
    for loss, right in (
        (lambda p, b: F.mse_loss(b.x @ p["w"], b.y), True),
        (lambda p, b: p["w"].detach().sum(), False),
    ):
        inner = om.Inner(loss, om.rules.sgd(lr=0.1), 2)
        assert (om.preflight(inner, inner.init(weights), [regression_task()]).problems == ()) is right


def test_a_rule_that_hides_something_is_found():
    def update(rule, carry, grads, step):
        return carry._replace(phi={n: w - 0.1 * grads[n].detach() for n, w in carry.phi.items()})

    module = plain()
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd()._replace(update=update), 2)
    (found,) = om.preflight(inner, inner.init(dict(module.named_parameters())), [regression_task()]).problems
    assert "the inner rule hides something from autograd" in found


def test_an_exact_gradient_that_is_not_the_unrolled_one_is_found(monkeypatch):
    monkeypatch.setattr(sys.modules["online_meta.preflight.preflight"], "exact", om.first_order)
    (found,) = asked(plain()).problems
    assert "from that of the inner loop unrolled" in found


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = plain(), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def test_weights_that_nothing_depends_on_are_a_note():
    report = asked(Idle())
    assert report.problems == ()
    assert report.notes == ("at these weights the loss of the tasks tried has no gradient for idle.weight, idle.bias",)


class Single(nn.Linear):
    """It computes in float32, whatever it is given."""

    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class OnlySingle(nn.Linear):
    """It cannot have weights in float64."""

    def forward(self, x):
        return super().forward(x.float())


@pytest.mark.parametrize("layer", [Single, OnlySingle])
def test_a_model_that_takes_no_float64_is_compared_in_float32(layer):
    report = asked(nn.Sequential(layer(4, 6), nn.Tanh(), layer(6, 2)))
    assert report.problems == ()
    assert "the model does not compute in float64" in report.notes[0]
    wrong = asked(nn.Sequential(layer(4, 6), Middle(lambda x: x * x.detach()), layer(6, 2)))
    assert "forward uses .detach()" in wrong.problems[0]


class Branching(nn.Linear):
    """It looks at a number, so it does not run for many tasks at once."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else 2 * x)


def test_what_vmap_cannot_do_is_a_note():
    report = asked(Branching(4, 2))
    assert report.problems == ()
    (note,) = report.notes
    assert "does not run for many tasks at once by vmap" in note
    assert "the task loop is used" in note


@pytest.mark.parametrize("mistake", ["weight_norm", "wrong double backward"])
def test_second_derivatives_that_nobody_takes_are_a_note(mistake):
    torch.manual_seed(0)
    report = asked(UNSAFE[mistake][0](), second=False)
    assert report.problems == ()
    assert any("second derivative" in note for note in report.notes)


@pytest.mark.parametrize("mistake", ["detach", "random", "running statistics"])
def test_first_derivatives_are_always_a_problem(mistake):
    assert len(asked(UNSAFE[mistake][0](), second=False).problems) == 1


def test_an_estimator_is_asked_too():
    def told(answer):
        return asked(plain(), gradient=answer).problems

    zero, endless = (om.Meta({"0.weight": torch.full((6, 4), value)}, {}) for value in (0.0, torch.inf))
    assert told(lambda meta, task: om.MetaGrad(torch.ones(()), zero)) == ()
    (found,) = told(lambda meta, task: om.MetaGrad(torch.ones(()), endless))
    assert "the meta-gradient for 0.weight is not finite where the loss is 1" in found
    (found, *_) = told(lambda meta, task: om.MetaGrad(torch.rand(()), zero))
    assert "repeated calls give different meta-gradients" in found


def images(size):
    random = torch.Generator().manual_seed(0)
    x = torch.randint(256, (8, 1, size, size), generator=random, dtype=torch.uint8)
    return om.Task(om.Batch(x, torch.arange(8) % 3), om.Batch(x.flip(0), torch.arange(8) % 3))


def test_kinks_raise_no_alarm():
    torch.manual_seed(0)
    kinked = nn.Sequential(nn.Linear(4, 400), nn.ReLU(), nn.Linear(400, 300), nn.LeakyReLU(), nn.Linear(300, 2))
    assert asked(kinked) == om.Preflight((), ())
    assert asked(conv4(1, 16, 3, pool="max"), "cross_entropy", images(16)).problems == ()


def test_kinks_too_close_together_for_float32_are_no_reason_to_refuse():
    """Differences as wide as float32 needs them say that the gradient is wrong: they average over the kinks."""
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
def test_images_may_be_bytes(norm):
    torch.manual_seed(0)
    assert asked(conv4(1, 32, 3, filters=8, norm=norm), "cross_entropy", images(32)) == om.Preflight((), ())


def test_nothing_given_changes_and_neither_do_torchs_random_numbers():
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


def test_an_error_that_is_not_known_speaks_for_itself():
    (found,) = asked(nn.Linear(7, 2)).problems
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


def test_a_layer_that_draws_can_be_blamed_and_is_not_blamed_for_drawing():
    (found,) = asked(DropsAndDetaches()).problems
    assert "the model itself (DropsAndDetaches) is not its slope: its forward uses .detach()" in found


def test_a_loss_that_bends_sharply_is_looked_at_more_closely():
    """Maps of 2x2 pixels that hardly differ, divided by how much they differ."""
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    batch = om.Batch(torch.randint(256, (4, 3, 28, 28), generator=random, dtype=torch.uint8), torch.arange(4))
    assert asked(conv4(norm="instance"), "cross_entropy", om.Task(batch, batch)) == om.Preflight((), ())
