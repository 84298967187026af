"""online-meta dead-letters: what a run has refused, and why."""

import json
from pathlib import Path

import click

from deploy.exits import ConfigError
from streams.ingest.dead_letters import read_letters
from trainers.journal.run_files import RunFiles


@click.command("dead-letters")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def command(run_dir: Path, as_json: bool) -> int:
    """List the tasks that the run in RUN_DIR has refused, oldest first, with the reason and the file of their bytes."""
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is no folder: give the run.path of a run")
    for body, known in read_letters(RunFiles(run_dir).dead_letters):
        if as_json:
            click.echo(json.dumps({**known, "body": str(body)}))
        else:
            cut = f", {known['kept_bytes']} of them kept" if known["cut"] else ""
            click.echo(f"{body}  {known['source']} {known['id']!r}: {known['received_bytes']} bytes{cut}")
            click.echo(f"    {known['reason']}: {known['detail']}")
    return 0
