"""TOML -> checked, frozen configuration; unknown keys and wrong values are errors that say what would be right."""

import dataclasses
import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import TypeAdapter, ValidationError

import streams.sources
from deploy.config.choices import explain_name, find_wrong_choices_at, read_plain
from deploy.config.describe import INTERNAL, describe_type
from deploy.config.learner_tables import NAME, fill_defaults, find_wrong_learners, make_learner
from deploy.config.messages import (
    explain_error,
    find_nonfinite_numbers,
    find_repeated,
    find_unknown_keys,
    format_value,
    join_problems,
)
from deploy.config.race import enter_race, find_wrong_race, take_auto
from deploy.exits import CommandError, ConfigError
from deploy.logs import Style
from online_meta import registry
from streams.atomic_files import replace_file
from streams.history.retention import RetentionSettings
from streams.history.sealing import SealingSettings
from streams.ingest.outliers import OutlierRule
from streams.private_files import SecretExposed, check_private
from streams.spec import Limits, TaskSpec, Values
from trainers.learner_settings import find_player
from trainers.seams import BASELINES, COMPARATORS, SEAMS, list_options
from trainers.settings import (
    CheckpointSettings,
    EngineSettings,
    InnerSettings,
    LearnerSettings,
    MetaSettings,
    ModelSettings,
    PoolSettings,
    RegretSettings,
    TrainerSettings,
    TuningSettings,
)


def read_token(file: Path | None, option: str) -> str | None:
    """Return the token in ``file``; None without a file.

    Raises ``ConfigError`` that names the ``option`` when there is none that an HTTP header could carry, or when other
    users can read the file.
    """
    if file is None:
        return None
    try:
        check_private(file)
        token = file.read_text(encoding="ascii").strip()
    except SecretExposed as error:
        raise ConfigError(f"{option} {error}") from error
    except OSError as error:
        raise ConfigError(f"{option} {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} {file} holds no token: it must be ASCII letters, digits or signs") from error
    if not token:
        raise ConfigError(f"{option} {file} is empty: put a long random token in it")
    if not token.isprintable() or " " in token:
        raise ConfigError(f"{option} {file} holds more than a token: it must be one word on one line")
    return token


RENAMED_KEYS = {
    ("engine", "how"): "batching",
    ("regret", "hindsight_laps"): "hindsight_max_passes",
    ("regret", "hindsight_starts"): "hindsight_restarts",
}
"""Keys of settings.json that version 0.1.0 wrote under another name: (section, old name) to new name."""


@dataclass(frozen=True)
class RunSettings:
    """The run: where it is stored, and how it logs.

    Attributes:
        path: the folder of the run, which holds everything that it writes.
        seed: the seed of everything that is random.
        logs: the format of the log lines of all processes: "text" for people, "json" for services.
    """

    path: Annotated[str, MinLen(1)]
    seed: Annotated[int, Ge(0)] = 0
    logs: Style = "text"


@dataclass(frozen=True)
class HistorySettings:
    """Where the history's archive is, how rounds move there, and which are retained.

    Attributes:
        archive: a folder, relative to the run's history folder if it is not absolute, or the URL of an object store
            such as "s3://bucket/prefix"; by default a folder next to the ledger.
        archive_options: options of the object store, for obstore.
        sealing: see below.
        retention: see below.
    """

    archive: Annotated[str, MinLen(1)] | None = None
    archive_options: dict[str, Any] = field(default_factory=dict)
    sealing: SealingSettings = SealingSettings()
    retention: RetentionSettings = RetentionSettings()


