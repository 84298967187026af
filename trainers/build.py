"""Build the model, the inner loop and the learners from the settings."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import online_meta.learners
import trainers.engines
from online_meta import registry
from online_meta.batching.failures import TaskFailures
from online_meta.functional.model import ModelLoss, model_loss
from online_meta.inner import Inner
from online_meta.learners import LearnerContext, gather_single_process
from online_meta.registry import import_by_path
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.replay import ReplayPolicy, generator
from online_meta.types import (
    Batch,
    Engine,
    Learner,
    Meta,
    MetaGradient,
    Params,
    Prediction,
    ReplayBuffer,
    Schedule,
    State,
    Tensors,
)
from trainers import seams
from trainers.distributed.rank_stats import RankStats
from trainers.settings import InnerSettings, MetaSettings, ModelSettings, TrainerSettings

LOCAL = "local"


def build_module(model: ModelSettings, *seed: int) -> nn.Module:
    """Return the model with weights drawn by ``seed``; torch's own generator is left as it was.

    Raises ``ValueError`` when ``model.build`` or ``model.args`` are wrong.
    """
    builder = import_by_path(model.build)
    with torch.random.fork_rng(devices=[]):
        # Of a seed, torch uses the low 32 bits; the length sets (s,) apart from (s, 0), which NumPy takes for the same.
        torch.default_generator.manual_seed(int(generator(len(seed), *seed).integers(2**32)))
        try:
            module = builder(**model.args)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model.args {model.args} do not fit {model.build}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{model.build} returned a {type(module).__name__}, not a torch.nn.Module")
    return module


def build_loss(model: ModelSettings, module: nn.Module) -> ModelLoss:
    """Return the model's loss as a pure function; raises ``ValueError`` for an unknown loss, glob or row."""
    criterion = import_by_path(model.loss) if ":" in model.loss else model.loss
    dtype = None if model.precision == "float32" else getattr(torch, model.precision)
    return model_loss(
        module,
        criterion,
        random=model.random,
        recompute=model.recompute,
        precision=dtype,
        surrogate=model.surrogate,
        frozen_rows=model.frozen_rows,
    )


def build_inner(settings: InnerSettings, loss: ModelLoss) -> Inner:
    """Return the inner loop; raises ``ValueError`` for an unknown rule or option."""
    return Inner(loss, _build_one(seams.RULE, settings, lr=settings.lr), settings.steps, settings.fast)


def build_gradient(settings: MetaSettings, inner: Inner) -> MetaGradient:
    """Return the estimator of the meta-gradient; raises ``ValueError`` for an unknown one or option."""
    gradient: MetaGradient = _build_one(seams.GRADIENT, settings, inner)
    return gradient


def build_schedule(settings: MetaSettings) -> Schedule:
    """Return the schedule of the learning rate; raises ``ValueError`` for an unknown one or option."""
    schedule: Schedule = _build_one(seams.SCHEDULE, settings)
    return schedule


def build_replay(settings: MetaSettings) -> ReplayPolicy:
    """Return the replay policy; raises ``ValueError`` for an unknown one or option."""
    replay: ReplayPolicy = _build_one(seams.REPLAY, settings)
    return replay


def _build_one(seam: seams.Seam, section: Any, *arguments: Any, **provided: Any) -> Any:
    (choice,) = seams.list_choices(seam, section)
    return seams.build(seam, choice, *arguments, **provided)


def build_engine(settings: TrainerSettings, kind: str, rank_stats: RankStats | None = None) -> Callable[[Meta], Engine]:
    """Return a function that makes an engine of a ``kind`` for meta-parameters; ``rank_stats`` counts its waiting."""
    make = registry.load(trainers.engines, kind)

    def engine(meta: Meta) -> Engine:
        made: Engine = make(settings, meta, rank_stats)
        return made

    return engine


