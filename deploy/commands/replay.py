"""online-meta replay: play the rounds of a history again, with the same or another algorithm."""

import json
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deploy.config.config import config_file_context, read_config
from deploy.replay import replay
from deploy.reports.report import summary_table
from trainers.journal.run_files import RunFiles


@click.command("replay")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--history", type=click.Path(path_type=Path), help="History to play; by default that of the run.")
@click.option("--rounds", type=click.IntRange(min=1), help="Number of rounds; by default all.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to; by default RUN/replay.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one value of the file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def command(
    config: Path, history: Path | None, rounds: int | None, out: Path | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Play the rounds of a history again, without a daemon, and print a report.

    With the configuration of the original run, the resulting parameters are bit-identical. Use --set to try another
    algorithm.
    """
    settings = read_config(config, overrides)
    files = RunFiles(Path(settings.run.path))
    folder = out or files.folder / "replay"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=as_json or not sys.stderr.isatty()) as progress:
        bars = {what: progress.add_task(what, total=None) for what in ("rounds", *settings.regret.comparator)}
        with config_file_context(config):
            report = replay(
                settings,
                history or files.history,
                folder,
                rounds,
                lambda what, done, total: progress.update(bars[what], completed=done, total=total or None),
            )
    if as_json:
        click.echo(json.dumps(report))
    else:
        Console(highlight=False).print(summary_table(report))
        click.echo(f"report: {folder}/report.html")
