"""Everything that can be known to be wrong before the first round."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError

import online_meta.learners
import online_meta.metagrads
import online_meta.replay
import online_meta.rules
import streams.sources
import trainers.engines
from deploy.config import Config
from deploy.exits import TRY_LATER, ConfigError, Stop
from deploy.leading import lead
from deploy.listening import bind, check_exposure
from deploy.memory_check import tell_memory
from deploy.model_check import check_model
from deploy.problems import explain, repeated
from deploy.storage import check_archive, check_same_run, check_tasks, make_run_folder, open_history
from online_meta import registry
from online_meta.past import MemoryPast
from online_meta.regret import LEARNER
from online_meta.setup import LearnerSetup
from online_meta.types import Task
from streams import wire
from streams.arrivals import Rejected, ReportsLag, TaskSource
from streams.history import History
from streams.leading import NeedsLeader
from trainers.build import build_inner, build_learners, build_loss, build_module, build_setup
from trainers.run_files import RunFiles


def check_learning(config: Config) -> LearnerSetup:
    """Build the learners and try the model and its meta-gradient on made-up tasks of the configured shape.

    Raises ``ConfigError`` that names the section and what is wrong.
    """
    setup, _ = _try_learning(config, remarks=False)
    return setup


def _try_learning(config: Config, remarks: bool) -> tuple[LearnerSetup, tuple[str, ...]]:
    """Return what ``check_learning`` does, and sentences on what is worth knowing about the model."""
    check_names(config)
    settings = config.trainer()
    with blaming(f"[engine] device = {settings.engine.device!r}:"):
        torch.empty(1, device=settings.engine.device)
    with blaming("[model]"):
        module = build_module(settings.model, settings.seed)
        loss = build_loss(settings.model, module)
    with blaming("[inner]"):
        build_inner(settings.inner, loss).init(dict(module.named_parameters()))
    with blaming("[model]"):
        setup = build_setup(settings, MemoryPast())
    with blaming("[meta]"):
        setup.engine(setup.start)
    with blaming("[regret]"):
        build_learners(settings, setup)
    return setup, check_model(config, setup, remarks)


def check_names(config: Config) -> None:
    """Raise ``ConfigError`` for a name of nothing, or options that what is named does not have."""
    for place, name, folder in (
        ("[inner] rule", config.inner.rule, online_meta.rules),
        ("[meta] gradient", config.meta.gradient, online_meta.metagrads),
        ("[meta] replay", config.meta.replay, online_meta.replay),
        ("[engine] kind", config.engine.kind, trainers.engines),
        *(("[regret] baselines", name, online_meta.learners) for name in config.regret.baselines),
        *(("[regret] options", name, online_meta.learners) for name in config.regret.options),
    ):
        if name not in registry.names(folder):
            raise ConfigError(f"{place} = {name!r}: {registry.nearest(name, registry.names(folder))}")
    with blaming("[engine]"):
        registry.load_module(trainers.engines, config.engine.kind).check(config.engine)
    for place, listed in (("baselines", config.regret.baselines), ("comparator", config.regret.comparator)):
        for name in repeated([*listed]):
            raise ConfigError(f"[regret] {place} names {name!r} more than once")
    if LEARNER in config.regret.baselines:
        raise ConfigError(f"[regret] baselines = {LEARNER!r} is the learner that the baselines are compared with")
    _check_options("inner.options", registry.load(online_meta.rules, config.inner.rule), config.inner.options, "lr")
    estimator = registry.load(online_meta.metagrads, config.meta.gradient)
    _check_options("meta.options", estimator, config.meta.options, "inner")
    replay = registry.load(online_meta.replay, config.meta.replay)
    _check_options("meta.replay_options", replay, config.meta.replay_options, "")
    for name, options in config.regret.options.items():
        build = registry.load_module(online_meta.learners, name).build
        _check_options(f"regret.options.{name}", build, options, "setup")


def _check_options(section: str, function: Callable[..., Any], options: dict[str, Any], given: str) -> None:
    """Raise ``ConfigError`` unless ``function`` takes the options, by name and by type, beside what it is given."""
    types = get_type_hints(function)
    known = [name for name in inspect.signature(function).parameters if name != given]
    for name, value in options.items():
        if name not in known:
            right = registry.nearest(name, known) if known else "it takes none"
            raise ConfigError(f"[{section}] has no key {name!r}: {right}")
        try:
            TypeAdapter(types.get(name, Any)).validate_python(value, strict=True)
        except ValidationError as error:
            raise ConfigError(explain({**error.errors()[0], "loc": (name,)}, section)) from error


@contextmanager
def blaming(place: str) -> Iterator[None]:
    """Turn whatever is raised, by our code or a user's, into a ``ConfigError`` about ``place``."""
    try:
        yield
    except Stop:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            raise ConfigError(f"{place} {error.filename}: {error.strerror}") from error
        kind = "" if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: "
        raise ConfigError(f"{place} {kind}{error}") from error


