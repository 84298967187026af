"""Output and targets fit the loss, or the loss is refused with a reason: nothing is broadcast silently."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import online_meta as om
from online_meta.functional.guard import explain_misfit


class Squeezed(nn.Sequential):
    """A model 4 -> 1 whose output has shape (n,)."""

    def forward(self, x):
        return super().forward(x)[:, 0]


def network(outputs=1, squeezed=False):
    torch.manual_seed(0)
    kind = Squeezed if squeezed else nn.Sequential
    return kind(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs), nn.Sigmoid())


def gaussian(output, y):
    return F.gaussian_nll_loss(output, y, torch.full_like(output, 0.5))


def hand_written(output, y):
    return ((output - y) ** 2).mean()


def cross_entropy_of_probabilities(output, y):
    return -(y * output.log() + (1 - y) * (1 - output).log()).mean()


def reversed_huber(output, y):
    return F.huber_loss(y, output)


def derived(output, y):
    return F.l1_loss(2 * output, 2 * y)


def in_a_where(output, y):
    return torch.where(output > y, output - y, 0.1 * (y - output)).sum()


ELEMENT_WISE = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "huber": partial(F.huber_loss, delta=0.3),
    "a module": nn.HuberLoss(),
    "a lambda": lambda output, y: F.smooth_l1_loss(output, y, beta=0.2),
    "keywords": lambda output, y: F.mse_loss(input=output, target=y),
    "reversed": reversed_huber,
    "binary cross-entropy": F.binary_cross_entropy,
    "with logits": nn.BCEWithLogitsLoss(),
    "poisson": F.poisson_nll_loss,
    "gaussian": gaussian,
    "kl": F.kl_div,
    "soft margin": F.soft_margin_loss,
    "hand-written": hand_written,
    "hand-written cross-entropy": cross_entropy_of_probabilities,
    "derived": derived,
    "where": in_a_where,
}


def report(module, loss, y, steps=1):
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=0.01), steps)
    meta = inner.init(dict(module.named_parameters()))
    batch = om.Batch(torch.randn(len(y), 4), y)
    return inner, meta, om.Task(batch, batch)


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")
@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize("name", ELEMENT_WISE)
def test_all_pairs_of_output_and_targets_are_refused_where_they_are_used(name, squeezed):
    y = torch.rand(8) if not squeezed else torch.rand(8, 1)
    inner, meta, task = report(network(squeezed=squeezed), ELEMENT_WISE[name], y)
    shape = r"\(8, 1\).*\(8,\)" if not squeezed else r"\(8,\).*\(8, 1\)"
    learner = om.FollowTheMetaLeader(inner, om.exact(inner), om.MetaOptimizer(meta))
    for call in (lambda: learner.score(task), lambda: inner.adapt(meta, task.support)):
        with pytest.raises(ValueError, match=shape):
            call()
    (found,) = om.preflight(inner, meta, [task], remarks=False).problems
    assert "element by element" in found or "in all pairs of their samples" in found


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")
@pytest.mark.parametrize("name", ELEMENT_WISE)
def test_equal_shapes_are_accepted_and_give_the_loss_itself(name):
    y = torch.rand(8, 1)
    inner, meta, task = report(network(), ELEMENT_WISE[name], y)
    right = ELEMENT_WISE[name](network()(task.query.x), y).detach()
    assert torch.equal(inner.loss(meta.weights, task.query), right)
    assert inner.loss.evaluate(meta.weights, task.query) == right


def test_one_output_for_several_targets_is_refused_by_torchs_own_losses():
    for loss in ("mse", F.l1_loss, nn.SmoothL1Loss(), F.huber_loss, F.poisson_nll_loss):
        inner, meta, task = report(network(), loss, torch.rand(8, 3))
        (found,) = om.preflight(inner, meta, [task], remarks=False).problems
        assert "the output has shape (8, 1) and the targets (8, 3): return an output of shape (8, 3)" in found


def quantile(output, y):
    error = y - output
    levels = torch.tensor([0.1, 0.5, 0.9])
    return torch.maximum(levels * error, (levels - 1) * error).mean()


def mixture_density(output, y):
    means, logits = output.chunk(2, -1)
    each = -0.5 * (means[:, :, None] - y[:, None, :]) ** 2
    return -torch.logsumexp(each.sum(-1) + logits.log_softmax(-1), -1).mean()


def weighted_classes(output, y):
    return F.cross_entropy(output, y, weight=torch.tensor([1.0, 2.0, 3.0]))


def contrastive(output, y):
    """The supervised contrastive loss (Khosla et al., 2020): pairs of outputs, and pairs of classes."""
    similar = output @ output.T
    same = (y[:, None] == y[None, :]).float()
    return -(same * similar.log_softmax(-1)).mean()


def squeezing_itself(output, y):
    return F.mse_loss(output.squeeze(-1), y)


def distance_of_distributions(output, y):
    """Pairs on purpose: output and targets have one shape, so that nothing is broadcast by accident."""
    return (output[:, None] - y[None, :]).abs().mean() - (output[:, None] - output[None, :]).abs().mean()


RIGHT = {
    "quantiles": (quantile, 3, lambda: torch.rand(8, 1)),
    "a mixture density": (mixture_density, 4, lambda: torch.rand(8, 1)),
    "a mixture of vectors": (mixture_density, 4, lambda: torch.rand(8, 3)),
    "weights of classes": (weighted_classes, 3, lambda: torch.arange(8) % 3),
    "classes": ("cross_entropy", 3, lambda: torch.arange(8) % 3),
    "probabilities of classes": ("cross_entropy", 3, lambda: torch.rand(8, 3)),
    "smoothed labels": (partial(F.cross_entropy, label_smoothing=0.1), 3, lambda: torch.arange(8) % 3),
    "a sum": (nn.CrossEntropyLoss(reduction="sum"), 3, lambda: torch.arange(8) % 3),
    "a contrastive loss": (contrastive, 3, lambda: torch.arange(8) % 3),
    "a loss that squeezes": (squeezing_itself, 1, lambda: torch.rand(8)),
    "a distance of distributions": (distance_of_distributions, 1, lambda: torch.rand(8, 1)),
    "margins": (F.multi_margin_loss, 3, lambda: torch.arange(8) % 3),
}


@pytest.mark.parametrize("name", RIGHT)
def test_losses_that_combine_other_shapes_rightly_are_accepted(name):
    loss, outputs, y = RIGHT[name]
    inner, meta, task = report(network(outputs), loss, y())
    assert torch.isfinite(inner.loss(meta.weights, task.query))
    assert om.preflight(inner, meta, [task], remarks=False, second=False).problems == ()


def test_a_loss_that_is_neither_a_scalar_nor_one_number_a_sample_is_refused_with_a_reason():
    output, y = torch.rand(8, 1), torch.rand(8, 1)
    for loss, found in (
        (partial(F.mse_loss, reduction="none"), "a tensor of shape (8, 1)"),
        (lambda output, y: float(F.mse_loss(output, y)), "a float"),
        (lambda output, y: None, "a NoneType"),
    ):
        message = f"the loss returns {found}; it must return the losses of the samples, (8,), or a scalar"
        assert message in explain_misfit(loss, output, y)
    flat = partial(F.mse_loss, reduction="none")
    assert explain_misfit(flat, output[:, 0], y[:, 0]) is None, "one number a sample is a loss"
    module = network(1)
    each, mean = (om.model_loss(module, loss) for loss in (lambda a, b: flat(a, b).mean(1), "mse"))
    weights, batch = dict(module.named_parameters()), om.Batch(torch.rand(8, 4), y)
    assert torch.allclose(each(weights, batch), mean(weights, batch))
    weight = torch.arange(8.0)
    right = (weight * (module(batch.x) - y)[:, 0] ** 2).sum() / weight.sum()
    assert torch.allclose(each(weights, batch._replace(weight=weight)), right)
    with pytest.raises(ValueError, match=r"the loss is the class MSELoss: give a function"):
        om.model_loss(network(), nn.MSELoss)


def test_a_batch_is_not_taken_for_the_classes_of_one_sample():
    """Torch reads an output (n,) and float targets (n,) as one sample with n classes."""
    for loss in ("cross_entropy", F.cross_entropy, nn.CrossEntropyLoss()):
        inner, meta, task = report(network(squeezed=True), loss, torch.rand(8))
        with pytest.raises(ValueError, match="counts as the classes of one sample"):
            inner.loss(meta.weights, task.query)


def test_equal_outputs_of_an_untrained_head_do_not_hide_the_pairs():
    module = network(squeezed=True)
    nn.init.zeros_(module[2].weight)
    inner, meta, task = report(module, hand_written, torch.rand(8, 1))
    with pytest.raises(ValueError, match="in all pairs of their samples"):
        inner.loss(meta.weights, task.query)


@pytest.mark.parametrize("batching", ["loop", "vmap", "traced"])
def test_stacked_tasks_are_not_broadcast_either(batching):
    inner, meta, task = report(network(squeezed=True), F.huber_loss, torch.rand(8, 1))
    with pytest.raises(ValueError, match="compares element by element"):
        om.over_tasks(om.exact(inner), batching)(meta, [task, task])
    inner, meta, task = report(network(), F.huber_loss, torch.rand(8, 1))
    assert torch.isfinite(om.over_tasks(om.exact(inner), batching)(meta, [task, task]).loss)


def test_each_new_shape_is_tried_and_a_known_one_is_not():
    calls = []

    def counted(output, y):
        calls.append(len(y))
        return ((output - y) ** 2).mean()

    inner, meta, _ = report(network(), counted, torch.rand(8, 1))
    for rows in (8, 8, 3, 8, 3):
        batch = om.Batch(torch.randn(rows, 4), torch.rand(rows, 1))
        inner.loss(meta.weights, batch)
    assert calls == [8, 8, 8, 3, 3, 8, 3], "once more for each new shape"
    with pytest.raises(ValueError, match="all pairs"):
        inner.loss(meta.weights, om.Batch(torch.randn(3, 4), torch.rand(3)))


def test_a_loss_of_the_users_own_that_broadcasts_is_reported_by_preflight():
    module = network(squeezed=True)
    output = om.model_output(module)
    inner = om.Inner(lambda params, batch: F.mse_loss(output(params, batch.x), batch.y), om.rules.sgd(lr=0.1), 1)
    batch = om.Batch(torch.randn(8, 4), torch.rand(8, 1))
    problems = om.preflight(inner, inner.init(dict(module.named_parameters())), [om.Task(batch, batch)]).problems
    assert "by broadcasting: give them the same shape" in problems[0]


def accuracy(shape, y, **options):
    """Return the accuracy of outputs that are the largest, in the class dimension, where ``y`` says."""
    return float(om.accuracy_of(lambda params, x: x, **options)({}, om.Batch(shape, y)))


def test_accuracy_of_images_of_classes_counts_pixels():
    random = torch.Generator().manual_seed(0)
    y = torch.randint(5, (3, 6, 7), generator=random)
    right = F.one_hot(y, 5).movedim(-1, 1).float()
    wrong = right.roll(1, 1)
    assert accuracy(right, y) == 1.0
    assert accuracy(wrong, y) == 0.0
    half = torch.cat([right[:, :, :3], wrong[:, :, 3:]], 2)
    assert accuracy(half, y) == 0.5
    each = [[int(half[i, :, j, k].argmax()) == int(y[i, j, k]) for k in range(7)] for i in range(3) for j in range(6)]
    assert accuracy(half, y) == sum(map(sum, each)) / y.numel()


def test_accuracy_takes_classes_last_probabilities_and_ignored_pixels():
    random = torch.Generator().manual_seed(0)
    y = torch.randint(5, (3, 4), generator=random)
    last = F.one_hot(y, 5).float()
    assert accuracy(last, y) == 1.0
    assert accuracy(F.one_hot(y[:, :3] % 3, 3).float(), y[:, :3] % 3, dim=-1) == 1.0, "(3, 3, 3) is ambiguous"
    assert accuracy(last.movedim(-1, 1), last.movedim(-1, 1)) == 1.0
    assert accuracy(last[:, 0], 0.6 * last[:, 0] + 0.08) == 1.0
    part = y.clone()
    part[0] = -100
    assert accuracy(last.roll(1, -1), part) == 0.0
    assert accuracy(torch.cat([last[:1].roll(1, -1), last[1:]]), part) == 1.0, "what is ignored does not count"


@pytest.mark.parametrize(("output", "y"), [((4, 3), (4, 1)), ((4, 3), (3,)), ((4, 3, 6, 6), (4, 6)), ((4,), (4,))])
def test_accuracy_of_other_shapes_is_an_error(output, y):
    with pytest.raises(ValueError, match=r"accuracy needs an output \(n, classes, \.\.\.\)"):
        accuracy(torch.rand(output), torch.zeros(y, dtype=torch.int64))
