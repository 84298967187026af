"""Everything that can be known to be wrong before the first round."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

import streams.sources
import trainers.engines
from deploy.checks.model import check_model, check_real_task, format_memory, list_contexts, list_scored
from deploy.checks.run_folder import check_archive, check_same_run, check_tasks, make_run_folder, open_history
from deploy.checks.trial import make_trial
from deploy.config.config import Config
from deploy.config.learner_tables import label_learner
from deploy.exits import TRY_LATER, CommandError, ConfigError
from deploy.leader import leader_of
from deploy.promotion import settle_branches
from deploy.server.listener import bind, bind_probes, check_exposure
from online_meta import registry
from online_meta.learners import LearnerContext, MemoryReplayBuffer
from online_meta.types import Task
from streams.formats import wire
from streams.history.history import History
from streams.segmenting.by_leader import NeedsLeader
from streams.types import Rejected, ReportsLag, TaskSource
from trainers.build import build_context, build_inner, build_learner, build_loss, build_module
from trainers.distributed.rendezvous import bind as bind_rendezvous
from trainers.distributed.rendezvous import split_address
from trainers.journal.fork_log import read_branches
from trainers.journal.run_files import RunFiles
from trainers.learner_settings import list_learners, override_settings
from trainers.settings import EngineSettings


def check_learning(config: Config) -> LearnerContext:
    """Build the learners and try the model and its meta-gradient on made-up tasks of the configured shape.

    Raises ``ConfigError`` that names the section and what is wrong.
    """
    context, _ = _try_learning(config, remarks=False)
    return context


def _try_learning(config: Config, remarks: bool) -> tuple[LearnerContext, tuple[str, ...]]:
    """Return what ``check_learning`` does, and sentences on what is worth knowing about the model."""
    check_engine(config)
    settings = config.trainer()
    with error_context(f"[engine] device = {settings.engine.device!r}:"):
        torch.empty(1, device=settings.engine.device)
    with error_context("[model]"):
        module = build_module(settings.model, settings.seed)
        loss = build_loss(settings.model, module)
    with error_context("[inner]"):
        build_inner(settings.inner, loss).init(dict(module.named_parameters()))
    with error_context("[model]"):
        context = build_context(settings, MemoryReplayBuffer())
    with error_context("[meta]"):
        context.engine(context.start)
    for at, learner in enumerate(list_learners(settings)):
        place = label_learner(at, learner.name) if at < len(settings.learner) else "regret"
        with error_context(f"[{place}]"):
            build_learner(settings, at, context)
    notes: dict[str, None] = {}
    for at, (learner, own) in enumerate(list_contexts(settings, context)):
        mine = override_settings(config, learner)
        if at:  # Comparators are those of the learner that leads.
            mine = replace(mine, regret=replace(mine.regret, comparator=()))
        notes |= dict.fromkeys(check_model(mine, own, remarks))
    list_scored(config, context)
    return context, tuple(notes)


def check_engine(config: Config) -> None:
    """Raise ``ConfigError`` for settings that the engine does not have."""
    check = getattr(registry.load_module(trainers.engines, config.engine.kind), "check", None)
    with error_context("[engine]"):
        if check is not None:
            check(config.engine)


def check_rendezvous(settings: EngineSettings) -> None:
    """Raise ``ConfigError`` if other machines would have to meet at an address that this machine does not have."""
    if settings.nodes[1] == 1:
        return
    host, _ = split_address(settings.rendezvous)
    try:
        bind_rendezvous(host, 0).close()
    except OSError as error:
        raise ConfigError(
            f"[engine] rendezvous = {settings.rendezvous!r}: {host} is not an address of this machine, which hosts "
            f"the rendezvous: {error.strerror}"
        ) from error


@contextmanager
def error_context(place: str) -> Iterator[None]:
    """Turn whatever is raised, by our code or a user's, into a ``ConfigError`` about ``place``."""
    try:
        yield
    except CommandError:
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
        create_source = registry.load(streams.sources, source.kind)
        with error_context(f"[[source]] {source.name}:"):
            found = create_source(source.settings, config.task, source.name, config.run.seed)
            if isinstance(found, NeedsLeader):
                folder = Path(config.run.path)
                branches = read_branches(folder)
                found = found.create(leader_of(config, branches.files_of(folder, branches.served), history))
            opened[source.name] = found
    return opened


