"""Everything that can be known to be wrong before the first round."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import torch
from torch import nn

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
from online_meta.batches import count_samples, map_tensors
from online_meta.batching.autotune import COMPILE_AFTER
from online_meta.batching.plan import ExecutionPlan, signature_of
from online_meta.batching.programs import compiled_at, find_exposure, find_refusal, is_cache_usable
from online_meta.learners import LearnerContext, MemoryReplayBuffer
from online_meta.types import Task, Tensors
from streams.entities import find_entity
from streams.formats import wire
from streams.formats.text import padding_id
from streams.history.history import History
from streams.segmenting.by_entity import EntitySource
from streams.segmenting.by_leader import NeedsLeader
from streams.sources.http import Settings as HttpSettings
from streams.spec import TaskSpec, join_name
from streams.tables.schema import name_inputs
from streams.types import Rejected, ReportsLag, TaskSource
from trainers.build import build_context, build_gradient, build_inner, build_learner, build_learners, build_model
from trainers.distributed.ranks import SINGLE_PROCESS
from trainers.distributed.rendezvous import bind as bind_rendezvous
from trainers.distributed.rendezvous import split_address
from trainers.journal.fork_log import read_branches
from trainers.journal.run_files import RunFiles
from trainers.learner_settings import list_learners, override_settings
from trainers.loop.batching_plan import select_plans
from trainers.loop.rounds import configure_torch
from trainers.settings import EngineSettings

FIRST_TASKS = 3
"""How many tasks of a source, and samples of a set, ``check`` shows."""

FIRST_NUMBERS = 10
"""How many numbers of a sample ``check`` shows."""

FIRST_REFUSED = 1_000
"""The number of refusals after which ``check`` stops reading a source."""

FIRST_PAUSES = 100
"""The number of reads without a task after which ``check`` stops reading a source."""

LARGEST_WHOLE = 1e9
"""Below it, ``check`` shows all digits of a whole number."""

NO_TITLES: Mapping[str, Sequence[str]] = MappingProxyType({})

INDENT = "\n" + " " * 11


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
    torch.set_num_threads(settings.engine.threads)  # more would wait for one another where other processes work
    with error_context(f"[engine] device = {settings.engine.device!r}:"):
        torch.empty(1, device=settings.engine.device)
    with error_context("[model]"):
        module, loss = build_model(settings)
    with error_context("[task.text]"):
        check_tokenizer(config.task, module)
    for name in config.task.x:
        text = config.task.text_of(name)
        if text is not None and config.task.text is None:
            with error_context(f"[task.x.{name}]"):
                padding_id(text.tokenizer, text.length)
    with error_context("[inner]"):
        inner = build_inner(settings.inner, loss)
        inner.init(dict(module.named_parameters()))
    with error_context("[meta]"):
        build_gradient(settings.meta, inner)
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


def check_tokenizer(spec: TaskSpec, module: nn.Module) -> None:
    """Load the tokenizer of a run whose samples are texts, if it is one.

    Raises ``ValueError`` if there is none, or it pads with other ids than those that the model takes for padding.
    """
    if spec.text is None:
        return
    pads, takes = padding_id(spec.text.tokenizer, spec.text.length), getattr(module, "padding", None)
    if takes is not None and pads != takes and not spec.x:
        raise ValueError(
            f"the tokenizer pads with the id {pads}, but the model takes {takes} for padding: use the tokenizer of the "
            "model, or name the inputs input_ids and attention_mask"
        )


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
    tables = [name for name, one in opened.items() if isinstance(one, EntitySource)]
    for source in config.source:
        wanted = source.settings.table if isinstance(source.settings, HttpSettings) else None
        if wanted is not None and wanted not in tables:
            known = ", ".join(map(repr, tables)) or "there is none"
            raise ConfigError(f"[[source]] {source.name}: table = {wanted!r} is no source with columns: {known}")
    return opened


def check_sources(
    config: Config,
    try_task: Callable[[Task], None] | None = None,
    report: Callable[[str, str], None] = lambda what, state: None,
) -> tuple[str, Task | None]:
    """Open every source and look at what it offers first; return their names, and one of these tasks.

    Of one that reads from a broker only the broker is asked, for reading leaves traces there.

    Args:
        config: the configuration.
        try_task: raises ``Rejected`` for a task that the model does not accept.
        report: is called with ("first", a table) for each of the first three tasks of a source, and with ("refused",
            a sentence) if some of what comes first would be refused.
    """
    first, names = None, []
    for name, source in open_sources(config).items():
        with error_context(f"[[source]] {name}:"):
            names.append(f"{name}{_format_lag(name, source)}" if isinstance(source, ReportsLag) else name)
            if source is not None and not isinstance(source, ReportsLag):
                tasks, refused, seen = _read_first(config, source, try_task)
                if refused and not tasks:
                    raise ValueError(f"its task {refused[0][0]} would be refused: {refused[0][1]}")
                schema = source.schema if isinstance(source, EntitySource) else None
                titles = ({}, {}) if schema is None else (name_inputs(schema), {"": schema.y})
                for id, task in tasks:
                    report("first", format_task(id, task, *titles))
                if refused:
                    lines = [f"{name}: {len(refused)} of the first {seen} that it offers would be refused:"]
                    report("refused", INDENT.join([*lines, *(f"{id}: {why}" for id, why in refused[:FIRST_TASKS])]))
                first = next((task for _, task in tasks), first)
    return ", ".join(names), first


def _read_first(
    config: Config, source: TaskSource, try_task: Callable[[Task], None] | None
) -> tuple[list[tuple[str, Task]], list[tuple[str, Rejected]], int]:
    """Return the first tasks of a source, what would be refused before the last of them, and how many these are."""
    tasks: list[tuple[str, Task]] = []
    refused: list[tuple[str, Rejected]] = []
    arrivals = source.read(None)
    pauses = FIRST_PAUSES if isinstance(source, EntitySource) else 1  # it pauses while it reads rows of open tasks
    while len(tasks) < FIRST_TASKS and len(refused) < FIRST_REFUSED and pauses:
        arrival = next(arrivals, None)
        if arrival is None:
            pauses -= 1
            continue
        try:
            if arrival.rejection is not None:
                raise arrival.rejection
            task = wire.decode(arrival.body, config.task, config.serve.limits)
            if try_task is not None:
                try_task(task)
            tasks.append((arrival.id, task))
        except Rejected as refusal:
            refused.append((arrival.id, refusal))
    close = getattr(arrivals, "close", None)  # an iterator may have one, as every generator has
    if close is not None:
        close()
    return tasks, refused, len(tasks) + len(refused)


Titles = Mapping[str, Sequence[str]]
"""The names of the numbers of each input or target."""


def format_task(id: str, task: Task, inputs: Titles = NO_TITLES, targets: Titles = NO_TITLES) -> str:
    """Return the first rows of a task as a table.

    Args:
        id: of the task; the entity that it names is shown.
        task: the task; of each input and target, the first numbers of a sample are shown.
        inputs: the names of the numbers of each input, if they are known.
        targets: those of a target.
    """
    entity = find_entity(id)
    counts = [count_samples(batch) for batch in task]
    head = f"{id}: {'' if entity is None else f'{entity!r}, '}{counts[0]} support and {counts[1]} query samples"
    table: list[list[str]] = []
    for part, batch, count in zip(("support", "query"), task, counts, strict=True):
        columns = [*_list_columns(batch.x, "x", inputs), *_list_columns(batch.y, "y", targets)]
        table = table or [["", *(title for title, _ in columns)]]
        for at in range(min(count, FIRST_TASKS)):
            table.append([part, *("..." if numbers is None else _format(numbers[at]) for _, numbers in columns)])
        if count > FIRST_TASKS:
            table.append([part, "..."])
    sizes = [max(len(row[at]) for row in table if at < len(row)) for at in range(len(table[0]))]
    lines = ["  ".join(cell.rjust(size) for cell, size in zip(row, sizes, strict=False)) for row in table]
    return INDENT.join([head, *(line.rstrip() for line in lines)])


def _format(number: float) -> str:
    """Return a number in four digits, or a whole one, such as a token id, in all of them."""
    return f"{number:.0f}" if number.is_integer() and abs(number) < LARGEST_WHOLE else f"{number:.4g}"


def _list_columns(values: Tensors, what: str, titles: Titles) -> list[tuple[str, list[float] | None]]:
    """Return the title and the numbers of each column of inputs or targets; None stands for those left out."""
    columns: list[tuple[str, list[float] | None]] = []
    for name, tensor in values.items() if isinstance(values, dict) else [("", values)]:
        flat = tensor.reshape(len(tensor), -1).double().T.tolist()
        plain = join_name(what, name)
        numbered = [plain] if len(flat) == 1 else [f"{plain}[{number}]" for number in range(len(flat))]
        known = titles[name] if len(titles.get(name, ())) == len(flat) else numbered
        columns += zip(known, flat[:FIRST_NUMBERS], strict=False)
        if len(flat) > FIRST_NUMBERS:
            columns.append(("...", None))
    return columns


def _format_lag(name: str, source: ReportsLag) -> str:
    """Say how many entries the source's broker has; raises ``CommandError`` (75) when it cannot be reached."""
    try:
        waiting = source.lag(None)
    except ValueError:
        raise
    except Exception as error:
        raise CommandError(TRY_LATER, f"[[source]] {name}: its broker cannot be read now: {error}") from error
    return f" ({waiting} entries there)"


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
        return f"{files.history} holds {len(history)} rounds", history.newest_task()


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


