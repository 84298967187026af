"""The rows of the table of letters: each an algorithm, and how it is trained."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.experiments.common.algorithms import Algorithm
from tests.experiments.sinusoid_known_answers import ALGORITHMS as REGRESSION

WAYS = 5

EMBEDDING = "good embedding"
"""The name of the training that two rows share."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "MAML++ multi-step loss": {"gradient_options": {"step_weights": [0.2, 0.3, 0.5]}},
    "Reptile": {"lr": 0.1, "steps": 5, "optimizer": "sgd", "meta_lr": 0.5},
    "Reptile, inner Adam": {"lr": 0.003, "steps": 5, "optimizer": "sgd", "meta_lr": 0.3},
    "Meta-SGD": {"lr": 0.1},
    "LSLR, a rate a layer and step": {"options": {"per": "layer_and_step", "steps": 3}},
    "MT-net": {"how": "loop"},
    "iMAML": {
        "steps": 8,
        "options": {"strength": 0.3},
        "gradient_options": {"iterations": 1, "damping": 0.2},
    },
    "inner momentum": {"lr": 0.2},
    "inner Adam": {"lr": 0.01},
    "CAVIA": {"lr": 50.0},
}
"""Settings that differ from three inner steps of size 0.4 and Adam with 3e-3; chosen manually."""

HEADS = (
    Algorithm("nearest centroid", "Snell et al., 2017", "nearest_centroid", steps=0, batch=1, how="loop"),
    Algorithm("ridge regression", "Bertinetto et al., 2019", "ridge_head", steps=0, batch=1, how="loop"),
    Algorithm("logistic regression", "Lee et al., 2019", "logistic_head", steps=0, batch=4, how="traced"),
)
"""Features that are meta-learned for a head in closed form."""


@dataclass(frozen=True)
class Training:
    """Say on what a network is trained, and how.

    Attributes:
        filters: feature maps of each block of the network.
        pool: how a block halves the side of its maps.
        rate: the initial learning rate of an embedding's training.
        ways: letters of a training task. Other numbers than 5 need a rule that makes the head for each task.
        shots: support images per letter of a training task; None for those of the test tasks.
        queries: query images per letter of a training task.
        turns: quarter turns of each letter that count as further letters: 1 for none, 4 for all.
        anneal: whether the outer learning rate falls to 0, along half a cosine.
        learned: initial values of the rule's learned parameters, by name, where they are not its defaults.
        tuned: whether the settings were chosen on validation scripts.
    """

    filters: int = 32
    pool: str = "stride"
    rate: float = 3e-3
    ways: int = WAYS
    shots: int | None = None
    queries: int = 5
    turns: int = 1
    anneal: bool = False
    learned: dict[str, float] = field(default_factory=dict)
    tuned: bool = False


class Plan(NamedTuple):
    """What is trained, and how; the embedding has no ``algorithm``."""

    algorithm: Algorithm | None
    training: Training


MANY_LETTERS = {"filters": 64, "shots": 1, "ways": 60, "queries": 2, "meta_lr": 3e-3}

CHOSEN: dict[str, dict[str, Any]] = {
    EMBEDDING: {"pool": "max", "rate": 2e-3},
    "nearest centroid": {**MANY_LETTERS, "learned": {"log_scale": -3.0}},
    "ridge regression": MANY_LETTERS,
}
"""Settings that did best on validation scripts, of the algorithm and of its training."""


def list_plans() -> dict[str, Plan]:
    """Return what the table trains, with the settings that were chosen on validation scripts where they were."""
    return {
        name: change(plan, {**CHOSEN[name], "tuned": True}) if name in CHOSEN else plan
        for name, plan in list_untuned_plans().items()
    }


def list_untuned_plans() -> dict[str, Plan]:
    """Return the embedding, heads in closed form, and the algorithms of the sinusoid table, with default settings."""
    plans = {EMBEDDING: Plan(None, Training())}
    plans |= {head.label: Plan(head, Training(anneal=True)) for head in HEADS}
    for algorithm in REGRESSION:
        common: dict[str, Any] = {"lr": 0.4, "steps": 3, "meta_lr": 3e-3, "batch": 4, "how": "traced"}
        settings = {**common, **OVERRIDES.get(algorithm.label, {})}
        plans[algorithm.label] = Plan(dataclasses.replace(algorithm, **settings), Training())
    return plans


def change(plan: Plan, settings: dict[str, Any]) -> Plan:
    """Return the plan with other ``settings``, each by the name of its field.

    Raises ``TypeError`` for a name that is no field.
    """
    of_training = {field.name for field in dataclasses.fields(Training)} & settings.keys()
    training = dataclasses.replace(plan.training, **{name: settings[name] for name in of_training})
    rest = {name: value for name, value in settings.items() if name not in of_training}
    if not rest:
        return Plan(plan.algorithm, training)
    if plan.algorithm is None:
        raise TypeError(f"the embedding has no {', '.join(sorted(rest))}")
    return Plan(dataclasses.replace(plan.algorithm, **rest), training)
