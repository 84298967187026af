"""online-meta forget: erase one entity from a run, for good."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from deploy.erasure import Forgotten, find_remains, forget_entity
from deploy.exits import BROKEN, CommandError
from streams.history.erasure import list_logs
from streams.private_files import private_umask
from trainers.journal.run_files import RunFiles


@click.command("forget")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("key", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per erasure.")
def command(run: Path, key: str | None, as_json: bool) -> None:
    """Erase all that the run in the folder RUN has of the entity KEY; the daemon must be stopped.

    Its tasks leave the ledger, the archive, the dead letters and the records of the rounds. What was learned since the
    first of them is removed: the next start learns the later rounds again from the checkpoint before it, or from the
    beginning. The erasure is logged without the key. Without KEY, erasures that a kill has interrupted, or that a
    restored backup has undone, are completed; the next start of the daemon does this, too.
    """
    with private_umask():
        done = forget_entity(run, key)
    for one in done:
        click.echo(json.dumps(_to_json(one)) if as_json else _describe(one, run))
    if not done:
        click.echo("{}" if as_json else f"{run}: no erasure is left to complete")
    remains = find_remains(run, key) if key else []
    if remains:
        files = ", ".join(map(str, remains))
        raise CommandError(BROKEN, f"these files, which the run did not write, still name the entity: {files}")


def _to_json(done: Forgotten) -> dict[str, object]:
    erasure = asdict(done.erasure)
    return {**{key: erasure[key] for key in ("digest", "timestamp")}, "rounds": done.rounds, "learned": done.learned}


def _describe(done: Forgotten, run: Path) -> str:
    rounds, logs = done.rounds, list_logs(RunFiles(run).history)
    which = f"{len(rounds)} rounds, from {rounds[0]} to {rounds[-1]}" if rounds else "no round"
    learned = "; ".join(f"{name} learns again from round {first} on" for name, first in done.learned.items())
    if learned and not rounds:
        which = "what checkpoints from before an erasure, as a backup has them, had learned"
    return "\n".join(
        [
            f"erased {which}{f': the next start of {learned}' if learned else ''}",
            f"logged as {done.erasure.digest[:16]}… in {logs[0]} and {logs[1]}",
        ]
    )
