"""Build the model, the inner loop and the learners from the settings."""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import online_meta.learners
import online_meta.posteriors
import trainers.engines
from online_meta import registry
from online_meta.aggregation._clipping import Clipping
from online_meta.answers import Answers
from online_meta.batching.failures import TaskFailures
from online_meta.batching.programs import Programs
from online_meta.functional.model import ModelLoss, model_loss
from online_meta.functional.recording import SLOW_CALL, Recorder
from online_meta.functional.stateless import NOT_KEPT, KeptWeights
from online_meta.inner import AnswerRule, Inner
from online_meta.learners import FunctionalLearner, LearnerContext, ParameterLearner, gather_single_process
from online_meta.learners.pool import Pool, choose_aggregation, find_mixing
from online_meta.registry import import_by_path
from online_meta.regret.scoring import ScoredLearner
from online_meta.replay import ReplayPolicy, generator
from online_meta.replay._task_draw import TaskDraw
from online_meta.types import (
    Batch,
    Engine,
    InnerRule,
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
from streams.types import Rejected
from trainers import seams
from trainers.distributed.rank_stats import RankStats
from trainers.learner_settings import (
    POOL,
    find_player,
    find_repeated_names,
    has_pool,
    list_learners,
    list_players,
    override_settings,
    steps_by_meta,
)
from trainers.settings import (
    AnswerRuleSettings,
    EngineSettings,
    InnerSettings,
    LearnerSettings,
    MetaSettings,
    ModelSettings,
    TrainerSettings,
)
from trainers.shared_weights import build_in, share_frozen_weights

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


def build_model(settings: TrainerSettings) -> tuple[nn.Module, ModelLoss]:
    """Return the model and its loss on the device of the run; shared frozen weights stay in the host's memory.

    Raises ``ValueError`` as ``build_module`` and ``build_loss`` do, or if frozen weights cannot be shared.
    """
    folder, kept = settings.engine.frozen_folder, NOT_KEPT
    if folder and not settings.model.recompute:
        raise ValueError(
            f"[engine] frozen_folder = {folder!r} needs [model] recompute: it names the layers that read their frozen "
            "weights one after another, such as recompute = ['body.*']"
        )
    with build_in(folder):
        module = build_module(settings.model, settings.seed)
    if folder:
        kept = share_frozen_weights(module, folder)
    if kept.tensors:
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if name not in kept.tensors:
                value.data = value.data.to(settings.engine.device)
    else:
        module.to(settings.engine.device)
    return module, build_loss(settings.model, module, kept)


def build_loss(model: ModelSettings, module: nn.Module, kept: KeptWeights = NOT_KEPT) -> ModelLoss:
    """Return the model's loss as a pure function; raises ``ValueError`` for an unknown loss, glob or row."""
    criterion = import_by_path(model.loss) if ":" in model.loss else model.loss
    dtype = None if model.precision == "float32" else getattr(torch, model.precision)
    loss = model_loss(
        module,
        criterion,
        loss_options=model.loss_options,
        random=model.random,
        recompute=model.recompute,
        precision=dtype,
        surrogate=model.surrogate,
        frozen_rows=model.frozen_rows,
        output=model.output,
        kept=kept,
    )
    return replace(loss, masks=model.masks)


def build_inner(settings: InnerSettings, loss: ModelLoss, seed: int = 0) -> Inner:
    """Return the inner loop, which draws by ``seed``; raises ``ValueError`` for an unknown rule or option."""
    return Inner(
        loss,
        _build_one(seams.RULE, settings, lr=settings.lr),
        settings.steps,
        settings.fast,
        posterior=_build_one(seams.POSTERIOR, settings),
        samples=settings.samples,
        answer_steps=settings.answer_steps,
        seed=seed,
        begin=settings.begin,
        answer_heads=settings.answer_heads,
        answer_rules=tuple(_build_answer_rule(name, own) for name, own in settings.answer_rules.items()),
    )


def _build_answer_rule(name: str, own: AnswerRuleSettings) -> AnswerRule:
    place = f"inner.answer_rules.{name}.options"
    rule: InnerRule = seams.build(seams.RULE, seams.Choice(own.rule or name, own.options, place), lr=own.lr)
    return AnswerRule(name, rule, own.steps)


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


def build_draw(settings: MetaSettings) -> TaskDraw:
    """Return the samples that are drawn of a revisited task."""
    return TaskDraw(settings.support_samples, settings.query_samples)


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


def share_programs(folder: Path, settings: EngineSettings) -> Programs:
    """Return a run's folder of compiled programs, with the cache that it shares with other runs."""
    return Programs(folder, Path(settings.programs).expanduser() if settings.programs else None)


def build_context(
    settings: TrainerSettings,
    buffer: ReplayBuffer,
    programs: Path | None = None,
    engine: str = LOCAL,
    rank_stats: RankStats | None = None,
    gather: Callable[[Any], list[Any]] = gather_single_process,
    failures: TaskFailures | None = None,
) -> LearnerContext:
    """Return what all learners of the run share; compiled programs are in the folder ``programs``, and in the cache.

    ``engine`` is the kind that steps meta-parameters: another than the local one is for the ranks of a run alone,
    while checks, comparators and replays are processes of their own. ``rank_stats`` counts its waiting for other ranks,
    ``gather`` is the set-up's.
    """
    registry.load(trainers.engines, settings.engine.kind)  # A wrong name is wrong in every process of a run.
    device = torch.device(settings.engine.device)
    module, loss = build_model(settings)
    inner = build_inner(settings.inner, loss, settings.seed)

    def draw_weights(key: int) -> Params:
        with build_in(settings.engine.frozen_folder):
            weights = build_module(settings.model, settings.seed, key).named_parameters()
        return {name: weight.detach().to(device) for name, weight in weights if name not in loss.frozen}

    return LearnerContext(
        inner=inner,
        gradient=build_gradient(settings.meta, inner),
        start=inner.init(dict(module.named_parameters())),
        draw_weights=draw_weights,
        engine=build_engine(settings, engine, rank_stats),
        replay=build_replay(settings.meta),
        draw=build_draw(settings.meta),
        pad_sizes=settings.engine.pad_sizes,
        batch=settings.meta.batch,
        steps_per_round=settings.meta.steps_per_round,
        seed=settings.seed,
        buffer=buffer,
        programs=None if programs is None else share_programs(programs, settings.engine),
        batching=settings.engine.batching,
        schedule=build_schedule(settings.meta),
        memory_limit=settings.engine.memory_limit,
        gather=gather,
        own_engine=_build_own_engine(settings, engine, rank_stats),
        failures=failures,
        global_labels=settings.global_labels,
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


SLOW_ANSWER = 10 * SLOW_CALL
"""An answer that takes longer is not recorded; one of many small steps may take as long as one of large operations."""


class AnsweringLearner(NamedTuple):
    """The learner that answers in a run: its ``name``, and the ``suffix`` of the answer, such as "@10".

    ``recorded`` computes what the learner's ``answers`` does, to the bit; None to call these.
    """

    name: str
    learner: Learner
    suffix: str
    recorded: Answers | None = None

    def answer(self, state: State, support: Batch, x: Tensors, samples: int | None = None) -> Prediction:
        """Return the prediction for ``x`` from a published state and a support set, as it is scored.

        Args:
            state: what the learner has published.
            support: the support set.
            x: the inputs.
            samples: of a belief, in place of the run's number; None for that.

        Raises:
            Rejected: with the reason "fixed_samples", if ``samples`` is given and the number of samples is fixed.
        """
        answers = self.recorded or self.learner.answers
        if samples is not None:
            drawn = draw_answers(self.learner, samples)
            if drawn is None:
                raise Rejected(
                    "fixed_samples",
                    f"{self.name} cannot answer with {samples} samples: its number of samples is fixed, as with "
                    "[inner] posterior = 'point' or 'particles'; leave samples out, or answer by a learner that draws, "
                    "with posterior = 'samples' or 'laplace'",
                )
            answers = drawn
        return answers(state, support, x)[self.suffix]

    def record(self, executor: Executor) -> "AnsweringLearner":
        """Return the same learner, whose answers are recorded as programs by an executor's thread; see ``Recorder``."""
        return self._replace(recorded=record_answers(self.learner, executor))


FIXED_POSTERIORS = "point", "particles"
"""Posteriors with a fixed number of samples."""


def draw_answers(learner: Learner, samples: int) -> Answers | None:
    """Return a learner's ``answers`` with beliefs of another number of samples; None if the number is fixed.

    The experts of a pool that have a fixed number answer with it.
    """
    if isinstance(learner, Pool):
        drawn = {name: draw_answers(one, samples) for name, one in learner.experts.items()}
        if not any(drawn.values()):
            return None
        return partial(learner.mix_answers_of, {n: drawn[n] or one.answers for n, one in learner.experts.items()})
    fixed = [registry.load(online_meta.posteriors, name)() for name in FIXED_POSTERIORS]
    if not isinstance(learner, ParameterLearner) or learner.inner.posterior in fixed:
        return None
    other = copy(learner)
    other.inner = replace(learner.inner, samples=samples)
    return other.answers


def record_answers(learner: Learner, executor: Executor) -> Answers:
    """Return a learner's ``answers``, recorded by an executor's thread; those that draw numbers are called."""
    if isinstance(learner, Pool):
        return partial(
            learner.mix_answers_of, {name: record_answers(one, executor) for name, one in learner.experts.items()}
        )
    if isinstance(learner, FunctionalLearner):
        return learner.answers if learner.draws_numbers() else _record_from_begin(learner, executor)
    if not isinstance(learner, ScoredLearner) or learner.draws_numbers():
        return learner.answers
    return Recorder(learner.answers, slow=SLOW_ANSWER, executor=executor)


def _record_from_begin(learner: FunctionalLearner, executor: Executor) -> Answers:
    """Record what follows the beginning of an answer, which may be drawn."""
    recorded = Recorder(learner.answers_from, slow=SLOW_ANSWER, executor=executor)
    return lambda state, support, x: recorded(learner.begin(state, support), support, x)


def build_answering_learner(settings: TrainerSettings, buffer: ReplayBuffer) -> AnsweringLearner:
    """Return the learner that answers, in its initial state.

    Raises ``ValueError`` if there is none of this name, or as ``build_learners`` does.
    """
    name, context = find_player(settings, settings.answers), build_context(settings, buffer)
    if name == POOL and has_pool(settings):
        return find_answering_learner(settings, build_learners(settings, context))
    at = [learner.name for learner in list_learners(settings)].index(name)
    return find_answering_learner(settings, {name: build_learner(settings, at, context)})


def find_answering_learner(settings: TrainerSettings, learners: Mapping[str, Learner]) -> AnsweringLearner:
    """Return the one of a run's learners that answers. Raises ``ValueError`` if there is none of this name."""
    name = find_player(settings, settings.answers)
    return AnsweringLearner(name, learners[name], (settings.answers or name).removeprefix(name))


def build_learners(
    settings: TrainerSettings, context: LearnerContext, make_engines: "MakeEngines | None" = None
) -> dict[str, Learner]:
    """Return the learners of the run by name, the leading one first, and the pool last.

    Args:
        settings: of the run.
        context: what ``build_context`` made of the same settings.
        make_engines: makes the engines of learners with settings of their own; by default, local ones.

    Raises:
        ValueError: for an unknown learner, options that it does not have, or a name that two learners have.
    """
    for choice in seams.list_choices(seams.BASELINES, settings.regret):
        registry.load(online_meta.learners, choice.name)
    learners = list_learners(settings)
    for name in find_repeated_names(list_players(settings)):
        raise ValueError(f"two learners are called {name!r}: give one another name")
    made = {one.name: build_learner(settings, at, context, make_engines) for at, one in enumerate(learners)}
    return {**made, POOL: build_pool(settings, made, context)} if has_pool(settings) else made


def build_pool(settings: TrainerSettings, learners: Mapping[str, Learner], context: LearnerContext) -> Pool:
    """Return the pool of the run's learners, those without ``shadow``.

    Raises ``ValueError`` for an unknown aggregation, options that do not fit, or if the leading learner is a shadow.
    """
    own = settings.pool
    leading, *others = list_learners(settings)
    if leading.shadow:
        raise ValueError(f"{leading.name!r} leads, so it cannot be a shadow: name another learner first")
    experts = {one.name: learners[one.name] for one in (leading, *others) if not one.shadow}
    mixing = find_mixing(context.inner.loss)
    clipping = Clipping(own.clip_quantile, own.clip_factor, own.clip_rounds)
    aggregation = choose_aggregation(mixing, own.aggregation, own.options, clipping)
    return Pool(experts, aggregation, mixing, seed=settings.seed, gather=context.gather)


def build_learner(
    settings: TrainerSettings, at: int, context: LearnerContext, make_engines: "MakeEngines | None" = None
) -> Learner:
    """Return the learner number ``at`` of ``list_learners(settings)``; see ``build_learners``."""
    chosen = list_learners(settings)[at]
    own = override_context(settings, chosen, context, make_engines or make_local_engines)
    if own.own_engine is not None and steps_by_meta(chosen, leads=at == 0):
        own = replace(own, own_engine=None)
    place = f"learner {chosen.name!r} options" if at < len(settings.learner) else f"regret.options.{chosen.name}"
    learner: Learner = seams.build(seams.LEARNERS, seams.Choice(chosen.kind, chosen.options, place), own)
    return learner


MakeEngines = Callable[[TrainerSettings], Callable[[Meta], Engine]]
"""Settings of a learner -> a function that makes its engines."""


def make_local_engines(settings: TrainerSettings) -> Callable[[Meta], Engine]:
    """Return a function that makes engines of this process alone."""
    return build_engine(settings, LOCAL)


def override_context(
    settings: TrainerSettings,
    learner: LearnerSettings,
    context: LearnerContext,
    make_engines: MakeEngines = make_local_engines,
) -> LearnerContext:
    """Return the context with what a learner's own settings change; the model and its loss are shared."""
    own = override_settings(settings, learner)
    if own is settings:
        return context
    assert isinstance(context.inner.loss, ModelLoss)
    inner = build_inner(own.inner, context.inner.loss, settings.seed)
    return replace(
        context,
        inner=inner,
        gradient=build_gradient(own.meta, inner),
        start=inner.init(context.start.weights),
        engine=make_engines(own),
        replay=build_replay(own.meta),
        draw=build_draw(own.meta),
        batch=own.meta.batch,
        steps_per_round=own.meta.steps_per_round,
        schedule=build_schedule(own.meta),
    )