def compile_programs(config: Config, tasks: Sequence[Task], report: Callable[[str, str], None]) -> None:
    """Compile the programs that the run would need for tasks of these shapes into the cache of ``[engine] programs``.

    Args:
        config: of the run.
        tasks: the first ones of the run, or of its sources.
        report: is called with ("programs", a sentence) for each learner and shape.

    Raises:
        ConfigError: if the configuration has no cache, or if others can use it.
    """
    settings = config.trainer()
    place = _find_cache(config)
    if settings.engine.batching not in ("auto", "compiled"):
        report("programs", f"batching = {settings.engine.batching!r} compiles nothing")
        return
    if not tasks:
        report("programs", "no task is known yet, so no shape: nothing is compiled")
        return
    began, device = time.time(), torch.device(config.engine.device)
    shapes = {signature_of(task): map_tensors(lambda tensor: tensor.to(device), task) for task in tasks}
    configure_torch(settings.engine.threads)  # as the run does, for programs depend on it
    with TemporaryDirectory(prefix="online-meta-") as folder:
        context = build_context(settings, MemoryReplayBuffer(), Path(folder))
        learners = build_learners(settings, context)
        world = config.engine.processes * config.engine.nodes[0]
        selector = select_plans(settings, learners, Path(folder), world, measure_after=0.0)
        try:
            plans = selector.find({}, [*shapes.values()] * COMPILE_AFTER)
            selector.wait()
            plans = selector.find(plans, [*shapes.values()])
            selector.follow(plans)
            selector.prepare([*shapes.values()], SINGLE_PROCESS)
        finally:
            selector.close()
        for name, found in plans.items():
            for plan in found:
                report("programs", f"{name}, {plan.signature}: {_describe_program(plan, place, began)}")


