"""online-meta promote: serve a fork of a run."""

from pathlib import Path

import click

from deploy.commands._client import daemon_client, expect_success
from deploy.promotion import promote_branch
from streams.private_files import private_umask


@click.command("promote")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("name")
@click.option("--url", help="Address of the run's daemon, for example http://127.0.0.1:8780, to wait for its switch.")
@click.option("--token-file", type=click.Path(path_type=Path), help="File that contains the daemon's token.")
def command(run: Path, name: str, url: str | None, token_file: Path | None) -> None:
    """Serve the fork NAME of RUN, or `main` again: every answer from now on is that of this branch.

    The event is durable in the history before it takes effect. A running daemon switches without a pause, and
    the previous branch continues in the background.
    """
    if url is not None:
        with daemon_client(url, token_file) as client:
            round = expect_success(client.post(f"/v1/forks/{name}/promote", json={})).json()["round"]
    else:
        with private_umask():
            round = promote_branch(run, name).round
    click.echo(f"{name} is served from now on, after {round} rounds")
