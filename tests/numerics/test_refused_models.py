"""What would silently be another model is refused, by preflight and by learners, with the layer and the cure."""

import random

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import online_meta as om
from online_meta.learners import aruba, moml
from online_meta.testing.compare import assert_close
from online_meta.testing.learner_problems import setup
from online_meta.testing.oracle import unrolled_maml
from tests.numerics.problems import regression_task
from tests.numerics.several_dtypes import LearnedInHalf, Tokens, batch, learned, setting
from tests.numerics.unsafe import Counting, Middle, between


class Stale(nn.Module):
    """A model whose copy computes something else: it counts its copies."""

    def __init__(self):
        super().__init__()
        self.head, self.scale = nn.Linear(4, 2), 1.0

    def __deepcopy__(self, memo):
        other = Stale()
        other.load_state_dict(self.state_dict())
        other.scale = self.scale + 1.0
        return other

    def forward(self, x):
        return self.scale * self.head(x)


def learner_of(inner, meta):
    return om.FollowTheMetaLeader(inner, om.exact(inner), om.MetaOptimizer(meta))


def test_a_copy_that_computes_something_else_is_found_by_preflight_and_by_learners():
    torch.manual_seed(0)
    module = Stale()
    inner, meta = setting(module)
    task = om.Task(batch(), batch(seed=1))
    (found,) = om.preflight(inner, meta, [task]).problems
    assert "the loss does not compute what the model does (off by " in found
    for one in (learner_of(inner, meta), aruba.build(setup(inner=inner, start=meta))):
        for _ in range(2):
            with pytest.raises(ValueError, match="the loss does not compute what the model does"):
                one.score(task)


def test_a_module_that_changed_since_is_noticed_and_one_that_is_gone_is_not_missed():
    torch.manual_seed(0)
    module = Stale()
    module.__class__ = type("Scaled", (nn.Module,), {"forward": Stale.forward})
    inner, meta = setting(module)
    module.scale = 3.0
    with pytest.raises(ValueError, match="if the model was changed since, make the loss again"):
        learner_of(inner, meta).score(om.Task(batch(), batch(seed=1)))
    score = learner_of(*setting(nn.Linear(4, 2))).score(om.Task(batch(), batch(seed=1)))
    assert score.loss_after == score.loss_after, "a number"


class ByItsClass(nn.Linear):
    """A model that finds itself through its class: a copy would find the original there."""

    def forward(self, x):
        return F.linear(x, type(self).only.weight, self.bias)


def test_a_copy_that_keeps_the_first_weights_is_found_although_these_give_the_same_output():
    torch.manual_seed(0)
    module = ByItsClass(4, 2)
    ByItsClass.only = module
    inner, meta = setting(module)
    assert torch.equal(inner.loss.output(meta.weights, batch().x), module(batch().x).detach())
    with pytest.raises(ValueError, match="the loss does not compute what the model does"):
        learner_of(inner, meta).score(om.Task(batch(), batch(seed=1)))
    (found,) = om.preflight(inner, meta, [om.Task(batch(), batch(seed=1))]).problems
    assert "the loss does not compute what the model does" in found


@pytest.mark.parametrize(
    "does",
    [lambda x: F.dropout(x, 0.5), lambda x: x + torch.randn_like(x), lambda x: x * random.random()],
    ids=["dropout", "noise", "Python's random"],
)
def test_random_numbers_that_nobody_seeds_are_refused_by_learners(does):
    """The backward pass computes a step again: with other random numbers, the gradient is silently wrong."""
    torch.manual_seed(0)
    module = between(Middle(does))
    inner, meta = setting(module)
    with pytest.raises(ValueError, match=r"repeated calls of the model differ .* model_loss\(\.\.\., random=True\)"):
        learner_of(inner, meta).score(om.Task(batch(), batch(seed=1)))
    (found,) = om.preflight(inner, meta, [om.Task(batch(), batch(seed=1))]).problems
    assert "repeated calls give different losses" in found


