"""online-meta replay: play the rounds of a history again, with the same or another algorithm."""

import json
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import trainers.comparators
from deploy.checks.model import list_scored
from deploy.checks.preflight import check_learning
from deploy.checks.run_folder import adopt_run_defaults, check_tasks
from deploy.commands._programs import share_programs
from deploy.config.config import Config, config_file_context, read_config
from deploy.erasure import adopt_epoch
from deploy.exits import CONFIG, TRY_LATER, CommandError, ConfigError
from deploy.forks import playing_errors, stages_of
from deploy.leader import find_leader
from deploy.promotion import adapt_config, settle_branches
from deploy.reports.report import summary_table, write_report
from deploy.telemetry.run_view import open_view
from online_meta import registry
from online_meta.learners import LearnerContext
from online_meta.registry import nearest
from online_meta.regret.ledger import Comparator
from streams.atomic_files import replace_file
from streams.history.history import History
from streams.history.retention import count_discarded
from streams.private_files import private_umask
from trainers.build import build_context
from trainers.comparators import ComparatorUnavailable, Refresh, RefreshRequest
from trainers.journal.fork_log import read_branches
from trainers.journal.jsonl import LineReader, LineWriter
from trainers.journal.run_files import MAIN, RunFiles
from trainers.journal.tuning_log import settings_of_checkpoint
from trainers.learner_settings import lead_settings
from trainers.loop.stages import Stage, play_stages
from trainers.loop.task_prefetch import HistoryBuffer
from trainers.settings import RegretSettings

SAME_TASKS = "only a configuration with these can play them again"


@click.command("replay")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--history", type=click.Path(path_type=Path), help="History to play; by default that of the run.")
@click.option("--rounds", type=click.IntRange(min=1), help="Number of rounds; by default all.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to; by default RUN/replay.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one value of the file.")
@click.option("--fork", help="Branch of the run to play: a fork, or `main`; by default the one that is served.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def command(
    config: Path,
    history: Path | None,
    rounds: int | None,
    out: Path | None,
    overrides: tuple[str, ...],
    fork: str | None,
    as_json: bool,
) -> None:
    """Play the rounds of a history again, without a daemon, and print a report.

    With the configuration of the original run, the resulting parameters are bit-identical: what the configuration
    leaves open is as in that run. If a fork was promoted, its rounds are played: those before it with the settings of
    its parent. Use --set to try another algorithm on all rounds.
    """
    settings = share_programs(read_config(config, overrides))
    files = RunFiles(Path(settings.run.path))
    played = history or files.history
    settings = adopt_run_defaults(settings, RunFiles(played.parent))
    folder = out or files.folder / "replay"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=as_json or not sys.stderr.isatty()) as progress:
        bars = {what: progress.add_task(what, total=None) for what in ("rounds", *settings.regret.comparator)}

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:  # a fork may have further comparators
                bars[what] = progress.add_task(what, total=None)
            progress.update(bars[what], completed=done, total=total or None)

        with config_file_context(config), private_umask():
            report = replay(
                settings,
                played,
                folder,
                rounds,
                show,
                fork,
            )
    if as_json:
        click.echo(json.dumps(report))
    else:
        Console(highlight=False).print(summary_table(report))
        if "epoch" in report:
            click.echo(f"epoch {report['epoch']} of the history: it lacks what was erased before")
        click.echo(f"report: {folder}/report.html")


def replay(
    config: Config,
    history_folder: Path,
    out: Path,
    rounds: int | None,
    progress: Callable[[str, int, int], None],
    fork: str | None = None,
) -> dict[str, Any]:
    """Play the rounds of a history again and return the report.

    The decisions that depended on timing in the original run, such as how many rounds share an update, are reused. An
    interrupted replay continues where it stopped.

    Args:
        config: of the replay.
        history_folder: of the history to play.
        out: folder for the results.
        rounds: number of rounds; None for all.
        progress: called with (what, done, total); total is 0 if unknown.
        fork: name of the branch to play; None for the one that is served, if ``config`` is that of the run.

    Raises:
        CommandError: if there is no such branch, if the history has too few rounds or discarded ones, if ``out``
            belongs to other settings, or if a comparator is not available.
    """
    files = RunFiles(out)
    played, config, stages = _choose_branch(adopt_run_defaults(config, files), history_folder, fork)
    with History.open(history_folder, write=False) as history:
        scored = list_scored(config, check_learning(config))
        check_tasks(history, config.task, history_folder, SAME_TASKS)
        total = len(history) if rounds is None else rounds
        if total > len(history):
            raise CommandError(TRY_LATER, f"{history_folder} has {len(history)} rounds, but {rounds} were requested")
        if discarded := count_discarded(history.query):
            raise CommandError(
                CONFIG, f"{history_folder}: retention has removed {discarded} rounds; a replay needs all of them"
            )
        epoch = adopt_epoch(history, files)
        copy_logs(history_folder, files, None if played.decisions == played.history else played.decisions)
        with playing_errors(out):
            play_stages(stages, files, history, total, lambda done: progress("rounds", done, total))
        if total:
            _refresh_comparators(config, files, history, total, progress)
    view = open_view(files, config, scored)
    view.refresh()
    view.close()
    return write_report(out, view, config, epoch)


