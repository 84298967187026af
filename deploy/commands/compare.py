"""online-meta compare: play one history with several configurations and seeds, and compare them task by task."""

import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import click
from pydantic import TypeAdapter
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from deploy.checks.run_folder import check_tasks
from deploy.commands._programs import share_programs
from deploy.commands.replay import SAME_TASKS, replay
from deploy.config.config import Config, config_file_context, read_config
from deploy.exits import BROKEN, CONFIG, DONE, EXPECTED, TRY_LATER, CommandError, find_exit_code
from deploy.processes.child import die_with_parent, hold_lock
from deploy.reports.comparison import Entry, TextTable, compare_entries, read_entries, tabulate, write_comparison
from online_meta import registry
from streams.history.history import History
from streams.history.retention import count_discarded
from streams.private_files import private_umask
from trainers.journal.jsonl import Line, LineReader
from trainers.journal.round_records import read_content
from trainers.journal.run_files import RunFiles
from trainers.settings_fingerprint import fingerprint

NO_COMPARATORS = "regret.comparator=[]"
"""An override: a comparison does not need them. ``--set regret.comparator=...`` comes after it, and so decides."""


class Replay(NamedTuple):
    """One configuration that plays a history with one seed.

    Attributes:
        name: of the configuration.
        seed: of the replay, in place of that in the file.
        file: the configuration.
        overrides: further values, "section.key=value".
        history: folder of the history.
        rounds: the number of rounds.
        out: folder under which the replay has its own folder.
    """

    name: str
    seed: int
    file: Path
    overrides: tuple[str, ...]
    history: Path
    rounds: int
    out: Path

    def read(self) -> Config:
        """Return the configuration; raises ``ConfigError``.

        Modules next to the file are forgotten afterwards: those next to another one may have the same names.
        """
        paths, folder = [*sys.path], str(self.file.parent.resolve())
        try:
            return share_programs(read_config(self.file, (*self.overrides, f"run.seed={self.seed}")))
        finally:
            sys.path[:] = paths
            for name, module in [*sys.modules.items()]:
                if folder not in paths and Path(getattr(module, "__file__", None) or "/").parent == Path(folder):
                    del sys.modules[name]

    def folder(self, config: Config) -> Path:
        """Return the folder for what the replay writes; it depends on all settings that decide the parameters."""
        return self.out / self.name / f"{self.seed}-{fingerprint(config.trainer())}"


OnProgress = Callable[[Replay, int], None]


class Failure(NamedTuple):
    """A replay that did not finish: the exit code and the error message."""

    replay: Replay
    code: int
    message: str