def test_declared_random_numbers_are_seeded_and_the_checks_draw_none_of_them():
    torch.manual_seed(0)
    module = between(Middle(lambda x: F.dropout(x, 0.5)))

    def noisy(output, y):
        return F.mse_loss(output + 0.1 * torch.randn_like(output), y)

    task = om.Task(batch(), batch(seed=1))
    found = []
    for _ in range(2):  # The first call is checked, the second one is not.
        inner = om.Inner(om.model_loss(module, noisy, random=True), om.rules.sgd(lr=0.1), 2)
        meta = inner.init(dict(module.named_parameters()))
        found += [om.exact(inner)(meta, task).grads.weights for _ in range(2)]
    for one in found[1:]:
        assert all(torch.equal(one[name], found[0][name]) for name in one)
    learner = learner_of(*setting(between(nn.Tanh())))
    torch.manual_seed(1)
    right = torch.rand(3)
    torch.manual_seed(1)
    learner.score(task)
    assert torch.equal(torch.rand(3), right), "torch's own generator is as it was"


@pytest.mark.parametrize("steps", [0, 2])
def test_running_statistics_are_refused_where_a_loss_is_used(steps):
    """Without this, a notebook's learner silently scores with the statistics of the query set, which it changes."""
    torch.manual_seed(0)
    module = between(nn.BatchNorm1d(6))
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=0.1), steps)
    meta = inner.init(dict(module.named_parameters()))
    task = om.Task(batch(), batch(seed=1))
    learner = om.FollowTheMetaLeader(inner, om.exact(inner), om.MetaOptimizer(meta))
    message = r"layer '2' \(BatchNorm1d\) keeps running statistics, .*track_running_stats=False"
    calls = [
        lambda: learner.score(task),
        lambda: om.exact(inner)(meta, task),
        lambda: om.over_tasks(om.exact(inner), "vmap")(meta, [task]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    (found,) = om.preflight(inner, meta, [task]).problems
    with pytest.raises(ValueError, match="keeps running statistics") as raised:
        inner.loss(meta.weights, task.support)
    assert str(raised.value) == found, "one message, one cure"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: nn.BatchNorm1d(6).requires_grad_(False),
            ("layer '2' (BatchNorm1d) is frozen", ".eval() on that layer"),
        ),
        (lambda: nn.BatchNorm1d(6, affine=False), ("layer '2'", ".eval() on that layer")),
        (lambda: nn.InstanceNorm1d(6, track_running_stats=True), ("layer '2' (InstanceNorm1d)", "track_running_stats")),
        (lambda: parametrizations.spectral_norm(nn.Linear(6, 6)), ("layer '2' is under spectral", ".eval() on that")),
        (Counting, ("forward edits the buffer '2.calls'", ".eval() on that layer")),
        (lambda: nn.Embedding(7, 6, max_norm=0.1), ("layer '2' (Embedding) edits its weight", "leave max_norm out")),
    ],
)
def test_layers_with_a_state_are_refused_with_their_name_and_cure(make, words):
    torch.manual_seed(0)
    layer = make()
    module = between(layer) if not isinstance(layer, nn.Embedding) else Tokens(layer)
    inner, meta = setting(module)
    b = batch() if not isinstance(layer, nn.Embedding) else om.Batch(torch.arange(6), torch.randn(6, 2))
    (found,) = om.preflight(inner, meta, [om.Task(b, b)]).problems
    with pytest.raises(ValueError, match=r"edits|running stat|spectral") as raised:
        inner.adapt(meta, b)
    for message in (found, str(raised.value)):
        assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.BatchNorm1d(6), "layer '2' \\(BatchNorm1d\\) keeps running statistics"),
        (lambda: parametrizations.spectral_norm(nn.Linear(6, 6)), "layer '2' is under spectral normalisation"),
    ],
)
def test_learners_check_a_loss_of_the_users_own_too(make, words):
    torch.manual_seed(0)
    module = between(make())

    def loss(params, batch):
        return F.mse_loss(functional_call(module, params, (batch.x,)), batch.y)

    inner = om.Inner(loss, om.rules.sgd(lr=0.1), 2)
    meta, task = inner.init(dict(module.named_parameters())), om.Task(batch(), batch(seed=1))
    learner = om.FollowTheMetaLeader(inner, om.exact(inner), om.MetaOptimizer(meta))
    others = [aruba.build(setup(inner=inner, start=meta)), moml.build(setup(inner=inner, start=meta))]
    for one in (learner, *others):
        for _ in range(2):
            with pytest.raises(ValueError, match=words):
                one.score(task)
    module.eval()
    for one in (learner, *others):
        assert one.score(task).loss_after < one.score(task).loss_before


