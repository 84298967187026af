"""Learners are built from settings: the error for each mistake, and the seeds of random weights."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import online_meta
from online_meta.learners import MemoryReplayBuffer
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.replay import ReplayRequest, ReplaySample
from online_meta.testing.learner_problems import frozen
from tests.support.runs import SETTINGS, WAYS, changed, task
from trainers.build import build_context, build_learners, build_module, import_by_path
from trainers.settings import ModelSettings

MODEL = SETTINGS.model


def not_a_module(**args):
    """Return something that is not a module."""
    return dict(args)


def mean_error(output, y):
    """Return a custom loss: the mean absolute error."""
    return (output.squeeze(-1) - y).abs().mean()


def build(settings):
    return build_learners(settings, build_context(settings, MemoryReplayBuffer()))


def model(**keys):
    return {"model": keys}


MISTAKES = {
    "rule": ({"inner": {"rule": "sgdd"}}, r"online_meta\.rules has no 'sgdd': did you mean 'sgd'\?"),
    "gradient": ({"meta": {"gradient": "firstorder"}}, r"has no 'firstorder': did you mean 'first_order'\?"),
    "replay": ({"meta": {"replay": "unifrom"}}, r"online_meta\.replay has no 'unifrom': did you mean 'uniform'\?"),
    "engine": ({"engine": {"kind": "locl"}}, r"trainers\.engines has no 'locl': did you mean 'local'\?"),
    "optimizer": ({"meta": {"optimizer": "adams"}}, r"no optimizer is called 'adams': did you mean 'adam'\?"),
    "baseline": ({"regret": {"baselines": ("from_scratsh",)}}, r"has no 'from_scratsh': did you mean 'from_scratch'\?"),
    "options of no baseline": (
        {"regret": {"options": {"from_scratsh": {"steps": 2}}}},
        r"online_meta\.learners has no 'from_scratsh': did you mean 'from_scratch'\?",
    ),
    "option of a baseline": (
        {"regret": {"options": {"from_scratch": {"step": 2}}}},
        r"regret\.options\.from_scratch = \{'step': 2\} do not fit 'from_scratch': .*'step'",
    ),
    "option of a baseline that has none": (
        {"regret": {"options": {"train_on_everything": {"momentum": 2}}}},
        r"regret\.options\.train_on_everything = .* do not fit 'train_on_everything': .*'momentum'",
    ),
    "option of a rule": (
        {"inner": {"options": {"momentum": 0.9}}},
        r"inner\.options = \{'momentum': 0\.9\} do not fit 'sgd': .*'momentum'",
    ),
    "fast": ({"inner": {"fast": ("head.*",)}}, r"fast = 'head\.\*' matches none of the weights \['1\.bias'"),
    "loss": (model(loss="crossentropy"), r"no loss is called 'crossentropy': did you mean 'cross_entropy'\?"),
    "path of a loss": (
        model(loss="tests.trainers.test_build:mean_eror"),
        r"has no 'mean_eror': did you mean mean_error",
    ),
    "no path": (model(build="conv4"), r"'conv4' is no import path: write it as 'package\.module:name'"),
    "path without a name": (model(build="trainers.models:"), r"'trainers\.models:' is no import path"),
    "path without a module": (model(build=":conv4"), r"':conv4' is no import path"),
    "module": (model(build="trainers.model:conv4"), r"'trainers\.model:conv4' cannot be imported: No module named"),
    "function": (model(build="trainers.models:conv"), r"trainers\.models has no 'conv': did you mean conv4"),
    "argument": (
        model(args={"inputs": 2, "outputz": 3}),
        r"model\.args .*'outputz': 3.* do not fit trainers\.models:mlp: ",
    ),
    "argument's value": (
        {"model": {"build": "trainers.models:conv4", "args": {"filters": 6, "groups": 4}}},
        r"model\.args .*'groups': 4.* do not fit trainers\.models:conv4: num_channels",
    ),
    "result": (
        {"model": {"build": "tests.trainers.test_build:not_a_module"}},
        r"test_build:not_a_module returned a dict, not a torch\.nn\.Module",
    ),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_each_mistake_is_reported_with_a_suggestion(changes, message):
    with pytest.raises(ValueError, match=message):
        build(changed(SETTINGS, **changes))


def test_learners_are_ftml_and_the_baselines_in_their_order():
    assert list(build(SETTINGS)) == [MAIN_LEARNER, "train_on_everything", "from_scratch"]
    assert list(build(changed(SETTINGS, regret={"baselines": ()}))) == [MAIN_LEARNER]


def test_every_setting_reaches_the_learner_context():
    settings = changed(
        SETTINGS,
        inner={"steps": 4, "fast": ("1.*",)},
        meta={
            "gradient": "reptile",
            "replay": "recent",
            "replay_options": {"window": 20},
            "batch": 30,
            "steps_per_round": 3,
        },
    )
    settings, buffer = replace(settings, seed=8), MemoryReplayBuffer()
    setup = build_context(settings, buffer)
    assert (setup.inner.steps, setup.inner.fast) == (4, ("1.*",))
    assert (setup.batch, setup.steps_per_round, setup.seed) == (30, 3, 8)
    assert setup.buffer is buffer
    assert setup.replay.sample({}, ReplayRequest(0, 99, 0, range(100), 30)) == [
        ReplaySample(round) for round in range(80, 100)
    ]
    one = task(0)
    found, right = setup.gradient(setup.start, one), online_meta.reptile(setup.inner)(setup.start, one)
    assert frozen(found.grads.weights) == frozen(right.grads.weights)
    assert frozen(setup.start.weights) == frozen(dict(build_module(settings.model, 8).named_parameters()))


def test_a_loss_can_be_a_custom_function():
    args = {"inputs": 2, "outputs": 1}
    settings = changed(SETTINGS, model={"args": args, "loss": "tests.trainers.test_build:mean_error"})
    setup, one = build_context(settings, MemoryReplayBuffer()), task(0)
    output = build_module(settings.model, 0)(one.query.x)
    assert torch.equal(setup.inner.loss(setup.start.weights, one.query), mean_error(output, one.query.y))


def test_an_import_path_names_any_attribute():
    assert import_by_path("torch.nn:Linear") is nn.Linear


def draw(*seed, settings=MODEL):
    return str(frozen(dict(build_module(settings, *seed).named_parameters())))


def test_random_weights_are_a_function_of_the_seed_alone():
    right = draw(3, 4)
    torch.manual_seed(12)
    assert draw(3, 4) == right
    torch.rand(5)
    assert draw(3, 4) == right


NUMBERS = [0, 1, 2, 7, 12, 100, 1234, 1235, 12340, 12345, 12346, 2**16, 2**31, 2**32 - 1]


def test_no_two_seeds_or_rounds_have_the_same_weights():
    """This includes seeds that are adjacent and seeds that share leading or trailing digits or bits."""
    seeds = [(seed,) for seed in NUMBERS] + [(seed, round) for seed in NUMBERS for round in NUMBERS]
    assert len({draw(*seed) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("seed", [2**32, 2**40 + 1, 2**63])
def test_large_seeds_draw_distinct_weights_too(seed):
    seeds = [(0,), (1,), (seed,), (seed + 1,), *((seed, round) for round in NUMBERS)]
    assert len({draw(*seed) for seed in seeds}) == len(seeds)


def test_drawing_weights_leaves_torchs_global_generator_unchanged():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_module(MODEL, 1)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="do not fit"):
        build_module(ModelSettings(MODEL.build, {"wrong": 1}), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_fresh_weights_are_a_function_of_seed_and_round():
    def draw_weights(seed):
        return build_context(replace(SETTINGS, seed=seed), MemoryReplayBuffer()).draw_weights

    found = {(seed, round): str(frozen(draw_weights(seed)(round))) for seed in (0, 1) for round in range(40)}
    start = str(frozen(build_context(SETTINGS, MemoryReplayBuffer()).start.weights))
    assert len({*found.values(), start}) == 81
    assert all(str(frozen(draw_weights(seed)(round))) == found[seed, round] for seed, round in ((0, 0), (1, 39)))
    assert not any(weight.requires_grad for weight in draw_weights(0)(0).values())


def test_from_scratch_applies_its_options():
    one = task(1)
    scores = set()
    for options in ({"steps": 2}, {"steps": 3}, {"steps": 2, "lr": 0.1}, {"steps": 0}):
        learners = build(changed(SETTINGS, regret={"options": {"from_scratch": options}}))
        scores.add(learners["from_scratch"].score(one).loss_after)
    assert len(scores) == 4


def test_a_model_has_as_many_outputs_as_its_settings_ask_for():
    assert build_module(MODEL, 0)(torch.zeros(5, 2)).shape == (5, WAYS)
