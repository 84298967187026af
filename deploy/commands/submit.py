"""online-meta submit: stream task files to a daemon."""

from http import HTTPStatus
from pathlib import Path

import click
import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deploy.client import daemon_client
from deploy.exits import CONFIG, TRY_LATER, Stop
from streams.producer import PATIENCE, TRY_AGAIN, SubmitError, submit


@click.command("submit")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--url", required=True, help="The daemon, for example http://127.0.0.1:8780")
@click.option("--token-file", type=click.Path(path_type=Path), help="A file that holds the daemon's token.")
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=PATIENCE,
    show_default=True,
    metavar="SECONDS",
    help="How long to try a task again while the daemon is away, full or busy.",
)
def command(files: tuple[Path, ...], url: str, token_file: Path | None, patience: float) -> int:
    """Send task FILES (safetensors) in the order given; a task's id is its file's name without the ending.

    Sending a file again is harmless: the daemon knows its id. Waits while the daemon's backlog is full. Exits 78
    when a task was refused; the others are sent all the same. Exits 75 when the daemon takes nothing for --patience
    seconds: run it again later.
    """
    console = Console(stderr=True)
    sent = refused = new = 0
    try:
        with daemon_client(url, token_file) as client, _progress(console) as progress:
            _say_when_away(client, console, patience)
            for file in progress.track(files, description="submitting"):
                try:
                    receipt = submit(url, file.stem, _read(file), client=client, patience=patience)
                    new += not receipt.duplicate
                except SubmitError as error:
                    _stop_unless_refused(error, url, patience)
                    refused += 1
                    told = f"{file}: {error}"
                    progress.console.print(told, style="red", markup=False, highlight=False, soft_wrap=True)
                sent += 1
    finally:
        left = f", {len(files) - sent} not sent" if sent < len(files) else ""
        click.echo(f"{new} new, {sent - refused - new} already there, {refused} refused{left}")
    return CONFIG if refused else 0


def _say_when_away(client: httpx.Client, console: Console, patience: float) -> None:
    try:
        client.get("/healthz")
    except (httpx.ConnectError, httpx.ConnectTimeout):
        console.print(f"no daemon answers at {client.base_url}; trying for {patience:g} s", markup=False)


def _stop_unless_refused(error: SubmitError, url: str, patience: float) -> None:
    """Raise ``Stop`` when the next task would fare no better than this one did."""
    if error.status == HTTPStatus.UNAUTHORIZED:
        raise Stop(CONFIG, f"{url} asks for a token: {error.detail}; give it by --token-file") from error
    if error.status is None and error.reason != "unreachable":
        raise Stop(CONFIG, error.detail) from error
    if error.status is None or error.status in TRY_AGAIN:
        raise Stop(TRY_LATER, f"{error}; given up after {patience:g} s") from error


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise Stop(CONFIG, f"{file} cannot be read: {error.strerror}") from error
