"""online-meta dead-letters: list the tasks that a run has rejected, and why."""

import json
from pathlib import Path

import click

from deploy.exits import ConfigError
from streams.ingest.dead_letters import read_letters
from trainers.journal.run_files import RunFiles


@click.command("dead-letters")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def command(run_dir: Path, as_json: bool) -> int:
    """List the tasks that the run in RUN_DIR has rejected, oldest first.

    Each entry shows the reason and the file that holds the bytes of the task.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is not a folder: give the run.path of a run")
    for body, known in read_letters(RunFiles(run_dir).dead_letters):
        if as_json:
            click.echo(json.dumps({**known, "body": str(body)}))
        else:
            cut = f", {known['kept_bytes']} of them kept" if known["cut"] else ""
            click.echo(f"{body}  {known['source']} {known['id']!r}: {known['received_bytes']} bytes{cut}")
            click.echo(f"    {known['reason']}: {known['detail']}")
    return 0
