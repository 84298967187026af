"""Algorithms that every engine must learn equally, and a run of each over a short stream in single precision."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from torch.utils._pytree import tree_map

import online_meta as om
from online_meta.learners.ftml import FollowTheMetaLeader, build
from online_meta.testing.learner_problems import STEPS, net, setup, stream, weights_of
from online_meta.types import Engine
from trainers.loop.batching_plan import select_plans
from trainers.settings import EngineSettings, MetaSettings, ModelSettings, TrainerSettings

ROUNDS, STEPS_PER_ROUND, BATCH = 10, 2, 5


class Case(NamedTuple):
    """An algorithm and how its mean gradient is clipped."""

    rule: str
    gradient: str
    clip_norm: float | None
    optimizer: str = "adam"
    options: Mapping[str, object] = MappingProxyType({})
    posterior: str = "point"


CASES = {
    "maml": Case("sgd", "exact", None),
    "maml clipped": Case("sgd", "exact", 0.05),
    "first order": Case("sgd", "first_order", None),
    "reptile": Case("sgd", "reptile", None),
    "meta-sgd": Case("meta_sgd", "exact", None),
    "meta-sgd clipped": Case("meta_sgd", "exact", 0.05),
    "nadam": Case("sgd", "exact", 1.0, "nadam"),
    "adagrad": Case("sgd", "exact", 1.0, "adagrad"),
    "rmsprop": Case("sgd", "exact", 1.0, "rmsprop"),
    "sgd": Case("sgd", "exact", 1.0, "sgd"),
    "adamw with options": Case(
        "sgd", "exact", 1.0, "adamw", {"betas": [0.8, 0.9], "weight_decay": 0.5, "eps": 1e-4, "amsgrad": True}
    ),
    "sgd with momentum": Case("sgd", "exact", 1.0, "sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
}
"""Clipping to 0.05 affects every step."""
IN_ORDER = {"maml": CASES["maml"], "abml": Case("bayes_by_gradient", "exact", None, posterior="samples")}
"""Those that deterministic ranks learn with the same bits, one of which draws."""


def single(tree):
    return tree_map(lambda leaf: leaf.float(), tree)


def settings(case: Case, kind: str, **engine: object) -> TrainerSettings:
    return TrainerSettings(
        ModelSettings("trainers.models:mlp"),
        meta=MetaSettings(
            optimizer=case.optimizer, optimizer_options={**case.options}, lr=0.01, clip_norm=case.clip_norm
        ),
        engine=EngineSettings(kind=kind, **engine),
    )


def learner(case: Case, engine: Callable[[om.Meta], Engine]) -> FollowTheMetaLeader:
    """Return a learner of ``case`` with ``engine``; in its first meta-steps most ranks have no task."""
    module = net().float()
    rule, posterior = getattr(om.rules, case.rule)(lr=0.05), getattr(om.posteriors, case.posterior)()
    inner = om.Inner(om.model_loss(module, "mse"), rule, STEPS, posterior=posterior)
    context = replace(
        setup(inner=inner, gradient=getattr(om, case.gradient)(inner), engine=engine),
        start=inner.init(weights_of(module)),
        batch=BATCH,
        steps_per_round=STEPS_PER_ROUND,
    )
    return build(context)


def play(one: FollowTheMetaLeader, rounds: range = range(ROUNDS)) -> list[tuple[float, str | None]]:
    """Learn the given rounds of the stream; return the report of every meta-step."""
    reports = []
    tasks = [single(task) for task in stream(rounds.stop)]
    for task in tasks[rounds.start :]:
        one.score(task)
        reports += [tuple(report) for report in one.learn(task).steps]
    return reports


def follow_plans(one: FollowTheMetaLeader, world: int) -> None:
    """Let a learner follow the plans that deterministic ranks choose for recorded programs."""
    made = settings(CASES["maml"], "deepspeed", deterministic=True, batching="traced")
    selector = select_plans(made, {"ftml": one}, Path("programs"), world)
    selector.follow(selector.find({}, [single(next(iter(stream(1))))]))
    assert [(plan.batching, plan.tasks) for plan in one.task_sum.plans.values()] == [("traced", 1)]
