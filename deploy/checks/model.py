"""Check on a synthetic task, before the first round, that a model can be meta-learned."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from deploy.config.config import Config
from deploy.config.learner_tables import label_learner
from deploy.exits import ConfigError
from deploy.telemetry.run_view import Scored
from online_meta import registry
from online_meta.batches import count_samples, from_named, map_tensors, name_tensors
from online_meta.batching.padding import explain_inexact, measure, pad_task
from online_meta.functional.guard import describe
from online_meta.functional.model import ModelLoss, explain_mixed_samples, find_misfits, find_unfaithful_outputs
from online_meta.learners import LearnerContext
from online_meta.metagrads.first_order import first_order
from online_meta.outcomes import LossFunction, describe_shape
from online_meta.preflight.preflight import NO_DEPENDENCE, preflight
from online_meta.regret.scoring import answer_task, score_answers
from online_meta.types import (
    Batch,
    Component,
    Engine,
    Learner,
    Meta,
    MetaGrad,
    Outcome,
    Prediction,
    State,
    Task,
    Tensors,
)
from streams.spec import DYNAMIC, InputSpec, TargetSpec, TaskSpec
from trainers.build import build_learner, build_learners, build_model, build_module, build_pool, override_context
from trainers.comparators import load_comparator
from trainers.learner_settings import POOL, has_pool, list_learners, override_settings
from trainers.memory_estimate import MemoryEstimate, estimate_memory
from trainers.settings import InnerSettings, LearnerSettings, TrainerSettings
from trainers.shared_weights import build_in

SAMPLES = 4


TASKS = 2


OPEN_SIZE = 32
"""Size of each open dimension (-1) in a synthetic task."""


FIRST_DERIVATIVES = ("first_order", "reptile", "supervised")
"""Estimators without second derivatives, for which a model's second derivatives need not be correct."""


def check_model(config: Config, context: LearnerContext, remarks: bool) -> tuple[str, ...]:
    """Check the configured model on synthetic tasks.

    Args:
        config: of the run.
        context: of the learners, with the model's loss and initial weights.
        remarks: whether to include minor remarks in the notes.

    Returns:
        Notes on the model under meta-gradients, one sentence each.

    Raises:
        ConfigError: if the model or its loss cannot be meta-learned on the configured tasks.
    """
    device = torch.device(config.engine.device)
    tasks = [make_synthetic_task(config.task, device, seed) for seed in range(TASKS)]
    with _model_error_context(config):
        assert isinstance(context.inner.loss, ModelLoss)
        output = context.inner.loss.output(context.start.weights, tasks[0].query.x)
        _check_output(config, output, context.inner.loss.outcome, tasks[0].query)
        gradient = _try_gradient(context, tasks[0])
        if isinstance(gradient, MetaGrad):
            _check_finite(config, gradient)
        second = config.meta.gradient not in FIRST_DERIVATIVES
        with _compared_loss(config) as loss:
            inner = replace(context.inner, loss=loss)
            report = preflight(inner, context.start, tasks, second=second, remarks=remarks)
        problems = [problem for problem in report.problems if problem != NO_DEPENDENCE]
        if problems:
            raise ConfigError(f"[model] {config.model.build}: {'; '.join(problems)}")
        if isinstance(gradient, Exception):
            raise _name_cause(config, context, tasks[0], gradient)
        _check_gradient(config, gradient, context.gradient(context.start, tasks[0]))
        for kind in config.regret.comparator:
            _check_comparator(kind, context, tasks[0], config.regret.comparator_options.get(kind, {}))
        padding = _check_padding(config, context, tasks[0])
    return (*report.notes, *padding)


