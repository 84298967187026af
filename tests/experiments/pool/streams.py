"""The streams of the table of the pool: the same tasks as in the tables of single learners, and what plays there."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import streams.sources
from online_meta import registry
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.types import Task
from tests.experiments.moml.__main__ import CHOSEN as DIGITS
from tests.experiments.moml.__main__ import STEPS as DIGIT_STEPS
from tests.experiments.moml.__main__ import make_settings as make_digit_settings
from tests.experiments.moml.__main__ import make_tasks as make_digits
from tests.experiments.non_stationary.runs import MOST, WINDOW
from tests.experiments.non_stationary.runs import STEPS as SINUSOID_STEPS
from tests.experiments.non_stationary.runs import STREAMS as NON_STATIONARY
from tests.experiments.pool.held_out import HSB_INPUTS, RATING_INPUTS, make_hsb, make_ratings
from tests.experiments.pool.runs import Stream
from tests.experiments.regression import runs as regression
from tests.experiments.regression.tuning import CHOSEN, get_choice
from trainers.settings import (
    AnswerRuleSettings,
    EngineSettings,
    InnerSettings,
    LearnerSettings,
    MetaSettings,
    ModelSettings,
    PoolSettings,
    RegretSettings,
    TrainerSettings,
)

LADDER = (0, 1, 2, 5, 10, 20)
"""The numbers of inner steps that learners answer after by default."""
LINEAR = ("constant", "ridge_head", "pooled_ridge")
"""The learners in closed form that play by default on regression with many inputs."""
PLAYED = ("train_on_everything", "ftl_fine_tune", "from_scratch", "online_reptile", "aruba")
"""The learners of the table of regression streams that play in addition to FTML: its best ones, and its references."""
RECENT = {"replay": "recent", "replay_options": {"window": WINDOW}}
"""FTML's replay of the newest rounds alone."""
BOOSTING = LearnerSettings(
    "sklearn",
    "gradient_boosting",
    options={"estimator": "sklearn.ensemble:HistGradientBoostingRegressor", "scope": "pooled", "reservoir": 5000},
)
"""Gradient boosting of all rows so far, with the default options of scikit-learn."""


def make_moml_settings(seed: int) -> TrainerSettings:
    """Return the settings of the pool on MOML's protocol: FTML leads, and each other learner has its own settings.

    FTML also answers after other numbers of steps, and by the 30 steps of Adam that *from scratch* makes.
    """
    base = make_digit_settings(MAIN_LEARNER, seed)
    lone: dict[str, Any] = {"answer_steps": [], "answer_rules": {}}
    others = [
        LearnerSettings(
            name,
            meta={"lr": DIGITS[name].outer},
            inner={"lr": DIGITS[name].inner, **lone},
            options=DIGITS[name].options,
        )
        for name in ("aruba", "c_maml", "from_scratch")
    ]
    closed = [LearnerSettings(name) for name in ("constant", "ridge_head", "logistic_head")]
    tuned = DIGITS["from_scratch"].options
    return replace(
        base,
        inner=replace(
            base.inner,
            answer_steps=tuple(k for k in (*LADDER, 50) if k != DIGIT_STEPS),
            answer_rules={"adam": AnswerRuleSettings((tuned["steps"],), tuned["lr"])},
        ),
        regret=replace(base.regret, baselines=(), options={}),
        learner=(LearnerSettings(MAIN_LEARNER), *others, *closed),
        pool=PoolSettings("auto"),
    )


def make_regression_settings(
    seed: int, name: str, inputs: int | None = None, more: Sequence[LearnerSettings] = ()
) -> TrainerSettings:
    """Return the settings on a regression stream: each learner has the settings of the table of regression streams.

    Args:
        seed: of the run.
        name: of the stream in that table.
        inputs: of the model, if they are others.
        more: learners that play as well.
    """
    base = regression.make_settings(regression.Entry(name, MAIN_LEARNER, 0, seed), get_choice(name, MAIN_LEARNER))
    others = []
    for label in CHOSEN[name]:
        if label not in PLAYED:
            continue
        kind, replay, options = regression.LEARNERS[label]
        own = get_choice(name, label)
        meta = {"lr": own.meta_lr, "optimizer": own.optimizer, "replay": replay, "replay_options": options}
        others.append(LearnerSettings(kind, label, meta=meta, inner={"lr": own.inner_lr}, options=own.options))
    closed = [LearnerSettings(kind) for kind in (*LINEAR, "last_value", "hierarchical_bayes")]
    return replace(
        base,
        model=replace(base.model, args={**base.model.args, **({"inputs": inputs} if inputs else {})}),
        inner=replace(base.inner, answer_steps=LADDER),
        regret=replace(base.regret, baselines=(), options={}, prefixes=()),
        learner=(LearnerSettings(MAIN_LEARNER), *others, *closed, *more),
        pool=PoolSettings("auto"),
    )


