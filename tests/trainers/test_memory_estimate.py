"""The estimate of a rank's peak memory agrees with a meter that counts every tensor, and allocates nothing itself."""

from dataclasses import replace

import pytest
import torch

import online_meta as om
from online_meta.batching.plan import Group, stack, vmapped
from online_meta.memory import MemoryMeter, bytes_of, peak_bytes
from online_meta.meta_optimizer import OPTIMIZERS, MetaOptimizer
from online_meta.types import Meta, MetaGrad
from tests.numerics.problems import problem
from trainers.memory_estimate import estimate_engine_bytes, estimate_memory, gradient_peak, stored_points
from trainers.models import conv4, transformer
from trainers.settings import EngineSettings, MetaSettings, ModelSettings, TrainerSettings


def network(name, globs=()):
    torch.manual_seed(0)
    if name == "transformer":
        module, x = transformer(5, 16, features=8, width=32, heads=4, layers=2), torch.randn(10, 16, 8)
    elif name == "dropout":
        module, x = transformer(5, 16, features=8, width=32, layers=2, dropout=0.1), torch.randn(10, 16, 8)
    else:
        module, x = conv4(channels=3, size=16, ways=5, filters=8, norm="batch"), torch.randn(10, 3, 16, 16)
    loss = om.model_loss(module, "cross_entropy", recompute=globs)
    task = om.Task(*(om.Batch(x + shift, torch.arange(10) % 5) for shift in (0, 1)))
    return module, loss, task


def settings(gradient="exact", options=None, **meta):
    return TrainerSettings(
        ModelSettings("trainers.models:mlp"),
        meta=MetaSettings(gradient=gradient, options=options or {}, batch=1, **meta),
        engine=EngineSettings(batching="loop"),
    )


@pytest.mark.parametrize(
    ("gradient", "options"),
    [
        ("exact", {}),
        ("exact", {"rematerialise": True}),
        ("first_order", {}),
        ("reptile", {}),
        ("supervised", {}),
        ("exact", {"step_weights": "one a step"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("name", "globs"), [("transformer", ()), ("transformer", ("body.*",)), ("conv", ())])
def test_the_estimated_peak_of_a_gradient_agrees_with_the_meter(name, globs, steps, gradient, options):
    module, loss, task = network(name, globs)
    inner = om.Inner(loss, om.rules.momentum(lr=0.1), steps)
    meta = inner.init(dict(module.named_parameters()))
    options = {"step_weights": [1.0] * steps} if "step_weights" in options else options
    found = estimate_memory(settings(gradient, options), inner, meta, task)
    work = getattr(om, gradient)(inner, **options)
    right = peak_bytes(lambda: work(meta, task))
    assert found.trajectory + found.graph == pytest.approx(right, rel=0.1 if options else 0.02)


def test_estimating_a_peak_allocates_nothing():
    module, loss, task = network("transformer")
    inner = om.Inner(loss, om.rules.sgd(lr=0.1), 3)
    meta = inner.init(dict(module.named_parameters()))
    whole = gradient_peak(lambda steps: om.exact(replace(inner, steps=steps)), meta, task, 3).total
    used = []

    def gradient(meta, task):
        used.append(type(next(iter(meta.weights.values()))).__name__)
        return om.exact(inner)(meta, task)

    assert gradient_peak(lambda steps: gradient, meta, task, 1).total == whole
    assert used == ["FakeTensor"]


@pytest.mark.parametrize("globs", [(), ("body.*",)], ids=["kept", "recomputed"])
def test_dropout_and_data_dependent_losses_are_estimated_too(globs):
    module, loss, task = network("dropout", globs)
    inner = om.Inner(loss, om.rules.sgd(lr=0.1), 4)
    meta = inner.init(dict(module.named_parameters()))
    found = estimate_memory(settings(), inner, meta, task)
    assert found.graph + found.trajectory == pytest.approx(peak_bytes(lambda: om.exact(inner)(meta, task)), rel=0.05)
    data_dependent = replace(inner, loss=lambda params, batch: loss(params, batch) * float(batch.x.mean() > -1))
    assert estimate_memory(settings(), data_dependent, meta, task).graph > 0


def test_stacked_tasks_add_their_individual_memory():
    module, loss, task = network("transformer")
    inner = om.Inner(loss, om.rules.sgd(lr=0.1), 4)
    meta = inner.init(dict(module.named_parameters()))
    chosen = replace(settings(), meta=MetaSettings(batch=8), engine=EngineSettings(batching="vmap"))
    like = next(iter(meta.weights.values()))

    def peak(rows):
        given = stack(Group("", [task] * rows, [1.0] * rows), rows, like)
        return peak_bytes(lambda: vmapped(om.exact(inner))(meta, *given))

    found = estimate_memory(chosen, inner, meta, task)
    assert found.stacked == pytest.approx((peak(5) - peak(2)) / 3, rel=0.1)
    assert estimate_memory(replace(chosen, engine=EngineSettings(batching="loop")), inner, meta, task).stacked is None
    recomputed = replace(inner, loss=network("transformer", ("body.*",))[1])
    assert estimate_memory(chosen, recomputed, meta, task).stacked is None


@pytest.mark.parametrize(
    ("steps", "options", "kept"),
    [
        (8, {}, 8),
        (1, {"rematerialise": True}, 1),
        (9, {"rematerialise": True}, 5),
        (17, {"rematerialise": True}, 7),
        (32, {"rematerialise": True}, 10),
        (32, {"offload": True}, 2),
        (1, {"offload": True}, 1),
    ],
)
def test_the_number_of_stored_points_of_a_trajectory(steps, options, kept):
    assert stored_points(steps, **options) == kept


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("sizes", [[125] * 8, [1000]], ids=["many", "one"])
def test_the_local_engine_takes_the_estimated_memory(optimizer, sizes):
    meta = Meta({f"w{i}": torch.randn(size) for i, size in enumerate(sizes)}, {})
    estimate = estimate_engine_bytes(settings(optimizer=optimizer), meta)
    with MemoryMeter() as meter:
        engine = MetaOptimizer(meta, optimizer)
        for _ in range(3):
            grads = Meta({name: torch.ones_like(value) for name, value in meta.weights.items()}, {})
            engine.apply(MetaGrad(torch.tensor(1.0), grads), 1.0)
            del grads
    held = sum(bytes_of({name: value}) for name, value in engine.save().items() if value.dim())
    assert held == estimate.stored
    assert meter.peak == pytest.approx(estimate.stored + estimate.step, rel=0.15)


def test_the_estimate_counts_frozen_weights_and_learners():
    module = problem("sequence_transformer").module.float()
    module.body.requires_grad_(False)
    loss = om.model_loss(module, "mse")
    task = om.Task(*(om.Batch(batch.x.float(), batch.y.float()) for batch in problem("sequence_transformer").task()))
    inner = om.Inner(loss, om.rules.sgd(lr=0.1), 2)
    meta = inner.init(dict(module.named_parameters()))
    one, two = (estimate_memory(settings(), inner, meta, task, learners) for learners in (1, 2))
    assert one.frozen == sum(4 * weight.numel() for weight in module.body.parameters())
    assert one.stored == 4 * bytes_of(meta.weights)  # the start, the engine's weights, two moments of Adam
    assert two.stored - one.stored == 3 * bytes_of(meta.weights)
