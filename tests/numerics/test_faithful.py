"""The pure function of a module gives what the module itself gives: in its dtypes, in its modes, whatever it holds."""

import copy
import threading
import types
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import online_meta as om
from online_meta.testing.compare import assert_close, relative_error
from online_meta.testing.oracle import central_difference, unrolled_maml
from online_meta.tree import to_float64
from tests.numerics.problems import regression_task
from tests.numerics.several_dtypes import (
    FrozenBackbone,
    InHalf,
    LearnedInHalf,
    Tokens,
    batch,
    learned,
    setting,
    with_buffer,
)
from tests.numerics.unsafe import between
from trainers.models import lora, transformer
from trainers.models.lora import LowRankLinear


class SharedBuffer(nn.Module):
    """Two layers with one buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = with_buffer(torch.randn(4).double(), lambda x, v: (x * v).float()), nn.Linear(4, 4)
        self.b.register_buffer("again", self.a.value)

    def forward(self, x):
        return self.a(self.b(x) * self.b.again.float())


MODELS = {
    "a float64 buffer": lambda: with_buffer(
        torch.tensor(1_700_000_037.0, dtype=torch.float64), lambda x, v: (x + 1_700_000_000.0 - v).float()
    ),
    "a bfloat16 buffer": lambda: with_buffer(torch.tensor([1.1]).bfloat16(), lambda x, v: x * v),
    "a complex buffer": lambda: with_buffer(torch.randn(4, dtype=torch.complex64), lambda x, v: (x * v).real),
    "an integer buffer": lambda: with_buffer(torch.tensor([3, 1, 0, 2]), lambda x, v: x[:, v]),
    "a buffer of booleans": lambda: with_buffer(torch.tensor([True, False, True, True]), lambda x, v: x * v),
    "a shared buffer": SharedBuffer,
    "a frozen bfloat16 body": lambda: FrozenBackbone(torch.bfloat16),
    "a frozen float16 body": lambda: FrozenBackbone(torch.float16),
    "a learned bfloat16 embedding": LearnedInHalf,
    "no lower precision": lambda: between(nn.BatchNorm1d(6, track_running_stats=False)),
    "batch norm in evaluation mode": lambda: between(nn.BatchNorm1d(6)).eval(),
    "spectral norm in evaluation mode": lambda: between(parametrizations.spectral_norm(nn.Linear(6, 6))).eval(),
}


def moved(module, seed=0):
    """Return a copy of a module with other learned weights, and these weights."""
    random = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for weight in other.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=random).to(weight)
    return other, learned(other)


@pytest.mark.parametrize("name", MODELS)
def test_the_output_is_that_of_the_module_to_the_bit(name):
    torch.manual_seed(0)
    module = MODELS[name]()
    output, x = om.model_output(module), batch().x
    for other, weights in (moved(module), (module, learned(module))):
        assert torch.equal(output(weights, x), other(x).detach())
        assert output(weights, x).dtype == other(x).dtype


@pytest.mark.parametrize("name", MODELS)
def test_such_models_adapt_like_plain_autograd_and_have_no_problem(name):
    torch.manual_seed(0)
    module = MODELS[name]()
    inner, meta = setting(module)
    task = om.Task(batch(), batch(seed=1))
    found, other = inner.adapt(meta, task.support), copy.deepcopy(module)
    names = [name for name, weight in other.named_parameters() if weight.requires_grad]
    for _ in range(2):
        weights = [dict(other.named_parameters())[name] for name in names]
        grads = torch.autograd.grad(F.mse_loss(other(task.support.x), task.support.y), weights)
        with torch.no_grad():
            for weight, grad in zip(weights, grads, strict=True):
                weight -= 0.1 * grad
    for name in names:
        torch.testing.assert_close(found[name], dict(other.named_parameters())[name].detach(), rtol=1e-5, atol=1e-6)
    assert om.preflight(inner, meta, [task]).problems == ()


def test_a_model_in_another_precision_takes_its_constants_along():
    """As ``Module.to(dtype)`` would: the checks run models in float64, and ``precision`` in bfloat16."""
    torch.manual_seed(0)
    module = with_buffer(torch.randn(4), lambda x, v: x * v)
    module.head.bias.requires_grad_(False)
    wide = {name: weight.double() for name, weight in learned(module).items()}
    found = om.model_output(module)(wide, batch().x.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, copy.deepcopy(module).double()(batch().x.double()).detach(), rtol=1e-12, atol=0)
    low = om.model_loss(module, "mse", precision=torch.bfloat16).output(learned(module), batch().x)
    right = copy.deepcopy(module).bfloat16()(batch().x.bfloat16()).detach().float()
    assert torch.equal(low, right)


def test_a_model_in_bfloat16_is_compared_with_the_module_in_bfloat16():
    torch.manual_seed(0)
    for module in (with_buffer(torch.randn(4), lambda x, v: x * v), between(nn.LayerNorm(6))):
        inner, meta = setting(module, precision=torch.bfloat16)
        task = om.Task(batch(), batch(seed=1))
        assert torch.isfinite(om.exact(inner)(meta, task).loss)
        assert om.preflight(inner, meta, [task]).problems == ()


class Holding(nn.Module):
    """A model that holds something that a copy may not take along."""

    def __init__(self, make):
        super().__init__()
        self.body, self.other, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.held = make(self)

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        held = self.held
        if isinstance(held, weakref.ref):
            hidden = held().other(hidden)
        elif isinstance(held, dict):
            hidden = held["parent"].other(hidden)
        elif callable(held):
            hidden = held(hidden)
        else:
            with held if hasattr(held, "acquire") else nullcontext():
                hidden = self.other(hidden)
        return self.head(hidden)


def hooked():
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    module.add_module("3", nn.Linear(2, 2))
    last = module[3]
    module[2].register_forward_hook(lambda layer, args, output: output + last(output))
    return module


class NoCopy(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("of this there is only one")


class SameCopy(nn.Linear):
    def __deepcopy__(self, memo):
        return self


HELD = {
    "a lock": lambda: Holding(lambda self: threading.Lock()),
    "a random generator": lambda: Holding(lambda self: torch.Generator()),
    "a Python generator": lambda: Holding(lambda self: (value for value in range(3))),
    "a module of Python": lambda: Holding(lambda self: types),
    "a lambda that uses self": lambda: Holding(lambda self: lambda x: self.other(x)),
    "a default that is a layer": lambda: Holding(lambda self: lambda x, layer=self.other: layer(x)),
    "a partial of a method": lambda: Holding(lambda self: partial(self.other.forward)),
    "a partial of a lambda": lambda: Holding(lambda self: partial(lambda x: self.other(x))),
    "a bound method": lambda: Holding(lambda self: self.other.forward),
    "a weak reference": lambda: Holding(lambda self: weakref.ref(self)),
    "a weak proxy": lambda: Holding(lambda self: {"parent": weakref.proxy(self)}),
    "a proxy of what is gone": lambda: Holding(lambda self: [weakref.proxy(nn.Linear(1, 1)), weakref.ref(nn.ReLU())]),
    "a hook that uses a layer": hooked,
    "a layer that refuses copies": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), NoCopy(6, 2)),
    "a layer that copies itself": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), SameCopy(6, 2)),
    "a pruned layer": lambda: between(prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.5)),
}


@pytest.mark.parametrize("name", HELD)
def test_what_a_module_holds_changes_neither_outputs_nor_gradients(name):
    torch.manual_seed(0)
    module = HELD[name]().double()
    module(torch.randn(3, 4, dtype=torch.float64))  # Hooks then hold tensors with a graph.
    weights = learned(module)
    task, before = regression_task(), {name: weight.clone() for name, weight in weights.items()}
    output = om.model_output(module)
    assert torch.equal(output(weights, task.query.x), module(task.query.x).detach())
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=0.1), 3)
    found = om.exact(inner)(inner.init(weights), task)
    right = unrolled_maml(module, "mse", weights, task, lr=0.1, steps=3)
    assert_close(found.grads.weights, right.grads.weights, 1e-10)
    assert all(float(grad.abs().sum()) > 0 for name, grad in right.grads.weights.items() if "body" in name)
    assert om.preflight(inner, inner.init(weights), [task]).problems == ()
    assert all(torch.equal(weight, before[name]) for name, weight in learned(module).items()), "the module is unchanged"
    assert module.training


def test_a_module_that_cannot_be_copied_is_in_evaluation_mode_only_while_it_is_scored():
    torch.manual_seed(0)
    module = nn.Sequential(Holding(lambda self: threading.Lock()), nn.Dropout(0.5)).double()
    loss, task = om.model_loss(module, "mse"), regression_task()
    assert loss.random
    assert torch.equal(loss.output(learned(module), task.query.x), module[0](task.query.x).detach())
    assert not torch.equal(loss.training(learned(module), task.query.x), module[0](task.query.x).detach())
    assert module[1].training


def test_threads_share_a_module_that_cannot_be_copied():
    torch.manual_seed(0)
    module = Holding(lambda self: threading.Lock())
    output, x, wrong = om.model_output(module), batch().x, []
    pairs = [moved(Holding(lambda self: None), seed)[1] for seed in range(3)]
    right = [output(weights, x) for weights in pairs]

    def compare(weights, answer):
        wrong.extend(name for name in range(200) if not torch.equal(output(weights, x), answer))

    threads = [threading.Thread(target=compare, args=pair) for pair in zip(pairs, right, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_module_that_cannot_be_copied_cannot_be_recomputed():
    with pytest.raises(ValueError, match=r"recompute = .* needs a model that can be copied"):
        om.model_loss(Holding(lambda self: threading.Lock()), "mse", recompute=("body",))


def test_a_compiled_model_counts_as_the_module_that_it_was_made_from():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    for module in (torch.compile(plain, backend="eager"), nn.Sequential(torch.compile(plain, backend="eager"))):
        inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=0.1), 2)
        meta = inner.init(dict(module.named_parameters()))
        found = om.exact(inner)(meta, regression_task()).grads.weights
        right = unrolled_maml(plain, "mse", learned(plain), regression_task(), lr=0.1, steps=2).grads.weights
        torch.testing.assert_close([*found.values()], [*right.values()], rtol=1e-10, atol=1e-14)
        assert om.preflight(inner, meta, [regression_task()]).problems == ()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_modules_that_cannot_be_called_with_other_weights_are_refused_with_a_reason():
    with pytest.raises(ValueError, match=r"0\.weight, 0\.bias of the model have no shape yet: call the model once"):
        om.model_loss(nn.Sequential(nn.LazyLinear(3)), "mse")
    scripted = nn.Sequential(torch.jit.script(nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"the layer '0' is a module of torch.jit, .* the Python module"):
        om.model_loss(scripted, "mse")


class Complex(nn.Module):
    """A model with complex weights."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64)), nn.Linear(3, 2)

    def forward(self, x):
        return self.head((x.to(self.mix.dtype) @ self.mix).abs())


