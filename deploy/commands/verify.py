"""online-meta verify: read all of a history."""

import json
import sys
from pathlib import Path

import click
from rich.progress import Progress

from deploy.exits import BROKEN
from streams.verify import Verification, verify


@click.command("verify")
@click.argument("history_dir", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(history_dir: Path, as_json: bool) -> int:
    """Read every round of the history in HISTORY_DIR; check every checksum and the order. Exit 70 on damage."""
    with Progress(transient=True, disable=as_json or not sys.stderr.isatty()) as progress:
        bar = progress.add_task("reading rounds", total=None)
        found = verify(history_dir, lambda done, total: progress.update(bar, completed=done, total=total))
    click.echo(json.dumps({"clean": found.clean, **found._asdict()}) if as_json else describe(found, history_dir))
    return 0 if found.clean else BROKEN


def describe(found: Verification, folder: Path) -> str:
    """Say what was found, a line for each kind of damage."""
    if found.clean:
        return f"{folder}: {found.rounds} rounds, all whole and in order"
    kinds = {name: values for name, values in found._asdict().items() if name != "rounds" and values}
    told = [f"  {name}: {', '.join(str(value) for value in values)}" for name, values in kinds.items()]
    return "\n".join([f"{folder}: {found.rounds} rounds, DAMAGED", *told])
