"""Does a model do what meta-learning needs of it? Asked of a made-up task, before the first round."""

import torch
from torch import Tensor, nn

from deploy.config import Config
from deploy.exits import ConfigError
from online_meta.functional import ModelLoss
from online_meta.setup import LearnerSetup
from online_meta.types import Batch, MetaGrad, Task
from streams.spec import TaskSpec

SAMPLES = 4
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def check_model(config: Config, module: nn.Module, setup: LearnerSetup) -> None:
    """Raise ``ConfigError`` when the model or its loss cannot be meta-learned on the configured tasks."""
    _check_layers(config, module)
    task = made_up_task(config.task, torch.device(config.engine.device))
    try:
        assert isinstance(setup.inner.loss, ModelLoss)
        output = setup.inner.loss.output(setup.start.weights, task.query.x)
        _check_output(config, output, task.query)
        gradient, again = setup.gradient(setup.start, task), setup.gradient(setup.start, task)
    except ConfigError:
        raise
    except Exception as error:  # Whatever a user's model raises is the answer to "does it work?".
        raise ConfigError(
            f"[model] {config.model.build} with loss {config.model.loss!r} does not take a task of x_shape "
            f"{config.task.x_shape}, x_dtype {config.task.x_dtype}, y {config.task.y!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    _check_gradient(config, gradient, again)


def _check_layers(config: Config, module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, NORMS) and layer.track_running_stats:
            raise ConfigError(
                f"[model] {config.model.build}: the layer {name!r} ({type(layer).__name__}) keeps running statistics, "
                "which a pure function of the weights cannot; build it with track_running_stats=False, or use GroupNorm"
            )


def _check_output(config: Config, output: Tensor, query: Batch) -> None:
    """Compare the output's shape with what the named losses take; others are the user's own business."""
    found, build = tuple(output.shape), config.model.build
    if config.model.loss == "mse" and found != tuple(query.y.shape):
        wanted = f"(n, {', '.join(map(str, config.task.y_shape))})" if config.task.y_shape else "(n,)"
        raise ConfigError(
            f"[model] {build} gives an output of shape {found} for {SAMPLES} samples; [task] y_shape = "
            f"{config.task.y_shape} needs {wanted}"
        )
    if config.model.loss != "cross_entropy":
        return
    if config.task.y != "class":
        raise ConfigError(
            f"[model] loss = 'cross_entropy' is for classes, but [task] y = {config.task.y!r}: take 'mse'"
        )
    if len(found) != 2 or found[1] < (config.task.ways or 1):
        raise ConfigError(
            f"[model] {build} gives an output of shape {found} for {SAMPLES} samples; [task] ways = {config.task.ways} "
            f"needs (n, {config.task.ways})"
        )


def _check_gradient(config: Config, gradient: MetaGrad, again: MetaGrad) -> None:
    build = config.model.build
    if not bool(torch.isfinite(gradient.loss)):
        raise ConfigError(f"[model] the loss of {build} on a made-up task is {float(gradient.loss)}: it must be finite")
    if not any(bool(grad.abs().sum() > 0) for grad in gradient.grads.weights.values()):
        raise ConfigError(f"[model] no weight of {build} has a meta-gradient: does the loss depend on them?")
    same = all(torch.equal(grad, again.grads.weights[name]) for name, grad in gradient.grads.weights.items())
    if config.engine.device == "cpu" and not same:
        raise ConfigError(
            f"[model] {build} gives another gradient when it is asked again: a round must be repeatable, so leave out "
            "what is random (dropout), or call the model's eval()"
        )


def made_up_task(spec: TaskSpec, device: torch.device) -> Task:
    """Return a small random task of the shape that ``spec`` describes."""
    random = torch.Generator().manual_seed(0)

    def batch() -> Batch:
        noise = torch.rand((SAMPLES, *spec.x_shape), generator=random)
        dtype = getattr(torch, spec.x_dtype)
        x = noise.to(dtype) if dtype.is_floating_point else (noise * (1 + (spec.x_dtype == "uint8") * 254)).to(dtype)
        if spec.y == "class":
            y = torch.randint(spec.ways or 1, (SAMPLES,), generator=random)
        else:
            y = torch.randn((SAMPLES, *spec.y_shape), generator=random)
        return Batch(x.to(device), y.to(device))

    return Task(batch(), batch())