def test_complex_weights_have_exact_gradients_and_count_in_the_norm():
    torch.manual_seed(0)
    module, task = Complex(), om.Task(batch(), batch(seed=1))
    inner, meta = setting(module)
    assert om.preflight(inner, meta, [task]).problems == ()
    wide, task = to_float64((meta, task))
    grads = om.exact(inner)(wide, task).grads.weights
    random = torch.Generator().manual_seed(0)
    along = {n: torch.randn(v.shape, generator=random, dtype=v.dtype) for n, v in wide.weights.items()}

    def adapted_loss(weights):
        return inner.loss(inner.adapt(om.Meta(weights, {}), task.support), task.query)

    slope = central_difference(adapted_loss, wide.weights, along)
    assert sum(float((g.conj() * along[n]).real.sum()) for n, g in grads.items()) == pytest.approx(slope, rel=1e-6)
    report = om.MetaOptimizer(wide, clip_norm=1e-3).apply(om.MetaGrad(torch.zeros(()), om.Meta(grads, {})), 1.0)
    squares = [
        float(torch.view_as_real(g).square().sum() if g.is_complex() else g.square().sum()) for g in grads.values()
    ]
    assert report.norm == pytest.approx(sum(squares) ** 0.5)


def test_the_weights_of_tasks_are_not_rounded_to_the_dtype_of_the_first_weight():
    torch.manual_seed(0)
    inner, meta = setting(LearnedInHalf())
    tasks = [om.Task(batch(seed=seed), batch(seed=seed + 10)) for seed in range(3)]
    stacked = om.Task(*(om.Batch(*map(torch.stack, zip(*one, strict=True))) for one in zip(*tasks, strict=True)))
    right = torch.stack([om.exact(inner)(meta, task).grads.weights["head.bias"] for task in tasks]).mean(0)
    for given in (tasks, stacked):
        found = om.over_tasks(om.exact(inner), "vmap")(meta, given).grads.weights["head.bias"]
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-7)


