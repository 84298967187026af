"""What every engine of ``trainers.engines`` keeps, as one process."""

import math
import re

import pytest
import torch

import online_meta as om
import trainers.engines
from online_meta import registry
from online_meta.meta_optimizer import OPTIMIZERS
from online_meta.testing.learner_problems import frozen
from trainers.settings import EngineSettings, MetaSettings, ModelSettings, TrainerSettings

KINDS = [kind for kind in registry.names(trainers.engines) if kind != "deepspeed"]  # of single precision: tests/engines
every_engine = pytest.mark.parametrize("kind", KINDS)


def start():
    """Return meta-parameters with a rule of their own and a scalar, in float64."""
    random = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    return om.Meta({"body.weight": draw(3, 2), "head.bias": draw(2)}, {"lr": draw(), "body.weight": draw(3, 2)})


def gradient(seed, size=1.0):
    random = torch.Generator().manual_seed(100 + seed)
    parts = (
        {n: size * torch.randn(w.shape, generator=random, dtype=w.dtype) for n, w in part.items()} for part in start()
    )
    return om.MetaGrad(torch.tensor(0.5, dtype=torch.float64), om.Meta(*parts))


def make(kind, meta=None, optimizer="adam", lr=0.01, clip_norm=None, options=None):
    settings = TrainerSettings(
        ModelSettings("trainers.models:mlp"),
        meta=MetaSettings(optimizer=optimizer, optimizer_options=options or {}, lr=lr, clip_norm=clip_norm),
        engine=EngineSettings(kind=kind),
    )
    return registry.load_module(trainers.engines, kind).build(settings, meta or start())


def values(meta):
    return [*meta.weights.values(), *meta.rule.values()]


def norm_of(grad, weight=1.0):
    return math.sqrt(sum(float((g / weight).square().sum()) for g in values(grad.grads)))