def _check_padding(config: Config, context: LearnerContext, task: Task) -> list[str]:
    """Return notes on why tasks will not be padded. Raises ``ConfigError`` if they are to be padded and cannot be."""
    masks, inputs = config.model.masks, config.task.inputs()
    for name in (*masks, *masks.values()):
        if name not in inputs:
            raise ConfigError(
                f"[model] masks names {name!r}, which is no input of [task.x]: {registry.nearest(name, inputs)}"
            )
    sizes = measure(task, masks)
    longer = pad_task(task, (*sizes[:2], *(length + 3 for length in sizes[2:])), masks)
    reason = (
        explain_inexact(context.gradient, context.start, task, longer) if masks and not _is_random(context) else None
    )
    if reason is not None:
        raise ConfigError(
            f"[model] masks = {masks}: sequences that are longer by entries of mask 0 must give the same answer, but "
            f"with {config.model.build} {reason}: leave out what the mask leaves out, also in means over the sequence"
        )
    mixed = explain_mixed_samples(context.inner.loss, context.start.weights, task.support)
    if mixed is None:
        return []
    layers = _list_batch_norms(config)
    cure = f"use GroupNorm or LayerNorm in place of {', '.join(layers)}" if layers else "compute each sample by itself"
    if config.engine.pad_sizes:
        raise ConfigError(
            f"[engine] pad_sizes = {[*config.engine.pad_sizes]} fills sets up with samples that do not count, which "
            f"{config.model.build} cannot take: {mixed}. Either {cure}, or leave pad_sizes out"
        )
    note = (
        f"sets of other sizes are not filled up: {mixed}. So each size needs a program of its own, and tasks of more "
        f"than a few sizes are computed one by one; to change that, {cure}"
    )
    return [note]


def _is_random(context: LearnerContext) -> bool:
    return bool(getattr(context.inner.loss, "random", False) or context.inner.rule.random)


def _list_batch_norms(config: Config) -> list[str]:
    with build_in(config.engine.frozen_folder):
        module = build_module(config.model, config.trainer().seed)
    return [describe(name, layer) for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)]


def _answers_specially(inner: InnerSettings) -> bool:
    """Return whether [inner] asks for more than the answer at the end of the inner loop."""
    plain = (inner.posterior, inner.samples, inner.begin) == ("point", 1, "weights")
    return bool(inner.answer_steps or inner.answer_heads or inner.answer_rules) or not plain


def list_scored(config: Config, context: LearnerContext) -> Scored:
    """Return what rounds score: the answers of learners, and "NAME@K" after K inner steps, and what outputs mean.

    Learners of a table and those of other packages, and all if [inner] says how to answer, answer on a synthetic task
    to find out. Raises ``ConfigError`` if one cannot, or nobody gives the answers of [serve].
    """
    settings, task = config.trainer(), make_synthetic_task(config.task, torch.device(config.engine.device))
    names: dict[str, None] = {}
    made: dict[str, Learner] = {}
    for at, learner in enumerate(list_learners(settings)):
        own = ":" in learner.kind
        label = label_learner(at, learner.name) if at < len(settings.learner) else "regret" if own else "inner"
        suffixes: Iterable[str] = [""]
        special = at < len(settings.learner) or own or _answers_specially(settings.inner)
        if special or has_pool(settings):
            try:
                made[learner.name] = build_learner(settings, at, context)
                if special:
                    suffixes = _try_answers(made[learner.name], task)
            except Exception as error:  # A user's model or learner may raise anything.
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                raise ConfigError(f"[{label}] {learner.name} cannot answer: {kind}{error}") from error
        names |= dict.fromkeys(learner.name + suffix for suffix in suffixes)
    if has_pool(settings):
        try:
            build_pool(settings, made, context)
        except ValueError as error:
            raise ConfigError(f"[pool] {error}") from error
        names[POOL] = None
    if config.answering not in names:
        known = registry.nearest(config.answering, names)
        raise ConfigError(f"[serve] answers = {config.answering!r}: nobody gives this answer; {known}")
    assert isinstance(context.inner.loss, ModelLoss)
    return Scored(tuple(names), context.inner.loss.outcome)


CURE = "state() returns named tensors, and answers(state, support, x) a prediction for each x, under the key ''"
"""What a learner needs in order to be scored and served."""

PARTS = ("state", "answers", "scores", "score", "learn", "learn_more", "save", "load", "engine", "lr_scale")
"""The parts of ``online_meta.types.Learner``."""