@dataclass(frozen=True)
class ServeSettings:
    """Where the daemon listens. Any host but loopback needs TLS and a token.

    Attributes:
        host: the address to listen at.
        port: the port; 0 takes a free one.
        hosts: further host names by which clients may address the daemon, such as that of a proxy in front of it; it
            always answers to loopback names and to the address at which it listens.
        drain_seconds: how long a drain may take, from the first signal on. What has not ended by then is killed; the
            report takes some seconds more.
        token_file: a file with the token that clients must send.
        tls_cert: a file with the certificate chain, in PEM.
        tls_key: a file with the private key, in PEM.
        try_tasks: whether to try the model's forward pass on each task, from any source, before it is accepted. A task
            on which the model raises an exception is refused.
        try_seconds: the longest time that such a trial may take, as measured on synthetic tasks at the start. A task
            that would take longer is accepted without a trial.
        probes: "host:port" of a second listener, for supervisors and Prometheus: it serves /healthz, /readyz and
            /metrics in plain HTTP, without the token, whatever happens on the first one.
        answers: the name of the learner whose answers are served, "NAME@K" for those after another number K of inner
            steps, from ``inner.answer_steps``, or "NAME@RULE" for those with another head, from ``inner.answer_heads``;
            by default "pool", or without a pool the learner that leads.
        limits: see below.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Ge(0), Le(65535)] = 8780
    hosts: tuple[str, ...] = ()
    drain_seconds: Annotated[float, Gt(0)] = 120.0
    token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    try_tasks: bool = True
    try_seconds: Annotated[float, Gt(0)] = 0.005
    probes: str | None = None
    answers: str | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Refuse an address of the probes that is none."""
        if self.probes is not None:
            split_probes(self.probes)


def split_probes(address: str) -> tuple[str, int]:
    """Return the host and the port of ``[serve] probes``; raises ``ValueError`` for anything else."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isascii() and port.isdecimal() and int(port) <= 65535):
        raise ValueError(f'probes = {address!r}: write it as host:port, such as "127.0.0.1:8781"')
    return host.removeprefix("[").removesuffix("]"), int(port)


@dataclass(frozen=True)
class SourceConfig:
    """A ``[[source]]``: its file in ``streams/sources``, its name and settings, and what it does with outliers."""

    kind: str
    name: str
    settings: Any
    outliers: OutlierRule = "accept"


@dataclass(frozen=True)
class Config:
    """A whole configuration; ``import_folder`` is the folder of its file, where user modules are found."""

    run: RunSettings
    task: TaskSpec
    model: ModelSettings
    inner: InnerSettings = InnerSettings()
    meta: MetaSettings = MetaSettings()
    regret: RegretSettings = RegretSettings()
    engine: EngineSettings = EngineSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    history: HistorySettings = HistorySettings()
    serve: ServeSettings = ServeSettings()
    source: tuple[SourceConfig, ...] = ()
    learner: tuple[LearnerSettings, ...] = ()
    pool: PoolSettings = PoolSettings()
    tuning: TuningSettings = TuningSettings()
    race: tuple[str, ...] = field(default=(), metadata=INTERNAL)
    defaults: tuple[str, ...] = field(default=(), metadata=INTERNAL)
    import_folder: str | None = field(default=None, metadata=INTERNAL)

    def trainer(self) -> TrainerSettings:
        """Return the settings that the trainers need."""
        return TrainerSettings(
            *(self.model, self.inner, self.meta, self.regret, self.engine, self.checkpoint),
            seed=self.run.seed,
            import_folder=self.import_folder,
            learner=self.learner,
            answers=self.serve.answers,
            global_labels=self.task.labels == "global",
            pool=self.pool,
            defaults=self.defaults,
            tuning=self.tuning,
            race=self.race,
        )

    @property
    def answering(self) -> str:
        """The name of the answer that is served: of a learner, or "NAME@K"."""
        return self.serve.answers or find_player(self, None)


def read_config(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read a TOML file and apply overrides written ``section.key=value``.

    Modules in the folder of the file can be named in it from then on. Raises ``ConfigError`` that names the file, the
    section, the key and what would be right.
    """
    registry.add_import_folder(path.parent)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    for override in overrides:
        set_value(raw, override)
    return dataclasses.replace(make_config(raw, str(path)), import_folder=str(path.parent.resolve()))