def open_sources(config: Config, history: History | None = None) -> dict[str, TaskSource | None]:
    """Open every source; return them by name, None for one that tasks are pushed to. Raises ``ConfigError``.

    Those that follow the leader follow that of the run, whose rounds are in ``history``; None: there are none yet.
    """
    opened: dict[str, TaskSource | None] = {}
    for source in config.source:
        module = registry.load_module(streams.sources, source.kind)
        with blaming(f"[[source]] {source.name}:"):
            found = module.create_source(source.settings, config.task, source.name, config.run.seed)
            if isinstance(found, NeedsLeader):
                found = found.create(lead(config, RunFiles(Path(config.run.path)), history))
            opened[source.name] = found
    return opened


def check_sources(config: Config) -> tuple[str, Task | None]:
    """Open every source and look at what it offers first; return their names, and one of these tasks.

    Of one that reads from a broker only the broker is asked, for reading leaves traces there.
    """
    first, told = None, []
    for name, source in open_sources(config).items():
        with blaming(f"[[source]] {name}:"):
            told.append(f"{name}{_reach(name, source)}" if isinstance(source, ReportsLag) else name)
            if source is not None and not isinstance(source, ReportsLag):
                first = _check_first(config, source) or first
    return ", ".join(told), first


def _reach(name: str, source: ReportsLag) -> str:
    """Say how many entries the source's broker has; raises ``Stop`` (75) when it cannot be reached."""
    try:
        waiting = source.lag(None)
    except ValueError:
        raise
    except Exception as error:
        raise Stop(TRY_LATER, f"[[source]] {name}: its broker cannot be read now: {error}") from error
    return f" ({waiting} entries there)"


def _check_first(config: Config, source: TaskSource) -> Task | None:
    arrivals = source.read(None)
    first = next(arrivals, None)
    close = getattr(arrivals, "close", None)  # an iterator may have one, as every generator has
    if close is not None:
        close()
    if first is None:
        return None
    try:
        if first.rejection is not None:
            raise first.rejection
        return wire.decode(first.body, config.task, config.serve.limits)
    except Rejected as refusal:
        raise ValueError(f"its task {first.id} would be refused: {refusal}") from refusal


def check_store(config: Config) -> tuple[str, Task | None]:
    """Open the history as the daemon would; return what is there, and its first task."""
    files = RunFiles(Path(config.run.path))
    if not files.history.exists():
        make_run_folder(files)
        return f"{files.history} will be made", None
    with open_history(files, config.history) as history:
        check_tasks(history, config.task, files.history)
        check_same_run(config, files)
        return f"{files.history} holds {len(history)} rounds", history[len(history) - 1] if len(history) else None


def check_port(config: Config) -> str:
    """Listen for a moment where the daemon will."""
    with closing(bind(config.serve)) as listener:
        host, port = listener.getsockname()[:2]
        return f"{host}:{port} is free"


def check_all(config: Config, told: Callable[[str, str], None]) -> None:
    """Check one thing after the other; ``told`` gets (what, how it is) of each that is right. Raises ``Stop``."""
    check_exposure(config.serve)
    setup, notes = _try_learning(config, remarks=True)
    count = sum(weight.numel() for weight in setup.start.weights.values())
    frozen = f" ({len(held)} further tensors are frozen)" if (held := getattr(setup.inner.loss, "frozen", ())) else ""
    told("model", f"{config.model.build}, {count:,} weights{frozen}, a finite meta-gradient ({config.meta.gradient})")
    for note in notes:
        told("note", note)
    store, kept = check_store(config)
    told("history", store)
    told("archive", check_archive(config.history, RunFiles(Path(config.run.path)).history))
    sources, offered = check_sources(config)
    told("sources", sources)
    told("memory", tell_memory(config, setup, kept or offered))
    told("port", check_port(config))