def _try_answers(learner: Any, task: Task) -> dict[str, Prediction]:
    """Return what a learner answers to a task from what it publishes; raises what is wrong with it."""
    if missing := [name for name in PARTS if not hasattr(learner, name)]:
        raise ValueError(f"{type(learner).__name__} has no {', '.join(missing)}: {CURE}")
    state = learner.state()
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"state() returns {_describe(state)}: {CURE}")
    published: State = load(save({name: value.detach().cpu().contiguous() for name, value in state.items()}))
    moved = {name: value.to(state[name].device) for name, value in published.items()}
    found: Any = learner.answers(moved, task.support, task.query.x)
    if not isinstance(found, dict) or "" not in found:
        raise ValueError(f"answers() returns {_describe(found)}: {CURE}")
    for prediction in found.values():
        _check_prediction(prediction, count_samples(task.query))
    score_answers(answer_task(learner.answers, state, task), task)  # With an empty support set, and by the losses.
    again = learner.answers(state, task.support, task.query.x)
    if not all(map(_same_outputs, found.values(), again.values())):
        raise ValueError("another answer follows from the same state and support set: answers() is a pure function")
    return found


def _check_prediction(prediction: Prediction, rows: int) -> None:
    if not prediction or not all(isinstance(part, Component) for part in prediction):
        raise ValueError(f"an answer is {_describe(prediction)}: it is a tuple of Component")
    for part in prediction:
        samples = len(part.log_weights)
        shapes = {name: tuple(one.shape) for name, one in name_tensors("outputs", part.outputs).items()}
        if any(shape[:2] != (samples, rows) for shape in shapes.values()):
            raise ValueError(
                f"an answer has outputs of shapes {shapes} for {samples} log_weights and {rows} samples: each is "
                f"({samples}, {rows}, ...)"
            )
    total = float(torch.cat([part.log_weights.detach().cpu().double() for part in prediction]).exp().sum())
    if abs(total - 1) > 1e-3:
        raise ValueError(
            f"the weights of an answer sum to {total:g}: subtract logsumexp from log_weights, so that they sum to 1"
        )


def _same_outputs(first: Prediction, second: Prediction) -> bool:
    pairs = zip(tree_leaves([part[1:] for part in first]), tree_leaves([part[1:] for part in second]), strict=True)
    return all(torch.equal(a, b) or bool((a != a).any()) for a, b in pairs)


def _describe(value: object) -> str:
    if not isinstance(value, dict):
        return f"a {type(value).__name__}"
    return f"a dict of {', '.join(f'{name!r}: {type(one).__name__}' for name, one in value.items()) or 'nothing'}"


def check_real_task(config: Config, context: LearnerContext, task: Task) -> None:
    """Compare the loss with the module, and the shapes of output and targets, on a task that was not made up.

    A task that the model cannot take is left to the run, which quarantines it. Raises ``ConfigError``.
    """
    moved = _to_device(task, torch.device(config.engine.device))
    with _compared_loss(config) as loss, torch.random.fork_rng(devices=[]):
        found = (
            *find_misfits(loss, context.start.weights, moved),
            *find_unfaithful_outputs(loss, context.start.weights, moved),
        )
    if found:
        raise ConfigError(f"[model] {config.model.build}, on a task of the run: {'; '.join(found)}")


@contextmanager
def _compared_loss(config: Config) -> Iterator[ModelLoss]:
    """Yield the model's loss, together with the module that it is compared with, which a loss does not keep alive."""
    settings = config.trainer()
    module, loss = build_model(settings)
    yield loss
    del module  # It has lived until here.


