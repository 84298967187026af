"""Gradients that differ from the slope on purpose: what is declared is verified, not refused."""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import online_meta as om
from online_meta.testing.compare import relative_error
from online_meta.testing.oracle import central_difference
from tests.numerics.unsafe import Middle, WrongSlope, between

ESTIMATORS = {"exact": om.exact, "first_order": om.first_order, "reptile": om.reptile}


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def tokens(embedding, classes=3):
    return nn.Sequential(embedding, Mean(), nn.Linear(4, classes)).double()


def token_task(seed=0):
    random = torch.Generator().manual_seed(seed)

    def batch():
        return om.Batch(torch.randint(7, (6, 5), generator=random), torch.randint(3, (6,), generator=random))

    return om.Task(batch(), batch())


def task(seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)

    def batch():
        x = torch.randn(6, 4, generator=random, dtype=torch.float64)
        return om.Batch(x.to(dtype), torch.randn(6, 2, generator=random, dtype=torch.float64).to(dtype))

    return om.Task(batch(), batch())


def setting(module, loss="mse", **options):
    inner = om.Inner(om.model_loss(module, loss, **options), om.rules.sgd(lr=0.1), 2)
    return inner, inner.init(dict(module.named_parameters()))


def straight_through(x):
    return x + (torch.round(2 * x) / 2 - x).detach()


class Sign(torch.autograd.Function):
    """The sign with the derivative of tanh, as in binarised networks; differentiable twice."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(x) ** 2)


class Spike(Sign):
    """A surrogate with one derivative only, as in spiking networks."""

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + x.abs()) ** 2


class Reverse(Sign):
    """The identity whose gradient is reversed (Ganin et al., 2016)."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Quantised(nn.Module):
    """Codes of a learned book, chosen by distance, with a straight-through gradient to the input."""

    def __init__(self):
        super().__init__()
        self.book = nn.Parameter(torch.randn(5, 6))

    def forward(self, x):
        code = self.book[torch.cdist(x, self.book).argmin(1)]
        return x + (code - x).detach() + 0.1 * (code - code.detach())


SURROGATES = {
    "straight-through": lambda: Middle(straight_through),
    "a function with another backward": lambda: Middle(Sign.apply),
    "a function that is differentiated once": lambda: Middle(Spike.apply),
    "a reversed gradient": lambda: Middle(Reverse.apply),
    "a stopped gradient": lambda: Middle(lambda x: x * x.detach().tanh()),
    "a layer with weights": Quantised,
    "inside another layer": lambda: nn.Sequential(nn.Linear(6, 6), Middle(straight_through), nn.Linear(6, 6)),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", SURROGATES)
def test_a_declared_surrogate_is_accepted_under_every_estimator(name, estimator):
    torch.manual_seed(0)
    module = between(SURROGATES[name]())
    glob = "2.1" if name == "inside another layer" else "2"
    second = estimator == "exact"
    plain, meta = setting(module)
    assert om.preflight(plain, meta, [task(), task(1)], second=second).problems, "without the declaration it is refused"
    for inner, options in (
        (setting(module, surrogate=[glob])[0], {}),
        (plain, {"surrogate": [glob]}),
    ):
        report = om.preflight(inner, meta, [task(), task(1)], second=second, **options)
        assert report.problems == ()
        assert report.notes[0] == f"the gradient of '{glob}' is a surrogate; the rest is checked"


@pytest.mark.parametrize("wrong", ["before", "after"])
@pytest.mark.parametrize("glob", ["surrogate", "surr*", "sur*.deep"])
def test_a_wrong_gradient_around_a_declared_surrogate_is_found(wrong, glob):
    torch.manual_seed(0)

    def layer(place):
        return Middle(WrongSlope.apply if place == wrong else torch.sin)

    surrogate = Middle(straight_through)
    if glob.endswith("deep"):
        surrogate = nn.Sequential()
        surrogate.add_module("deep", Middle(straight_through))
    module = nn.Sequential()
    for name, one in (("a", nn.Linear(4, 6)), ("before", layer("before")), ("surrogate", surrogate)):
        module.add_module(name, one)
    for name, one in (("b", nn.Linear(6, 6)), ("after", layer("after")), ("c", nn.Linear(6, 2))):
        module.add_module(name, one)
    inner, meta = setting(module, surrogate=[glob])
    (found,) = om.preflight(inner, meta, [task()]).problems
    assert f"the gradient of the layer '{wrong}' (Middle) is not its slope" in found


class Outside(nn.Module):
    """A declared surrogate, and a value that the model detaches outside of its layers."""

    def __init__(self):
        super().__init__()
        self.body, self.act, self.head = nn.Linear(4, 6), Middle(straight_through), nn.Linear(6, 2)

    def forward(self, x):
        hidden = self.act(self.body(x))
        return self.head(hidden) / (1 + hidden.detach().norm())


def test_what_is_detached_outside_of_a_declared_surrogate_is_found():
    torch.manual_seed(0)
    inner, meta = setting(Outside(), surrogate=["act"])
    (found,) = om.preflight(inner, meta, [task()]).problems
    assert "the gradient of the model itself (Outside) is not its slope: its forward uses .detach()" in found


def test_a_wrong_second_derivative_around_a_declared_surrogate_is_found():
    torch.manual_seed(0)
    weight_normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    module = nn.Sequential(nn.Linear(4, 6), Middle(straight_through), weight_normed, nn.Tanh(), nn.Linear(6, 2))
    inner, meta = setting(module, surrogate=["1"])
    (found,) = om.preflight(inner, meta, [task()]).problems
    assert "layer '2' (ParametrizedLinear) is under weight normalisation" in found


def test_a_surrogate_that_is_none_is_a_note_and_one_that_does_not_exist_is_refused():
    torch.manual_seed(0)
    module = between(nn.Tanh())
    inner, meta = setting(module, surrogate=["2"])
    report = om.preflight(inner, meta, [task()])
    assert report.problems == ()
    assert "the gradient of the layer '2' (Tanh) is its slope: no surrogate" in report.notes
    with pytest.raises(ValueError, match=r"surrogate = 'act' matches none of the model's layers"):
        setting(module, surrogate=["act"])
    (found,) = om.preflight(inner, meta, [task()], surrogate=["act"]).problems
    assert found.startswith("surrogate = 'act' matches none of the model's layers")


def test_the_advice_for_a_surrogate_names_the_layer_to_declare():
    torch.manual_seed(0)
    for make in (Sign.apply, straight_through):
        (found,) = om.preflight(*setting(between(Middle(make))), [task()]).problems
        assert "declare surrogate = ['2'] (in [model], or of om.model_loss)" in found


@pytest.mark.parametrize("estimator", ["exact", "first_order"])
def test_the_padding_row_of_an_embedding_is_constant(estimator):
    torch.manual_seed(0)
    module = tokens(nn.Embedding(7, 4, padding_idx=0))
    inner, meta = setting(module, "cross_entropy")
    report = om.preflight(inner, meta, [token_task(), token_task(1)], second=estimator == "exact")
    assert report.problems == ()
    found = om.exact(inner)(meta, token_task()).grads.weights
    assert not found["0.weight"][0].any()

    def adapted_loss(weights):
        return inner.loss(inner.adapt(om.Meta(weights, {}), token_task().support), token_task().query)

    random = torch.Generator().manual_seed(0)
    along = {n: torch.randn(w.shape, generator=random, dtype=w.dtype) for n, w in meta.weights.items()}
    along["0.weight"][0] = 0
    slope = central_difference(adapted_loss, meta.weights, along)
    assert sum(float((found[n] * along[n]).sum()) for n in along) == pytest.approx(slope, rel=1e-6)


def test_a_wrong_layer_behind_an_embedding_with_padding_is_named_rightly():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Embedding(7, 4, padding_idx=0), Mean(), nn.Linear(4, 6), Middle(WrongSlope.apply), nn.Linear(6, 3)
    )
    (found,) = om.preflight(*setting(module.double(), "cross_entropy"), [token_task()]).problems
    assert "the gradient of the layer '3' (Middle)" in found