def _find_cache(config: Config) -> Path:
    """Return the folder in which programs are shared; raises ``ConfigError`` if it cannot be used."""
    if not config.engine.programs:
        raise ConfigError('[engine] programs = "": there is no folder for compiled programs; name one')
    folder = Path(config.engine.programs).expanduser()
    if not is_cache_usable(folder):
        with error_context(f"[engine] programs = {config.engine.programs!r}:"):
            raise ValueError(find_exposure(folder, private=True))
    return folder


def _describe_program(plan: ExecutionPlan, cache: Path, began: float) -> str:
    """Say what became of the program of a plan, and since when it is in the cache."""
    if plan.batching != "compiled":
        reason = find_refusal(cache, plan.program) if plan.program else None
        return f"computed {plan.batching}" + (f"; its program is not compiled: {reason}" if reason else "")
    at = compiled_at(cache, plan.program) if plan.program else None
    return "its program is ready" if at is None else "compiled" if at >= began else "found in the cache"


def check_all(config: Config, report: Callable[[str, str], None], compiles: bool = False) -> None:
    """Check one thing after the other; call ``report(what, state)`` for each that passes. Raises ``CommandError``.

    With ``compiles``, the programs for the tasks that are known are compiled in the end.
    """
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
    shown: list[tuple[str, str]] = []
    offered: list[Task] = []
    try_task = make_trial(config, context)

    def try_and_keep(task: Task) -> None:
        if try_task is not None:
            try_task(task)
        offered.append(task)

    sources, offered_task = check_sources(config, try_and_keep, lambda what, state: shown.append((what, state)))
    report("sources", sources)
    for what, state in shown:
        report(what, state)
    task = stored_task or offered_task
    if task is not None:
        check_real_task(config, context, task)
    report("memory", format_memory(config, context, task))
    report("port", check_port(config))
    if compiles:
        compile_programs(config, [*offered, *([stored_task] if stored_task is not None else [])], report)
