"""online-meta submit: stream task files to a daemon."""

from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deploy.client import daemon_client, read_token
from deploy.exits import CONFIG, Stop
from streams.producer import SubmitError, submit


@click.command("submit")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--url", required=True, help="The daemon, for example http://127.0.0.1:8780")
@click.option("--token-file", type=click.Path(path_type=Path), help="A file that holds the daemon's token.")
def command(files: tuple[Path, ...], url: str, token_file: Path | None) -> int:
    """Send task FILES (safetensors) in the order given; a task's id is its file's name without the ending.

    Sending a file again is harmless: the daemon knows its id. Waits while the daemon's backlog is full. Exits 78
    when a task was refused; the others are sent all the same.
    """
    console = Console(stderr=True)
    refused = new = 0
    with daemon_client(url, token_file) as client, _progress(console) as progress:
        for file in progress.track(files, description="submitting"):
            try:
                receipt = submit(url, file.stem, _read(file), token=read_token(token_file), client=client)
                new += not receipt.duplicate
            except SubmitError as error:
                refused += 1
                progress.console.print(f"{file}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    known = len(files) - refused - new
    click.echo(f"{new} new, {known} already there, {refused} refused")
    return CONFIG if refused else 0


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise Stop(CONFIG, f"{file} cannot be read: {error.strerror}") from error