def check_sources(config: Config, try_task: Callable[[Task], None] | None = None) -> tuple[str, Task | None]:
    """Open every source and look at what it offers first; return their names, and one of these tasks.

    Of one that reads from a broker only the broker is asked, for reading leaves traces there. ``try_task`` raises
    ``Rejected`` for a task that the model does not accept.
    """
    first, report = None, []
    for name, source in open_sources(config).items():
        with error_context(f"[[source]] {name}:"):
            report.append(f"{name}{_format_lag(name, source)}" if isinstance(source, ReportsLag) else name)
            if source is not None and not isinstance(source, ReportsLag):
                first = _check_first(config, source, try_task) or first
    return ", ".join(report), first


def _format_lag(name: str, source: ReportsLag) -> str:
    """Say how many entries the source's broker has; raises ``CommandError`` (75) when it cannot be reached."""
    try:
        waiting = source.lag(None)
    except ValueError:
        raise
    except Exception as error:
        raise CommandError(TRY_LATER, f"[[source]] {name}: its broker cannot be read now: {error}") from error
    return f" ({waiting} entries there)"


def _check_first(config: Config, source: TaskSource, try_task: Callable[[Task], None] | None) -> Task | None:
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
        task = wire.decode(first.body, config.task, config.serve.limits)
        if try_task is not None:
            try_task(task)
        return task
    except Rejected as refusal:
        raise ValueError(f"its task {first.id} would be refused: {refusal}") from refusal


def check_history(config: Config) -> tuple[str, Task | None]:
    """Open the history as the daemon would; return what is there, and its first task."""
    files = RunFiles(Path(config.run.path))
    if not files.history.exists():
        make_run_folder(files)
        return f"{files.history} will be made", None
    with open_history(files, config.history) as history:
        check_tasks(history, config.task, files.history)
        settled = settle_branches(config, read_branches(files.folder))
        check_same_run(settled.config, settled.files)
        return f"{files.history} holds {len(history)} rounds", history[len(history) - 1] if len(history) else None


def check_port(config: Config) -> str:
    """Listen for a moment where the daemon will."""
    check_rendezvous(config.engine)
    with closing(bind(config.serve)) as listener:
        host, port = listener.getsockname()[:2]
        probes = bind_probes(config.serve)
        if probes is None:
            return f"{host}:{port} is free"
        probes.close()
        return f"{host}:{port} and {config.serve.probes} are free"


def check_all(config: Config, report: Callable[[str, str], None]) -> None:
    """Check one thing after the other; call ``report(what, state)`` for each that passes. Raises ``CommandError``."""
    check_exposure(config.serve)
    context, notes = _try_learning(config, remarks=True)
    count = sum(weight.numel() for weight in context.start.weights.values())
    frozen = (
        f" ({len(frozen_names)} further tensors are frozen)"
        if (frozen_names := getattr(context.inner.loss, "frozen", ()))
        else ""
    )
    report("model", f"{config.model.build}, {count:,} weights{frozen}, a finite meta-gradient ({config.meta.gradient})")
    for note in notes:
        report("note", note)
    store, stored_task = check_history(config)
    report("history", store)
    report("archive", check_archive(config.history, RunFiles(Path(config.run.path)).history))
    sources, offered_task = check_sources(config, make_trial(config, context))
    report("sources", sources)
    task = stored_task or offered_task
    if task is not None:
        check_real_task(config, context, task)
    report("memory", format_memory(config, context, task))
    report("port", check_port(config))