def make_config(raw: dict[str, Any], where: str) -> Config:
    """Check a configuration that was read from ``where``; raises ``ConfigError``."""
    raw, raced = take_auto(raw)
    tables = _pop_tables(raw, "source", [{"kind": "http"}], where)
    own = _pop_tables(raw, "learner", [], where)
    problems = [
        *find_unknown_keys(Config, raw, ""),
        *find_nonfinite_numbers({**raw, "source": tables, "learner": own}),
    ]
    if own and isinstance(regret := raw.get("regret", {}), dict):  # The tables name every learner.
        raw["regret"] = {"baselines": [], **regret}
    learners = [make_learner(table, index, problems) for index, table in enumerate(own)]
    sources = [_make_source(table, index, problems) for index, table in enumerate(tables)]
    names = [source.name for source in sources if source]
    problems += [f"[[source]] two are called {name!r}: give one another name" for name in find_repeated(names)]
    if problems:
        raise ConfigError(join_problems(where, problems))
    try:
        config: Config = read_plain(Config, raw)
    except ValidationError as error:
        raise ConfigError(join_problems(where, [explain_error(item) for item in error.errors()])) from error
    config = dataclasses.replace(config, source=tuple(filter(None, sources)), learner=tuple(filter(None, learners)))
    config = dataclasses.replace(fill_defaults(config, raw), task=_find_values(config, raw))
    if problems := [*find_wrong_race(config, raced)]:
        raise ConfigError(join_problems(where, problems))
    config = enter_race(config, raced)
    if problems := list(find_wrong_choices(config)) or list(find_wrong_learners(config, config.serve.answers)):
        raise ConfigError(join_problems(where, problems))
    return dataclasses.replace(config, regret=_name_source(config))


def _name_source(config: Config) -> RegretSettings:
    """Return [regret] with the run's only source in the options of comparators that take one and name none."""
    regret = config.regret
    options = dict(regret.comparator_options)
    unnamed = [
        kind
        for kind in regret.comparator
        if "source" in list_options(COMPARATORS, kind) and "source" not in options.get(kind, {})
    ]
    if not unnamed or len(config.source) != 1:
        return regret
    (source,) = config.source
    named: dict[str, Any] = {"source": source.kind}
    if hasattr(registry.load_module(streams.sources, source.kind), "oracle"):  # Those of others may be secrets.
        named["options"] = TypeAdapter(type(source.settings)).dump_python(source.settings, mode="json")
    options |= {kind: {**named, **options.get(kind, {})} for kind in unnamed}
    return dataclasses.replace(regret, comparator_options=options)


_TARGETS: dict[str, Values] = {"poisson": "counts", "categorical": "probabilities", "cross_entropy": "probabilities"}


def _find_values(config: Config, raw: dict[str, Any]) -> TaskSpec:
    """Return the tasks of a run; what their real targets are follows from the loss, unless it is set."""
    task, values = config.task, _TARGETS.get(config.model.loss)
    if values is None or "y_values" in raw["task"] or task.targets or task.y == "class":
        return task
    return dataclasses.replace(task, y_values=values) if task.y_shape or values == "counts" else task