def test_what_a_loss_of_the_users_own_has_stays_reachable():
    class Own:
        random = True

        def __call__(self, params, batch):
            return (params["w"] * batch.x - batch.y).square().mean()

        def evaluate(self, params, batch):
            return 2 * self(params, batch)

    inner = om.Inner(Own(), om.rules.sgd(lr=0.1), 1)
    meta = inner.init({"w": torch.ones(4)})
    learner = om.FollowTheMetaLeader(inner, om.exact(inner), om.MetaOptimizer(meta))
    one = om.Batch(torch.randn(3, 4), torch.randn(3, 4))
    assert learner.inner.loss.random
    assert learner.score(om.Task(one, one)).loss_before == pytest.approx(2 * float(inner.loss(meta.weights, one)))


class Forgetful(nn.Module):
    """A model whose body is in a plain list, which hides its weights from torch."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = [nn.Linear(4, 6)], nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layers[0](x)))


def test_weights_that_no_module_has_and_weights_in_half_precision_are_notes():
    torch.manual_seed(0)
    task = om.Task(batch(), batch(seed=1))
    notes = om.preflight(*setting(Forgetful()), [task]).notes
    assert "the model itself (Forgetful) uses parameters of shapes (6, 4), (6,), which no module has" in " ".join(notes)
    notes = om.preflight(*setting(LearnedInHalf()), [task]).notes
    assert "embed are learned in half precision" in " ".join(notes)


def test_a_compiled_module_in_a_loss_of_the_users_own_is_named():
    torch.manual_seed(0)
    module = torch.compile(between(nn.Tanh()), backend="aot_eager")
    inner = om.Inner(lambda p, b: F.mse_loss(functional_call(module, p, (b.x,)), b.y), om.rules.sgd(lr=0.1), 2)
    task = om.Task(batch(), batch(seed=1))
    (found,) = om.preflight(inner, inner.init(dict(module.named_parameters())), [task]).problems
    assert "a part of the model is compiled (torch.compile)" in found
    assert "take the module before it is compiled" in found


class FrozenByHand(nn.Module):
    """A model that computes its body under a mode without gradients."""

    def __init__(self, mode):
        super().__init__()
        self.body, self.head, self.mode = nn.Linear(4, 6), nn.Linear(6, 2), mode

    def forward(self, x):
        with self.mode():
            hidden = torch.tanh(self.body(x))
        return self.head(hidden.clone())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_cure_for_a_body_without_gradients_is_to_freeze_it(mode):
    torch.manual_seed(0)
    module, task = FrozenByHand(mode), om.Task(batch(), batch(seed=1))
    (found,) = om.preflight(*setting(module), [task]).problems
    assert "freeze the weights that are used there (requires_grad_(False))" in found
    module.body.requires_grad_(False)
    assert om.preflight(*setting(module), [task]).problems == ()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.h = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.h(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_a_state_dict_serves_as_weights_if_it_holds_weights_only():
    torch.manual_seed(0)
    module = Tied().double()
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=0.1), 2)
    meta = inner.init(module.state_dict())
    assert [*meta.weights] == [name for name, _ in module.named_parameters()]
    right = unrolled_maml(module, "mse", learned(module), regression_task(), lr=0.1, steps=2)
    assert_close(om.exact(inner)(meta, regression_task()).grads.weights, right.grads.weights, 1e-10)


def test_weights_that_are_not_those_of_the_model_are_refused_with_their_names():
    module, tied = between(nn.BatchNorm1d(6)).eval(), Tied()
    body = between(nn.Linear(6, 6))
    body[0].requires_grad_(False)
    state = body.state_dict()

    def message(module, weights):
        inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=0.1), 1)
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - the caller compares the message
            inner.init(weights)
        return str(raised.value)

    assert "2.num_batches_tracked, 2.running_mean, 2.running_var are buffers" in message(module, module.state_dict())
    assert "b.weight is tied to a.weight, but their values differ" in message(
        tied, {**tied.state_dict(), "b.weight": torch.zeros(4, 4)}
    )
    assert "['3.bias'] are missing" in message(body, {n: v for n, v in state.items() if n != "3.bias"})
    assert "['extra'] are unknown" in message(body, {**state, "extra": torch.zeros(1)})
    assert "3.bias has shape (1,); the model's has (2,)" in message(body, {**state, "3.bias": torch.zeros(1)})
    assert "frozen weights 0.bias differ from" in message(body, {**state, "0.bias": torch.zeros(6)})
    inner = om.Inner(lambda params, batch: params["w"].sum(), om.rules.sgd(lr=0.1), 1)
    with pytest.raises(ValueError, match="w are integers"):
        inner.init({"w": torch.arange(3)})
