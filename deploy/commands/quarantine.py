"""online-meta quarantine: list the rounds that no learner learns, retry one, or exclude one."""

import json
from pathlib import Path
from typing import Any

import click

from deploy.commands._client import daemon_client, expect_success


@click.group("quarantine")
def command() -> None:
    """List the rounds in quarantine, submit the task of one again, or exclude a round.

    A round is in quarantine if the model raised an exception on its task, if the trainer died in its update twice, or
    if an operator excluded it.
    """


url = click.option("--url", required=True, help="Address of the daemon, for example http://127.0.0.1:8780")
token = click.option("--token-file", type=click.Path(path_type=Path), help="File that contains the daemon's token.")


@command.command("list")
@url
@token
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def list_rounds(url: str, token_file: Path | None, as_json: bool) -> None:
    """List the rounds in quarantine, in the order in which they were quarantined, with the reasons."""
    with daemon_client(url, token_file) as client:
        rounds: list[dict[str, Any]] = expect_success(client.get("/v1/quarantine")).json()["rounds"]
    for one in rounds:
        if as_json:
            click.echo(json.dumps(one))
        else:
            since = f", learned before, not revisited from round {one['at']} on" if one["was_learned"] else ""
            click.echo(f"round {one['round']}  {one['source']} {one['id']!r}{since}")
            click.echo(f"    {one['reason']}: {one['detail']}")
    if not rounds and not as_json:
        click.echo("no round is in quarantine")


@command.command("retry")
@click.argument("round", type=click.IntRange(min=0))
@url
@token
def retry(round: int, url: str, token_file: Path | None) -> None:
    """Submit the task of the quarantined ROUND again, as a new task, for example after the model is fixed."""
    with daemon_client(url, token_file) as client:
        receipt = expect_success(client.post(f"/v1/quarantine/{round}/retry", json={})).json()
    click.echo(f"round {round} is submitted again as {receipt['id']!r}, round {receipt['round']}")


@command.command("add")
@click.argument("round", type=click.IntRange(min=0))
@click.option("--reason", required=True, help="Why; it is kept with the round.")
@url
@token
def add(round: int, reason: str, url: str, token_file: Path | None) -> None:
    """Exclude ROUND: from the next update on, no learner learns or revisits it. No earlier figure changes."""
    with daemon_client(url, token_file) as client:
        expect_success(client.post("/v1/quarantine", json={"round": round, "reason": reason}))
    click.echo(f"round {round} is excluded from the next update on")