@contextmanager
def _model_error_context(config: Config) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # A user's model may raise anything.
        raise ConfigError(
            f"[model] {config.model.build} with loss {config.model.loss!r} does not accept a task of "
            f"{_describe_inputs(config.task)}, y {config.task.y!r}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _try_gradient(context: LearnerContext, task: Task) -> MetaGrad | Exception:
    """Return the meta-gradient, or the exception: preflight may have a clearer message for it."""
    try:
        return context.gradient(context.start, task)
    except Exception as error:
        return error


def _name_cause(config: Config, context: LearnerContext, task: Task, error: Exception) -> Exception:
    """Return the exception of a meta-gradient; it is one of [meta] if another estimator takes the task."""
    other = replace(context, gradient=first_order(context.inner))
    if isinstance(error, ValueError) and isinstance(_try_gradient(other, task), MetaGrad):
        return ConfigError(f"[meta] gradient = {config.meta.gradient!r}: {error}")
    return error


def _check_finite(config: Config, gradient: MetaGrad) -> None:
    if not bool(torch.isfinite(gradient.loss)):
        raise ConfigError(
            f"[model] the loss of {config.model.build} on a synthetic task is {float(gradient.loss)}: it must be finite"
        )


def _check_output(config: Config, output: Tensors, outcome: Outcome, query: Batch) -> None:
    """Ask a named outcome whether the output fits the targets; for a user's own loss, ``preflight`` does."""
    if isinstance(outcome.loss, LossFunction):
        return
    spec, loss = config.task, f"[model] loss = {config.model.loss!r}"
    classes = _count_classes(outcome, output)
    soft = isinstance(output, Tensor) and isinstance(query.y, Tensor) and output.shape == query.y.shape and classes != 1
    if classes is not None and spec.y != "class" and not soft:
        raise ConfigError(
            f"{loss} is for classes, but [task] y = {spec.y!r}: use a loss of numbers, such as 'mse' or 'gaussian', or "
            "set y = 'class'"
        )
    if outcome.cdf is not None and spec.y == "class":
        raise ConfigError(
            f"{loss} is for numbers, but [task] y = 'class': use 'cross_entropy' or 'categorical', or set y = 'real'"
        )
    found, build = describe_shape(output), config.model.build
    if classes is not None and classes < (spec.ways or 1):
        assert isinstance(output, Tensor)
        right = ("n", str(output.shape[1] + (spec.ways or 1) - classes), *map(str, output.shape[2:]))
        raise ConfigError(
            f"[model] {build} gives an output of shape {found} for {SAMPLES} samples; [task] ways = {spec.ways} "
            f"needs ({', '.join(right)})"
        )
    try:
        outcome.nll(output, query.y)
    except ValueError as error:
        shape = f"y_shape = {spec.y_shape}" if spec.y == "real" else f"y = 'class', ways = {spec.ways}"
        shape += f", y_shape = {spec.y_shape}" if spec.y == "class" and spec.y_shape else ""
        raise ConfigError(
            f"[model] {build} gives an output of shape {found} for {SAMPLES} samples, which does not fit [task] "
            f"{shape}: {error}"
        ) from error


def _count_classes(outcome: Outcome, output: Tensors) -> int | None:
    """Return the number of classes of an output; None if its mean is no probabilities of classes."""
    if outcome.probabilities is None:
        return None
    try:
        mean, probabilities = outcome.mean(output), outcome.probabilities(output)
    except (ValueError, IndexError):  # The output fits no target: ``nll`` says why.
        return None
    return mean.shape[1] if mean.shape == probabilities.shape else None


def _check_gradient(config: Config, gradient: MetaGrad, repeated: MetaGrad) -> None:
    build = config.model.build
    if not any(bool(grad.abs().sum() > 0) for grad in gradient.grads.weights.values()):
        raise ConfigError(f"[model] no weight of {build} has a meta-gradient: does the loss depend on them?")
    same = all(torch.equal(grad, repeated.grads.weights[name]) for name, grad in gradient.grads.weights.items())
    if config.engine.device == "cpu" and not same:
        raise ConfigError(
            f"[model] {build} gives a different gradient when evaluated again, but a round must be repeatable: remove "
            "its randomness"
        )


def _check_comparator(kind: str, context: LearnerContext, task: Task, options: dict[str, Any]) -> None:
    check: Callable[..., None] | None = getattr(load_comparator(kind), "check", None)
    try:
        if check is not None:
            check(context, task, **options)
    except ValueError as error:
        raise ConfigError(f"[regret] comparator = {kind!r}: {error}") from error


def _describe_inputs(spec: TaskSpec) -> str:
    """Return the shapes and dtypes of the inputs as text."""
    tried = format_open_dimensions(spec)
    if spec.x_shape is not None:
        return f"x_shape {spec.x_shape}{tried}, x_dtype {spec.x_dtype}"
    each = (f"{name} of shape {given.shape} and dtype {given.dtype}" for name, given in spec.x.items())
    return f"the inputs {', '.join(each)}{tried}"


def format_open_dimensions(spec: TaskSpec) -> str:
    """Return a remark on the size of open dimensions in a synthetic task; "" if there are none."""
    return f" (tried with {OPEN_SIZE} for each -1)" if spec.has_open_dimensions() else ""


def make_synthetic_task(spec: TaskSpec, device: torch.device, seed: int = 0) -> Task:
    """Return a small random task with the shapes and types of ``spec``.

    Tokens are 0 or 1, which every vocabulary contains. An open dimension has the size ``OPEN_SIZE``.

    Args:
        spec: [task] section of the configuration.
        device: of the tensors.
        seed: of the random numbers.
    """
    random = torch.Generator().manual_seed(seed)

    def size_of(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (SAMPLES, *(OPEN_SIZE if size == DYNAMIC else size for size in shape))

    def draw_input(given: InputSpec) -> Tensor:
        numbers = {"uint8": 256, "int64": 2}.get(given.dtype, 1)
        values = numbers * torch.rand(size_of(given.shape), generator=random)
        return values.to(getattr(torch, given.dtype)).to(device)

    def draw_target(target: TargetSpec) -> Tensor:
        if target.kind == "class":
            return torch.randint(target.ways or 1, size_of(target.shape), generator=random).to(device)
        return torch.randn(size_of(target.shape), generator=random).to(device)

    def batch() -> Batch:
        x = {name: draw_input(given) for name, given in spec.inputs().items()}
        y = {name: draw_target(target) for name, target in spec.list_targets().items()}
        return Batch(from_named(x), from_named(y))

    return Task(batch(), batch())


UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def format_memory(config: Config, context: LearnerContext, example: Task | None) -> str:
    """Estimate a rank's peak memory and return it as a short table.

    Args:
        config: of the run.
        context: of the learners.
        example: task whose size is assumed; None for a synthetic task.
    """
    device = torch.device(config.engine.device)
    task = make_synthetic_task(config.task, device) if example is None else _to_device(example, device)
    settings, engines = config.trainer(), _count_engines(config, context)
    found = max(
        (
            estimate_memory(override_settings(settings, one), own.inner, own.start, task, engines)
            for one, own in list_contexts(settings, context)
        ),
        key=lambda estimate: estimate.peak,
    )
    note = "" if example else f", a synthetic task because no task is known yet{format_open_dimensions(config.task)}"
    varying = "; larger ones need more" if config.task.has_open_dimensions() else ""
    return (
        f"{_format_bytes(found.peak)} per rank at its peak, estimated; excludes the process itself; for tasks of "
        f"{count_samples(task.support)} + {count_samples(task.query)} samples{note}{varying}"
        f"{''.join(map(_format_part, _list_parts(found)))}"
    )


def _list_parts(found: MemoryEstimate) -> list[tuple[str, int]]:
    """Return the components of the peak, and the additional memory where tasks are stacked."""
    computing = [
        ("the inner trajectory", found.trajectory),
        ("one step's graph and gradients", found.graph),
        ("the sum over tasks", found.sums),
    ]
    in_turn = computing if sum(size for _, size in computing) >= found.step else [("a meta-step", found.step)]
    parts = [("meta-parameters and optimizers", found.stored), ("frozen weights and buffers", found.frozen), *in_turn]
    more = [] if found.stacked is None else [("more for each additional stacked task", found.stacked)]
    return [(what, size) for what, size in [*parts, *more] if size]


def _format_part(part: tuple[str, int]) -> str:
    what, size = part
    return f"\n{'':<8} {_format_bytes(size):>9}  {what}"


def _count_engines(config: Config, context: LearnerContext) -> int:
    """Return how many engines the learners have, each of which holds copies of the meta-parameters."""
    made = []

    def counted(meta: Meta) -> Engine:
        made.append(meta)
        return context.engine(meta)

    own = None if context.own_engine is None else lambda meta, optimizer, lr: counted(meta)
    build_learners(config.trainer(), replace(context, engine=counted, own_engine=own), lambda settings: counted)
    return len(made)


def list_contexts(
    settings: TrainerSettings, context: LearnerContext
) -> Iterator[tuple[LearnerSettings, LearnerContext]]:
    """Yield the leading learner, and each that has settings of its own, with their contexts."""
    for at, learner in enumerate(list_learners(settings)):
        if not at or learner.meta or learner.inner:
            yield learner, override_context(settings, learner, context)


def _to_device(task: Task, device: torch.device) -> Task:
    return map_tensors(lambda tensor: tensor.to(device), task)


def _format_bytes(count: int) -> str:
    return next((f"{count / unit:.3g} {name}" for unit, name in UNITS if count >= unit), f"{count} B")
