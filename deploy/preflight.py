"""Everything that can be known to be wrong before the first round."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import Tensor

import streams.sources
from deploy.config import Config
from deploy.daemon import bind, check_exposure, open_history
from deploy.exits import ConfigError
from online_meta import registry
from online_meta.past import MemoryPast
from online_meta.setup import LearnerSetup
from online_meta.types import Batch, Meta, Task
from streams.spec import TaskSpec
from trainers.build import build_learners, build_setup
from trainers.run_files import RunFiles

SAMPLES = 4


def check_model(config: Config) -> LearnerSetup:
    """Build the learners and try one meta-gradient on a made-up task of the configured shape.

    Raises ``ConfigError`` that names the section and what is wrong.
    """
    try:
        setup = build_setup(config.trainer(), MemoryPast())
        build_learners(config.trainer(), setup)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(str(error)) from error
    task = made_up_task(config.task, torch.device(config.engine.device))
    try:
        gradient = setup.gradient(setup.start, task)
    except Exception as error:  # Whatever a user's model raises is the answer to "does it work?".
        raise ConfigError(
            f"[model] {config.model.build} with loss {config.model.loss!r} does not take a task of x_shape "
            f"{config.task.x_shape}, x_dtype {config.task.x_dtype}, y {config.task.y!r}: {type(error).__name__}: {error}"
        ) from error
    _check_gradient(config, gradient.grads, gradient.loss)
    return setup


def _check_gradient(config: Config, grads: Meta, loss: Tensor) -> None:
    if not bool(torch.isfinite(loss)):
        raise ConfigError(f"[model] the loss of {config.model.build} on a made-up task is {float(loss)}: it must be finite")
    still = [name for name, grad in grads.weights.items() if not bool(grad.abs().sum() > 0)]
    if len(still) == len(grads.weights):
        raise ConfigError(f"[model] no weight of {config.model.build} has a meta-gradient: does the loss depend on them?")


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


def check_store(config: Config) -> str:
    """Open the history as the daemon would; return what is there."""
    files = RunFiles(Path(config.run.path))
    if not files.history.exists():
        files.folder.mkdir(parents=True, exist_ok=True)
        return f"{files.history} will be made"
    with open_history(files) as history:
        return f"{files.history} holds {len(history)} rounds"


def check_sources(config: Config) -> str:
    """Open every source; return their names."""
    for source in config.source:
        module = registry.load_module(streams.sources, source.kind)
        try:
            module.open(source.settings, config.task, source.name, config.run.seed)
        except ValueError as error:
            raise ConfigError(f"[[source]] {source.name}: {error}") from error
    return ", ".join(source.name for source in config.source)


def check_port(config: Config) -> str:
    """Listen for a moment where the daemon will."""
    with ExitStack() as cleanup:
        cleanup.enter_context(closing(bind(config.serve)))
        return f"{config.serve.host}:{config.serve.port} is free"


def check_all(config: Config, told: Callable[[str, str], None]) -> None:
    """Check one thing after the other; ``told`` gets (what, how it is) of each that is right. Raises ``Stop``."""
    check_exposure(config.serve)
    setup = check_model(config)
    count = sum(weight.numel() for weight in setup.start.weights.values())
    told("model", f"{config.model.build}, {count:,} weights, a finite meta-gradient ({config.meta.gradient})")
    told("history", check_store(config))
    told("sources", check_sources(config))
    told("port", check_port(config))