def test_an_embedding_with_sparse_gradients_has_dense_ones():
    torch.manual_seed(0)
    dense, sparse = (Tokens(nn.Embedding(7, 6, sparse=kind)) for kind in (False, True))
    sparse.load_state_dict(dense.state_dict())
    b = om.Batch(torch.arange(6), torch.randn(6, 2))
    found, right = (
        om.exact(inner)(meta, om.Task(b, b)).grads.weights for inner, meta in (setting(sparse), setting(dense))
    )
    assert relative_error(found, right) == 0.0
    assert sparse.get_submodule("2").sparse


def test_low_rank_additions_to_a_frozen_half_precision_model():
    torch.manual_seed(0)
    base = nn.Linear(6, 6).bfloat16().requires_grad_(False)
    module = nn.Sequential(nn.Linear(4, 6), InHalf(LowRankLinear(base, 2, 2.0)), nn.Linear(6, 2))
    module[0].requires_grad_(False)
    inner, meta = setting(module)
    assert {name for name in meta.weights if "lora" in name} == {"1.inner.lora_a", "1.inner.lora_b"}
    assert {value.dtype for value in meta.weights.values()} == {torch.float32}
    task = om.Task(batch(), batch(seed=1))
    grads = om.exact(inner)(meta, task).grads.weights
    assert float(grads["1.inner.lora_b"].abs().sum()) > 0
    assert om.preflight(inner, meta, [task]).problems == ()