OPTIONS = {
    "adam": {"betas": [0.7, 0.9], "eps": 1e-3, "weight_decay": 0.1, "amsgrad": True},
    "adamw": {"betas": [0.7, 0.9], "weight_decay": 0.2},
    "adamax": {"betas": [0.7, 0.9], "eps": 1e-3, "weight_decay": 0.1},
    "adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-3, "weight_decay": 0.1},
    "nadam": {"betas": [0.7, 0.9], "momentum_decay": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "radam": {"betas": [0.7, 0.9], "weight_decay": 0.1, "decoupled_weight_decay": True},
    "rmsprop": {"alpha": 0.8, "momentum": 0.5, "centered": True, "weight_decay": 0.1},
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
}
"""Options of each optimizer, all of which change its steps."""


@every_engine
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "options"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_torch_optimizer_on_the_weighted_mean(kind, name, options):
    own = options.get(name, {})
    engine = make(kind, optimizer=name, options=own)
    mine = [value.clone().requires_grad_() for value in values(start())]
    optimizer = OPTIMIZERS[name](mine, lr=0.01, **own)
    for step in range(5):
        sums, weight = gradient(step), 1.0 + step
        report = engine.apply(sums, weight)
        for parameter, value in zip(mine, values(sums.grads), strict=True):
            parameter.grad = value / weight
        optimizer.step()
        assert report.skipped is None
        assert report.norm == pytest.approx(norm_of(sums, weight), rel=1e-12)
        for found, right in zip(values(engine.meta()), mine, strict=True):
            torch.testing.assert_close(found, right.detach(), rtol=1e-14, atol=1e-15)


@every_engine
def test_a_step_of_sgd_subtracts(kind):
    engine, sums = make(kind, optimizer="sgd", lr=0.5), gradient(0)
    engine.apply(sums, 4.0)
    for found, before, grad in zip(values(engine.meta()), values(start()), values(sums.grads), strict=True):
        torch.testing.assert_close(found, before - 0.5 * grad / 4, rtol=1e-14, atol=1e-15)


@every_engine
def test_the_first_step_of_adam_is_the_learning_rate_times_the_sign(kind):
    engine, sums = make(kind, optimizer="adam", lr=0.01), gradient(0)
    engine.apply(sums, 1.0)
    for found, before, grad in zip(values(engine.meta()), values(start()), values(sums.grads), strict=True):
        torch.testing.assert_close(found, before - 0.01 * grad / (grad.abs() + 1e-8), rtol=1e-12, atol=1e-14)


@every_engine
@pytest.mark.parametrize("clip_norm", [0.25, 1e6, None])
def test_the_mean_is_clipped_to_a_global_norm_and_reported_as_it_was(kind, clip_norm):
    engine, sums = make(kind, optimizer="sgd", lr=1.0, clip_norm=clip_norm), gradient(3)
    report = engine.apply(sums, 2.0)
    norm = norm_of(sums, 2.0)
    assert norm > 0.25
    assert report.norm == pytest.approx(norm, rel=1e-12)
    shrink = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
    for found, before, grad in zip(values(engine.meta()), values(start()), values(sums.grads), strict=True):
        torch.testing.assert_close(found, before - shrink * grad / 2, rtol=1e-9, atol=1e-12)


SPOILT = {
    "a weight's gradient": lambda g, bad: g.grads.weights["head.bias"].__setitem__(1, bad),
    "a rule's gradient": lambda g, bad: g.grads.rule["lr"].fill_(bad),
    "the loss": lambda g, bad: g.loss.fill_(bad),
}


@every_engine
@pytest.mark.parametrize("clip_norm", [1.0, None])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_what_is_not_finite_is_skipped_and_changes_nothing(kind, spoil, bad, clip_norm):
    engine, never = (make(kind, clip_norm=clip_norm) for _ in range(2))
    for step in range(2):
        for one in (engine, never):
            one.apply(gradient(step), 1.0)
    before, sums = frozen(engine.save()), gradient(2)
    spoil(sums, bad)
    assert engine.apply(sums, 1.0).skipped == "not_finite"
    assert frozen(engine.save()) == before
    for one in (engine, never):
        assert one.apply(gradient(3), 1.0).skipped is None
    assert frozen(engine.save()) == frozen(never.save())


@every_engine
def test_a_step_of_weight_zero_is_skipped(kind):
    engine = make(kind)
    before = frozen(engine.save())
    assert engine.apply(gradient(0, size=0.0), 0).skipped == "not_finite"
    assert frozen(engine.save()) == before


@every_engine
@pytest.mark.parametrize("stop", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "options"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_was_saved_is_taken_up_exactly(kind, name, options, stop):
    own = options.get(name, {})
    whole = make(kind, optimizer=name, clip_norm=2.0, options=own)
    for step in range(stop):
        whole.apply(gradient(step), 1.0)
    saved = whole.save()
    kept = frozen(saved)
    other = make(kind, optimizer=name, clip_norm=2.0, options=own)
    for step in range(7, 9):  # state of its own, which has to go
        other.apply(gradient(step), 1.0)
    other.load(saved)
    assert frozen(other.save()) == kept
    for step in range(stop, 6):
        assert other.apply(gradient(step), 1.0) == whole.apply(gradient(step), 1.0)
    assert frozen(other.save()) == frozen(whole.save())
    assert frozen(saved) == kept, "neither engine writes to what was saved"


@every_engine
def test_what_is_saved_holds_the_meta_parameters_under_their_names(kind):
    engine = make(kind)
    saved, meta = engine.save(), engine.meta()
    for part, tensors in meta._asdict().items():
        for name, value in tensors.items():
            assert torch.equal(saved[f"{part}.{name}"], value)


@every_engine
def test_a_shape_or_name_that_is_not_the_models_is_refused_and_nothing_taken(kind):
    engine = make(kind)
    engine.apply(gradient(0), 1.0)
    saved, before = engine.save(), frozen(engine.save())
    wrong = {
        r"weights\.head\.bias has shape \(3,\); this model's has \(2,\)": {
            **saved,
            "weights.head.bias": torch.zeros(3),
        },
        r"rule\.lr has shape None": {name: value for name, value in saved.items() if name != "rule.lr"},
        r"weights\.tail\.bias belongs to no parameter": {**saved, "weights.tail.bias": torch.zeros(2)},
        r"optimizer\.exp_avg\.weights\.tail belongs": {**saved, "optimizer.exp_avg.weights.tail": torch.zeros(2)},
    }
    for message, tensors in wrong.items():
        with pytest.raises(ValueError, match=message):
            engine.load(tensors)
        assert frozen(engine.save()) == before


@every_engine
def test_an_unknown_optimizer_is_refused_with_the_nearest(kind):
    with pytest.raises(ValueError, match=r"'adamm': did you mean 'adam'\? known: .*sgd"):
        make(kind, optimizer="adamm")


WRONG_OPTIONS = {
    "optimizer_options has no key 'beta' for 'adam': did you mean 'betas'": ("adam", {"beta": 0.9}),
    "optimizer_options has no key 'maximize' for 'sgd'": ("sgd", {"maximize": True}),
    "optimizer_options has no key 'lr' for 'adam'": ("adam", {"lr": 0.1}),
    "optimizer_options.betas = [0.9]: must be two numbers from 0 to below 1": ("adam", {"betas": [0.9]}),
    "optimizer_options.betas = [0.9, 1.0]: must be two numbers from 0": ("adamw", {"betas": [0.9, 1.0]}),
    "optimizer_options.weight_decay = -0.1: must be a number 0 or more": ("adam", {"weight_decay": -0.1}),
    "optimizer_options.eps = 0: must be a number above 0": ("adam", {"eps": 0}),
    "optimizer_options.momentum = True: must be a number from 0 to below 1": ("sgd", {"momentum": True}),
    "optimizer_options.amsgrad = 1: must be true or false": ("adam", {"amsgrad": 1}),
    "optimizer_options.nesterov = true needs a momentum above 0, and no dampening": ("sgd", {"nesterov": True}),
    "optimizer_options.param_groups: all meta-parameters have one learning rate and one": (
        "adam",
        {"param_groups": []},
    ),
    "optimizer_options.no_decay: all meta-parameters have one learning rate": ("adamw", {"no_decay": ["*.bias"]}),
    "optimizer_options.groups: all meta-parameters have one learning rate": ("sgd", {"groups": {}}),
}


@every_engine
@pytest.mark.parametrize("message", WRONG_OPTIONS)
def test_a_wrong_option_of_an_optimizer_is_refused(kind, message):
    name, options = WRONG_OPTIONS[message]
    with pytest.raises(ValueError, match=re.escape(message)):
        make(kind, optimizer=name, options=options)


@every_engine
def test_an_engine_neither_shares_nor_writes_what_it_was_given(kind):
    given = start()
    engine = make(kind, given)
    sums = gradient(0)
    engine.apply(sums, 1.0)
    assert frozen(given.weights) == frozen(start().weights)
    assert frozen(given.rule) == frozen(start().rule)
    assert frozen(sums.grads.weights) == frozen(gradient(0).grads.weights)
    given.weights["head.bias"].fill_(7.0)
    assert not (engine.meta().weights["head.bias"] == 7.0).any()


@every_engine
def test_one_process_is_a_world_of_one(kind):
    engine = make(kind)
    assert (engine.rank, engine.world) == (0, 1)
    assert not any(value.requires_grad for value in values(engine.meta()))