def _pop_tables(raw: dict[str, Any], name: str, default: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Remove the list of tables ``name`` from ``raw`` and return it; without one, the ``default``."""
    tables = raw.pop(name, default)
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        kind = {"source": "http", "learner": "ftml"}[name]
        raise ConfigError(f'{where}: write each {name} as a table of its own: [[{name}]], then kind = "{kind}"')
    return tables


def find_wrong_choices(config: Any) -> Iterator[str]:
    """Yield a sentence for each name that no registry knows, and each option that its entry does not take.

    Args:
        config: a ``Config`` or ``TrainerSettings``: it has the sections of ``trainers.seams.SEAMS``.
    """
    for seam in SEAMS:
        yield from find_wrong_choices_at(seam, getattr(config, seam.section))
    for seam in (BASELINES, COMPARATORS):
        for name in find_repeated([*getattr(config.regret, seam.key)]):
            yield f"[regret] {seam.key} names {name!r} more than once"


@contextmanager
def config_file_context(path: Path) -> Iterator[None]:
    """Put the name of the configuration file before a ``CommandError`` that is about one of its sections."""
    try:
        yield
    except CommandError as error:
        if str(error).startswith("["):
            raise CommandError(error.code, f"{path}: {error}") from error
        raise


def _make_source(table: dict[str, Any], index: int, problems: list[str]) -> SourceConfig | None:
    options = dict(table)
    kind, label = options.pop("kind", None), f"source {index + 1}"
    name = options.pop("name", kind.rpartition(":")[2] if isinstance(kind, str) else kind)
    try:
        settings_type = _find_settings_type(kind)
    except Exception as error:  # an import path runs a user's module
        problem = "kind is missing" if kind is None else f"kind = {format_value(kind)}"
        problems.append(f"[{label}] {problem}: {explain_name(streams.sources, kind, error)}")
        return None
    if not isinstance(name, str) or not NAME.fullmatch(name):
        problems.append(
            f"[{label}] name = {format_value(name)}: must be letters, digits, '.', '_' or '-', such as {kind!r}"
        )
        return None
    outliers = options.pop("outliers", "accept")
    if outliers not in get_args(OutlierRule):
        problems.append(f"[{label}] outliers = {format_value(outliers)}: must be {describe_type(OutlierRule)}")
    unknown = find_unknown_keys(settings_type, options, label, ("kind", "name", "outliers"))
    if unknown:
        problems += unknown
        return None
    try:
        return SourceConfig(kind, name, read_plain(settings_type, options), outliers)
    except ValidationError as error:
        problems += [explain_error(item, label) for item in error.errors()]
        return None


def _find_settings_type(kind: Any) -> Any:
    """Return the dataclass of a source's settings: the type of the first parameter of its ``create_source``."""
    if not isinstance(kind, str):
        raise ValueError("a kind is a string")
    found = get_type_hints(registry.load(streams.sources, kind)).get("settings")
    if not dataclasses.is_dataclass(found):
        raise ValueError("its function needs a parameter `settings` whose type is a dataclass")
    return found


def set_value(raw: dict[str, Any], override: str) -> None:
    """Apply one ``section.key=value``; the value is TOML, or a plain string where it is none.

    Raises ``ConfigError`` for what is not written so.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"--set {override!r}: write it as section.key=value, for example meta.gradient=reptile")
    try:
        read = tomllib.loads(f"value = {text}")
        value = read["value"] if len(read) == 1 else text
    except tomllib.TOMLDecodeError:
        value = text
    table = raw
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r}: {key!r} is a value and not a section")
    table[keys[-1]] = value


def write_settings(path: Path, config: Config | TrainerSettings) -> None:
    """Write what the trainer processes of a run need, as JSON."""
    settings = config.trainer() if isinstance(config, Config) else config
    replace_file(path, TypeAdapter(TrainerSettings).dump_json(settings, indent=1), durable=True)


def read_settings(path: Path) -> TrainerSettings:
    """Read what ``write_settings`` wrote, in this version or an earlier one."""
    return parse_settings(json.loads(path.read_bytes()))


def parse_settings(raw: dict[str, Any]) -> TrainerSettings:
    """Return recorded settings, of this version or an earlier one.

    Modules in the folder of their configuration can be named from then on.
    """
    for (section, old), new in RENAMED_KEYS.items():
        if old in raw[section]:
            raw[section][new] = raw[section].pop(old)
    settings = TypeAdapter(TrainerSettings).validate_json(json.dumps(raw))
    if settings.import_folder is not None:
        registry.add_import_folder(Path(settings.import_folder))
    return settings