def _choose_branch(
    config: Config, history_folder: Path, fork: str | None
) -> tuple[RunFiles, Config, tuple[Stage, ...]]:
    """Return the files of the branch to play, the configuration of its last rounds, and the settings of all rounds."""
    folder = history_folder.parent
    branches = read_branches(folder)
    name = branches.served if fork is None else fork
    if name not in branches.list_names():
        raise CommandError(CONFIG, f"--fork {name}: the run has no such branch: {nearest(name, branches.list_names())}")
    plain = RunFiles(folder), config, (Stage(0, config.trainer()),)
    if name == MAIN:
        return plain
    try:
        settled = settle_branches(replace(config, run=replace(config.run, path=str(folder))), branches)
    except ConfigError:
        if fork is not None:
            raise
        return plain  # another algorithm
    settings = settled.settings[name]
    stages = (*stages_of(folder, branches, name)[:-1], Stage(branches.forks[name].at, settings))
    return branches.files_of(folder, name), adapt_config(config, settings), stages


def copy_logs(history_folder: Path, files: RunFiles, decisions: Path | None = None) -> None:
    """Copy the logs of decisions that depended on timing, so that the replay reuses them.

    They lie next to the history, or in the folder ``decisions`` of a fork.
    """
    pairs = [((decisions or history_folder) / file.name, file) for file in files.decision_logs]
    programs = RunFiles(history_folder.parent).programs
    for kind in ("*.pt2", "*.json"):  # The programs, and what was recorded of them.
        pairs += [(program, files.programs / program.name) for program in programs.glob(kind)]
    for source, target in pairs:
        if source.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(target, source.read_bytes(), durable=False)  # A kill leaves the whole copy or none.


def _refresh_comparators(
    config: Config, files: RunFiles, history: History, rounds: int, progress: Callable[[str, int, int], None]
) -> None:
    """Refresh each comparator once, over all played rounds, unless it is done already. Raises ``CommandError``."""
    evaluated = {line["kind"] for line in LineReader(files.comparators).lines() if line["as_of_round"] == rounds}
    settings = config.trainer()
    buffer = HistoryBuffer(history, torch.device(settings.engine.device))
    skipped = {line["round"] for line in LineReader(files.rounds).lines() if line["skipped"]}
    with closing(buffer), closing(LineWriter(files.comparators)) as writer:
        played = settings_of_checkpoint(settings, files, rounds)
        context = build_context(lead_settings(played), buffer, files.programs)
        request = RefreshRequest(rounds, 0, skipped, find_leader(files.leader, context.start))
        for kind in config.regret.comparator:
            if kind not in evaluated:
                writer.append(_refresh_comparator(context, settings.regret, kind, request, progress)._asdict())


def _refresh_comparator(
    context: LearnerContext,
    regret: RegretSettings,
    kind: str,
    request: RefreshRequest,
    progress: Callable[[str, int, int], None],
) -> Comparator:
    done = 0

    def count() -> bool:
        nonlocal done
        done += 1
        progress(kind, done, 0)
        return True

    refresh: Refresh = registry.load(trainers.comparators, kind)
    try:
        found = refresh(context, regret, request, None, count, **regret.comparator_options.get(kind, {}))
    except ComparatorUnavailable as error:
        raise CommandError(CONFIG, f"[regret] comparator = {kind!r}: {error}") from error
    assert found is not None
    return found.comparator._replace(kind=kind)
