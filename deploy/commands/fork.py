"""online-meta fork: play the rounds of a run with other settings from a round on, without a copy of its tasks."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from deploy.forks import create_fork, drop_fork, play_branch
from streams.history.errors import HistoryBusy
from streams.history.history import History
from streams.history.ledger import acquire_lock
from streams.private_files import private_umask
from trainers.journal.jsonl import LineReader
from trainers.journal.run_files import RunFiles

POLL_SECONDS = 0.2


@click.command("fork")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--at", type=click.IntRange(min=0), default=0, help="First round with the changed settings; by default round 0."
)
@click.option("--set", "changes", multiple=True, metavar="SECTION.KEY=VALUE", help="Change one setting.")
@click.option("--name", help="Name of the fork; by default fork-1, fork-2, ...")
@click.option("--drop", metavar="NAME", help="Make no fork: remove the fork NAME, which is no longer played.")
@click.option("--wait", is_flag=True, help="Wait until the fork has learned all rounds; without a daemon, play them.")
def command(run: Path, at: int, changes: tuple[str, ...], name: str | None, drop: str | None, wait: bool) -> None:
    """Start a fork of RUN: a branch that plays the same history, with changed settings from round --at on.

    The daemon of the run plays its forks in the background, at low priority, and sees a new one without a restart.
    Compare them with `online-meta status`, and serve one with `online-meta promote`.
    """
    if drop is not None:
        drop_fork(run, drop)
        click.echo(f"{drop} is dropped")
        return
    with private_umask():
        fork = create_fork(run, at, changes, name)
        daemon = is_served(RunFiles(run))
        click.echo(f"{RunFiles(run, fork.name).own}: a fork of {fork.parent} at round {at}")
        if not wait:
            where = "its daemon plays it" if daemon else "it is played when `online-meta serve` runs, or with --wait"
            click.echo(f"{fork.name}: {where}")
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            bar = progress.add_task(fork.name, total=None)

            def show(done: int, total: int) -> None:
                progress.update(bar, completed=done, total=total)

            rounds = _wait(run, fork.name, show) if daemon else play_branch(run, fork.name, show)
    click.echo(f"{fork.name}: {rounds} rounds are learned")


def is_served(files: RunFiles) -> bool:
    """Return whether a daemon serves the run."""
    try:
        os.close(acquire_lock(files.history))
    except HistoryBusy:
        return True
    return False


def _wait(run: Path, name: str, show: Callable[[int, int], None]) -> int:
    """Wait until the daemon has played all rounds that the run has now."""
    with History.open(RunFiles(run).history, write=False) as history:
        total = len(history)
    reader, done = LineReader(RunFiles(run, name).rounds), 0
    while done < total:
        done += len(reader.refresh())
        show(done, total)
        time.sleep(POLL_SECONDS)
    return total