@click.command("compare")
@click.argument("history", type=click.Path(path_type=Path))
@click.argument("configs", metavar="CONFIG...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Number of seeds, from 0.")
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Number of parallel replays.")
@click.option("--rounds", type=click.IntRange(min=1), help="Number of rounds; by default all.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to; by default RUN/compare.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a value in every file.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as one JSON object.")
def command(
    history: Path,
    configs: tuple[Path, ...],
    seeds: int,
    jobs: int,
    rounds: int | None,
    out: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> int:
    """Play the HISTORY again with every CONFIG and every seed, and compare the answers task by task.

    HISTORY is the folder of a history, or of the run that has it. It is only read. An interrupted comparison continues
    with the same command. If a replay fails, the others are compared all the same, and the exit code is that of the
    first failure. No comparators are computed, unless --set names them.
    """
    if history.is_file():
        raise click.BadParameter(f"{history} is a file: name the folder of a history first, then the configurations")
    history = history / "history" if (history / "history").is_dir() else history
    out = out or history.resolve().parent / "compare"
    total = _count_rounds(history, rounds)
    names = name_configurations(configs)
    replays = [
        Replay(name, seed, file, (NO_COMPARATORS, *overrides), history, total, out / "replays")
        for seed in range(seeds)
        for name, file in names.items()
    ]
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with private_umask(), _lock(out):
        with _show_progress(console, names, seeds * total, as_json) as on_progress:
            failures = play_replays(replays, jobs, on_progress, lambda text: console.print(text, markup=False))
        entries = collect_entries(replays, failures)
        comparison = {
            "history": str(history),
            "rounds": total,
            "seeds": [*range(seeds)],
            "files": {name: str(file) for name, file in names.items()},
            **compare_entries(entries),
            "failures": [
                {"name": one.replay.name, "seed": one.replay.seed, "code": one.code, "message": one.message}
                for one in failures
            ],
        }
        if entries:
            write_comparison(out, comparison, entries)
    if as_json:
        click.echo(json.dumps(comparison))
    elif entries:
        for table in tabulate(comparison):
            Console(highlight=False).print(_make_grid(table))
        click.echo(f"comparison: {out}/comparison.md")
    for text in describe_failures(failures):
        console.print(f"[bold red]error:[/] {escape(text)}")
    return failures[0].code if failures else DONE


def _make_grid(table: TextTable) -> Table:
    """Return a table for the terminal."""
    grid = Table(title=table.title, title_justify="left")
    for at, column in enumerate(table.columns):
        grid.add_column(column, justify="left" if at < 2 else "right")
    for row in table.rows:
        grid.add_row(*map(escape, row))
    return grid


def _count_rounds(folder: Path, rounds: int | None) -> int:
    """Return how many rounds of a history to play; raises ``CommandError`` if it lacks some."""
    with History.open(folder, write=False) as history:
        found, discarded = len(history), count_discarded(history.query)
    if discarded:
        raise CommandError(
            CONFIG, f"{folder}: retention has removed {discarded} rounds; a comparison needs all of them"
        )
    if found < (rounds or 1):
        raise CommandError(TRY_LATER, f"{folder} has {found} rounds, but {rounds or 'at least 1'} were requested")
    return rounds or found


def name_configurations(files: Sequence[Path]) -> dict[str, Path]:
    """Return each configuration by a name of its own: its file's without the ending, with a number if it is taken."""
    found: dict[str, Path] = {}
    for file in files:
        candidates = (file.stem if number == 1 else f"{file.stem}-{number}" for number in count(1))
        found[next(name for name in candidates if name not in found)] = file
    return found


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Keep a second comparison out of a folder during the block."""
    with ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(out / "compare.lock"))
        except CommandError as error:
            message = f"another comparison writes to {out}: wait until it has ended, or choose another --out"
            raise CommandError(error.code, message) from error
        yield


@contextmanager
def _show_progress(console: Console, names: Iterable[str], rounds: int, quiet: bool) -> Iterator[OnProgress]:
    """Show a bar for each configuration during the block; ``rounds`` are those of all its seeds."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not sys.stderr.isatty()) as bars:
        tasks = {name: bars.add_task(escape(name), total=rounds) for name in names}
        done: dict[Replay, int] = {}

        def show(replay: Replay, rounds: int) -> None:
            done[replay] = rounds
            finished = sum(rounds for other, rounds in done.items() if other.name == replay.name)
            bars.update(tasks[replay.name], completed=finished)

        yield show


def play_replays(
    replays: Sequence[Replay],
    jobs: int,
    on_progress: OnProgress = lambda replay, rounds: None,
    warn: Callable[[str], None] = lambda text: None,
) -> list[Failure]:
    """Play replays, each in a process of its own; those that have finished are not played again.

    Args:
        replays: to play, in this order.
        jobs: how many run at a time.
        on_progress: called with a replay and how many of its rounds are played.
        warn: called with a sentence on what a user should know.

    Returns:
        The replays that failed, in the order of ``replays``.
    """
    failures: dict[Replay, Failure] = {}
    waiting = []
    for one in replays:
        try:
            if _is_finished(one, warn):
                on_progress(one, one.rounds)
            else:
                waiting.append(one)
        except EXPECTED as error:
            failures[one] = Failure(one, find_exit_code(error), str(error))
    running: dict[Connection, tuple[Replay, BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                connection, process = _start(waiting[0])
                running[connection] = waiting.pop(0), process
            for ready in wait([*running]):
                assert isinstance(ready, Connection)
                one, process = running[ready]
                message = _receive(ready, process)
                if isinstance(message, int):
                    on_progress(one, message)
                    continue
                del running[ready]
                if message is not None:
                    failures[one] = Failure(one, *message)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    return [failures[one] for one in replays if one in failures]


def _receive(connection: Connection, process: BaseProcess) -> int | tuple[int, str] | None:
    """Return the number of rounds that a replay has played, its exit code and message if it failed, None at its end."""
    with suppress(EOFError, ConnectionError):
        found: int | tuple[int, str] = connection.recv()
        return found
    process.join()
    if not process.exitcode:
        return None
    if process.exitcode > 0:
        return BROKEN, f"its process ended with exit code {process.exitcode}"
    hint = ": was the memory full? Try fewer --jobs" if process.exitcode == -signal.SIGKILL else ""
    return BROKEN, f"its process was killed by {signal.Signals(-process.exitcode).name}{hint}"


def collect_entries(replays: Sequence[Replay], failures: Iterable[Failure] = ()) -> list[Entry]:
    """Return what finished replays recorded, by configuration; those among ``failures`` are left out."""
    lost = {failure.replay for failure in failures}
    found: dict[str, tuple[Config, dict[int, Path]]] = {}
    for one in sorted((one for one in replays if one not in lost), key=lambda one: one.seed):
        config = one.read()
        found.setdefault(one.name, (config, {}))[1][one.seed] = one.folder(config)
    order = dict.fromkeys(one.name for one in replays)
    return read_entries({name: found[name] for name in order if name in found}, replays[0].rounds)


def describe_failures(failures: Sequence[Failure]) -> list[str]:
    """Return a sentence for each error; seeds of a configuration that fail alike are one sentence."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for failure in failures:
        seeds.setdefault((failure.replay.name, failure.message), []).append(str(failure.replay.seed))
    return [
        f"{name}, seed{'s' * (len(found) > 1)} {', '.join(found)}: {message}"
        for (name, message), found in seeds.items()
    ]


def _is_finished(one: Replay, warn: Callable[[str], None]) -> bool:
    """Check a replay before it starts; return whether it has finished with just this configuration.

    Raises ``CommandError`` if the configuration is not right or does not fit the history.
    """
    with config_file_context(one.file), History.open(one.history, write=False) as history:
        config = one.read()
        check_tasks(history, config.task, one.history, SAME_TASKS)
        folder = one.folder(config)
        for line in _first_and_last(LineReader(RunFiles(folder).rounds).lines()):
            if not _is_same_task(history, line):
                message = f"{folder} is a replay of another history than {one.history}: choose another --out"
                raise CommandError(CONFIG, message)
    if not folder.exists() and (earlier := [*folder.parent.glob(f"{one.seed}-*")]):
        warn(
            f"{one.name}, seed {one.seed}: its settings are no longer those of the replay in {earlier[0]}, "
            "which stays there; it is played again"
        )
    with suppress(OSError, ValueError):
        report = json.loads((folder / "report.json").read_bytes())
        now = json.loads(json.dumps(TypeAdapter(Config).dump_python(config, mode="json")))
        return bool(report["config"] == now and report["rounds"] >= one.rounds)
    return False


def _first_and_last(lines: Iterable[Line]) -> list[Line]:
    first = last = None
    for last in lines:
        first = first or last
    return [line for line in (first, last) if line is not None]


def _is_same_task(history: History, line: Line) -> bool:
    """Return whether a line of the rounds is that of the history's round."""
    if line["round"] >= len(history):
        return False
    same = history.entry(line["round"]).id == line["id"]
    return same and ("content" not in line or read_content(history[line["round"]]).digest == line["content"])


def _start(one: Replay) -> tuple[Connection, BaseProcess]:
    """Start the process of a replay; return the connection over which it reports."""
    processes = multiprocessing.get_context("forkserver")  # Its server imports modules once that take seconds.
    processes.set_forkserver_preload([__name__, "torch._dynamo"])
    here, there = processes.Pipe(duplex=False)
    process = processes.Process(target=_play, args=(one, there))
    process.start()
    there.close()
    return here, process


def _play(one: Replay, connection: Connection) -> None:
    """Play a replay in this process; send the rounds that are played, and at a failure its exit code and message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, which ends this process.
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():  # It ended before this process could ask to end with it.
        return
    try:
        config = one.read()
        folder = one.folder(config)
        registry.add_import_folder(one.file.parent)
        with hold_lock(folder / "replay.lock"), config_file_context(one.file), _log_output(folder / "replay.log"):
            replay(
                config,
                one.history,
                folder,
                one.rounds,
                lambda what, done, total: connection.send(done) if what == "rounds" else None,
            )
    except EXPECTED as error:
        connection.send((find_exit_code(error), str(error)))
    except Exception as error:  # A user's model may raise anything.
        connection.send((BROKEN, f"{type(error).__name__}: {error}; its replay.log in {one.out / one.name} has more"))


@contextmanager
def _log_output(log: Path) -> Iterator[None]:
    """Send what this process writes during the block, and the traceback of an exception, to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
        try:
            yield
        except Exception:
            traceback.print_exc(file=file)
            raise