def find_static_loss(name: str, settings: TrainerSettings, tasks: list[Task], programs: Path) -> float:
    """Return the cumulative loss of the best fixed initialisation in hindsight of a linear model; see ``compare``."""
    alone = replace(settings, learner=(), pool=PoolSettings(), inner=replace(settings.inner, answer_steps=()))
    return float(regression.compare(programs, regression.STREAMS[name], alone, tasks)["static"])


def make_sinusoid_settings(seed: int) -> TrainerSettings:
    """Return the settings on streams that are not stationary: FTML with replay policies, and a mixture of leaders."""
    others = (
        LearnerSettings(MAIN_LEARNER, "recent", meta=RECENT),
        LearnerSettings(MAIN_LEARNER, "more_steps", meta={"steps_per_round": SINUSOID_STEPS * MOST}),
        LearnerSettings(
            "dp_mixture", "mixture", meta={"lr": 0.005}, inner={"answer_steps": []}, options={"most": MOST}
        ),
        LearnerSettings("train_on_everything"),
        LearnerSettings("from_scratch", options={"steps": 30, "lr": 0.03}),
        *(LearnerSettings(kind) for kind in (*LINEAR, "last_value", "hierarchical_bayes")),
    )
    return TrainerSettings(
        ModelSettings("trainers.models:mlp", {"inputs": 1, "outputs": 1, "hidden": [40, 40]}, loss="mse"),
        InnerSettings(steps=3, lr=0.02, answer_steps=LADDER),
        MetaSettings(lr=0.005, batch=5, steps_per_round=SINUSOID_STEPS),
        RegretSettings(comparator=(), baselines=()),
        EngineSettings(batching="traced"),
        seed=seed,
        learner=(LearnerSettings(MAIN_LEARNER), *others),
        pool=PoolSettings("auto"),
    )


def make_synthetic_tasks(name: str, seed: int, rounds: int) -> list[Task]:
    """Return the first tasks of a stream of the table of streams that are not stationary."""
    source, options = NON_STATIONARY[name]
    module = registry.load_module(streams.sources, source)
    return [module.make_task(module.Settings(**options), seed, t) for t in range(rounds)]


DEFAULTS = (MAIN_LEARNER, "from_scratch", *LINEAR, "hierarchical_bayes")
"""What plays by default on regression with few inputs."""


def _regress(about: str, name: str) -> Stream:
    return Stream(
        about,
        240,
        regression.STREAMS[name].make,
        partial(make_regression_settings, name=name),
        DEFAULTS,
        partial(find_static_loss, name) if regression.STREAMS[name].linear else None,
    )


def _hold_out(about: str, rounds: int, make: Callable[[int, int], list[Task]], inputs: int) -> Stream:
    settings = partial(make_regression_settings, name="schools_linear", inputs=inputs, more=(BOOSTING,))
    return Stream(about, rounds, make, settings, DEFAULTS)


def _drift(about: str, name: str) -> Stream:
    return Stream(about, 100, partial(make_synthetic_tasks, name), make_sinusoid_settings, DEFAULTS)


STREAMS: dict[str, Stream] = {
    "moml": Stream("Digits under a thousand transformations (MOML's protocol)", 1000, make_digits, make_moml_settings),
    "hsb": _hold_out("Held out: pupils of High School and Beyond", 158, make_hsb, HSB_INPUTS),
    "ratings": _hold_out("Held out: students who rate lecturers", 160, make_ratings, RATING_INPUTS),
    "schools_linear": _regress("Schools, linear model", "schools_linear"),
    "flights_linear": _regress("Flights, linear model", "flights_linear"),
    "flights": _regress("Flights, network", "flights"),
    "sinusoids": _regress("Sinusoids of drifting amplitude", "sinusoids"),
    "drifting": _drift("Drifting sinusoids", "drifting"),
    "recurring": _drift("Recurring families of functions", "recurring"),
    "heavy-tailed": _drift("Heavy-tailed functions", "heavy-tailed"),
}