def build_context(
    settings: TrainerSettings,
    buffer: ReplayBuffer,
    programs: Path | None = None,
    engine: str = LOCAL,
    rank_stats: RankStats | None = None,
    gather: Callable[[Any], list[Any]] = gather_single_process,
    failures: TaskFailures | None = None,
) -> LearnerContext:
    """Return what all learners of the run share; compiled programs lie in the folder ``programs``.

    ``engine`` is the kind that steps meta-parameters: another than the local one is for the ranks of a run alone,
    while checks, comparators and replays are processes of their own. ``rank_stats`` counts its waiting for other ranks,
    ``gather`` is the set-up's.
    """
    registry.load(trainers.engines, settings.engine.kind)  # A wrong name is wrong in every process of a run.
    device = torch.device(settings.engine.device)
    module = build_module(settings.model, settings.seed).to(device)
    loss = build_loss(settings.model, module)
    inner = build_inner(settings.inner, loss)

    def draw_weights(key: int) -> Params:
        weights = build_module(settings.model, settings.seed, key).to(device).named_parameters()
        return {name: weight.detach() for name, weight in weights if name not in loss.frozen}

    return LearnerContext(
        inner=inner,
        gradient=build_gradient(settings.meta, inner),
        start=inner.init(dict(module.named_parameters())),
        draw_weights=draw_weights,
        engine=build_engine(settings, engine, rank_stats),
        replay=build_replay(settings.meta),
        batch=settings.meta.batch,
        steps_per_round=settings.meta.steps_per_round,
        seed=settings.seed,
        buffer=buffer,
        programs=programs,
        batching=settings.engine.batching,
        schedule=build_schedule(settings.meta),
        memory_limit=settings.engine.memory_limit,
        gather=gather,
        own_engine=_build_own_engine(settings, engine, rank_stats),
        failures=failures,
    )


def _build_own_engine(
    settings: TrainerSettings, kind: str, rank_stats: RankStats | None
) -> Callable[[Meta, str, float], Engine] | None:
    """Return a function that makes an engine which no setting of [meta] changes; None if baselines step as FTML."""
    if settings.regret.baseline_optimizer == "meta":
        return None

    def engine(meta: Meta, optimizer: str, lr: float) -> Engine:
        own = replace(settings, meta=MetaSettings(optimizer=optimizer, lr=lr))
        return build_engine(own, kind, rank_stats)(meta)

    return engine


class AnsweringLearner(NamedTuple):
    """The learner that answers in a run: its ``name``, and the ``suffix`` of the answer, such as "@10"."""

    name: str
    learner: Learner
    suffix: str

    def answer(self, state: State, support: Batch, x: Tensors) -> Prediction:
        """Return the prediction for ``x`` from a published state and a support set, as it is scored."""
        return self.learner.answers(state, support, x)[self.suffix]


def find_answering_name(settings: TrainerSettings) -> str:
    """Return the name of the learner that answers."""
    return (settings.answers or MAIN_LEARNER).partition("@")[0]


def build_answering_learner(settings: TrainerSettings, buffer: ReplayBuffer) -> AnsweringLearner:
    """Return the learner that answers, in its initial state.

    Raises ``ValueError`` if there is none of this name, or as ``build_learners`` does.
    """
    return find_answering_learner(settings, build_learners(settings, build_context(settings, buffer)))


def find_answering_learner(settings: TrainerSettings, learners: Mapping[str, Learner]) -> AnsweringLearner:
    """Return the one of a run's learners that answers. Raises ``ValueError`` if there is none of this name."""
    name = find_answering_name(settings)
    if name not in learners:
        raise ValueError(f"no learner is called {name!r}: {registry.nearest(name, learners)}")
    answers = settings.answers or name
    return AnsweringLearner(name, learners[name], answers.removeprefix(name))


def build_learners(settings: TrainerSettings, context: LearnerContext) -> dict[str, Learner]:
    """Return FTML and the configured baselines by name, FTML first.

    Raises ``ValueError`` for an unknown baseline, or options that it does not have.
    """
    choices = {choice.name: choice for choice in seams.list_choices(seams.BASELINES, settings.regret)}
    for name in choices:
        registry.load(online_meta.learners, name)
    main = choices.get(MAIN_LEARNER, seams.Choice(MAIN_LEARNER, {}, f"regret.options.{MAIN_LEARNER}"))
    chosen = (main, *(choices[name] for name in settings.regret.baselines))
    return {choice.name: seams.build(seams.BASELINES, choice, context) for choice in chosen}