def test_the_exact_gradient_of_a_frozen_half_precision_body_is_of_second_order():
    torch.manual_seed(0)
    module = FrozenBackbone(torch.bfloat16)
    inner, meta = setting(module)
    task = om.Task(batch(), batch(seed=1))
    found = om.exact(inner)(meta, task).grads.weights
    features = (
        torch.tanh(module.body(task.support.x.bfloat16())).float(),
        torch.tanh(module.body(task.query.x.bfloat16())).float(),
    )
    head = copy.deepcopy(module.head).double()
    wide = om.Task(*(om.Batch(x.double(), b.y.double()) for x, b in zip(features, task, strict=True)))
    right = unrolled_maml(head, "mse", learned(head), wide, lr=0.1, steps=2).grads.weights
    assert relative_error({n.removeprefix("head."): g.double() for n, g in found.items()}, right) < 1e-5


def test_low_rank_additions_to_a_transformer_in_bfloat16():
    """The usual setting: all of a pretrained model in bfloat16 and frozen, additions in float32."""
    torch.manual_seed(0)
    build = {"build": "tests.numerics.test_faithful:pretrained", "freeze": True, "rank": 2}
    module = lora(**build)
    inner = om.Inner(om.model_loss(module, "cross_entropy"), om.rules.sgd(lr=0.5), 2)
    meta = inner.init(dict(module.named_parameters()))
    assert {value.dtype for value in meta.weights.values()} == {torch.float32}
    random = torch.Generator().manual_seed(0)
    one = om.Batch(torch.randint(7, (6, 5), generator=random), torch.arange(6) % 3)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(inner.loss.output(meta.weights, one.x), module(one.x).detach())
    task = om.Task(one, one)
    assert all(float(g.abs().sum()) > 0 for n, g in om.exact(inner)(meta, task).grads.weights.items() if "lora_b" in n)
    learner = om.FollowTheMetaLeader(inner, om.exact(inner), om.MetaOptimizer(meta, lr=0.05))
    scores = []
    for _ in range(8):
        scores.append(learner.score(task).loss_after)
        learner.learn(task)
    assert scores[-1] < scores[0]
    assert om.preflight(inner, meta, [task]).problems == ()


class CountWidened(TorchDispatchMode):
    """Counts how often each of some tensors becomes a float64 tensor."""

    def __init__(self, tensors):
        super().__init__()
        self.counts = {tensor.data_ptr(): 0 for tensor in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.float64:
            place = args[0].data_ptr()
            self.counts |= {place: self.counts[place] + 1} if place in self.counts else {}
        return function(*args, **(kwargs or {}))


def test_preflight_converts_the_frozen_weights_to_float64_once():
    torch.manual_seed(0)
    module = lora(build="tests.numerics.test_faithful:pretrained", freeze=True, rank=2)
    inner = om.Inner(om.model_loss(module, "cross_entropy"), om.rules.sgd(lr=0.5), 2)
    meta = inner.init(dict(module.named_parameters()))
    one = om.Batch(torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3)
    with CountWidened(inner.loss.tensors.constants[name] for name in inner.loss.frozen) as counted:
        found = om.preflight(inner, meta, [om.Task(one, one)])
    assert found.problems == ()
    assert not any("does not compute in float64" in note for note in found.notes)
    assert len(counted.counts) > 10
    assert set(counted.counts.values()) == {1}
    assert inner.loss.tensors.widened == {}


def pretrained():
    return transformer(3, 5, tokens=7, width=8, heads=2, layers=1).bfloat16()