def test_an_embedding_that_scales_its_gradient_is_a_surrogate():
    torch.manual_seed(0)
    module = tokens(nn.Embedding(7, 4, scale_grad_by_freq=True))
    report = om.preflight(*setting(module, "cross_entropy"), [token_task()])
    assert report.problems == ()
    assert "the gradient of '0' is a surrogate; the rest is checked" in report.notes


def test_a_bag_of_embeddings_has_one_derivative_and_is_named():
    torch.manual_seed(0)
    module = nn.Sequential(nn.EmbeddingBag(7, 4, padding_idx=0), nn.Tanh(), nn.Linear(4, 3)).double()
    inner, meta = setting(module, "cross_entropy")
    assert om.preflight(inner, meta, [token_task()], second=False).problems == ()
    (found,) = om.preflight(inner, meta, [token_task()]).problems
    assert "an operation in the layer '0' (EmbeddingBag) has one derivative only" in found


class OwnTable(nn.Module):
    """A table of a user's own, whose row 2 is a constant."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(7, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.embedding(x, self.table, padding_idx=2).mean(1))


def test_declared_rows_are_verified():
    torch.manual_seed(0)
    module = OwnTable().double()
    (found,) = om.preflight(*setting(module, "cross_entropy"), [token_task()]).problems
    assert "declare frozen_rows = { WEIGHT = [ROW] }" in found
    inner, meta = setting(module, "cross_entropy", frozen_rows={"table": [2]})
    assert om.preflight(inner, meta, [token_task()]).problems == ()
    plain, _ = setting(module, "cross_entropy")
    assert om.preflight(plain, meta, [token_task()], frozen_rows={"table": [2]}).problems == ()
    inner, meta = setting(module, "cross_entropy", frozen_rows={"table": [1, -5]})
    (found,) = om.preflight(inner, meta, [token_task()]).problems
    assert found == "frozen_rows: the rows [1, 2] of table have a gradient, so they are learned"
    for rows, words in (({"tabel": [2]}, "did you mean 'table'"), ({"table": [7]}, "table has 7 rows, so .* no row 7")):
        with pytest.raises(ValueError, match=words):
            setting(module, "cross_entropy", frozen_rows=rows)


def test_a_frozen_embedding_with_padding_has_no_problem():
    torch.manual_seed(0)
    table = nn.Embedding.from_pretrained(torch.randn(7, 4), freeze=True, padding_idx=0)
    assert om.preflight(*setting(tokens(table), "cross_entropy"), [token_task()]).problems == ()


class TiedTokens(nn.Module):
    """A language model: the embedding, with padding, is the matrix of the head, too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.embed(x).mean(1))))


def test_a_padding_row_that_a_tied_head_learns_is_a_note():
    torch.manual_seed(0)
    report = om.preflight(*setting(TiedTokens().double(), "cross_entropy"), [token_task()])
    assert report.problems == ()
    assert "the padding row of embed.weight has a gradient all the same" in " ".join(report.notes)


def test_what_is_declared_does_not_change_what_is_learned():
    torch.manual_seed(0)
    module = between(Middle(Sign.apply)).double()
    found, right = (
        om.exact(inner)(meta, task()).grads.weights
        for inner, meta in (setting(module, surrogate=["2"]), setting(module))
    )
    assert relative_error(found, right) == 0.0
