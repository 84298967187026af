"""online-meta submit: stream task files to a daemon."""

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

import click
import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deploy.commands._client import daemon_client, is_address
from deploy.exits import CONFIG, TRY_LATER, CommandError, ConfigError
from streams.producers import RETRY_SECONDS, RETRY_STATUSES, Producer, SubmitError, open_producer, split_address
from streams.producers.errors import UNREACHABLE
from streams.producers.http import HttpProducer

ABOUT_THE_TASK = ("bad_id", "too_large")
"""Reasons, from others than a daemon, that say nothing about the next task."""


@click.command("submit")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--url", required=True, help="To whom, for example http://127.0.0.1:8780")
@click.option("--token-file", type=click.Path(path_type=Path), help="A file that holds the daemon's token.")
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=RETRY_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="How long to try a task again while the daemon is away, full or busy.",
)
def command(files: tuple[Path, ...], url: str, token_file: Path | None, patience: float) -> int:
    """Send task FILES (safetensors) in the order given; a task's id is its file's name without the ending.

    The address says to whom: a daemon (http://host:port), or where one reads from: redis://host:port/db?stream=name,
    kafka://host:port/topic, nats://host:port/stream-or-subject, file:///folder. How to log in at a broker, and whom to
    believe, are files that the end of its address names: rediss://me@host/0?stream=name&password_file=F&ca_file=F. A
    task is sent once it is durable there.
    Sending a file again is harmless: the daemon knows its id. Waits while a daemon's backlog is full. Exits 78
    when a task was refused; the others are sent all the same. Exits 75 when nothing is taken for --patience
    seconds: run it again later.
    """
    console = Console(stderr=True)
    for file in files:  # A name that is mistyped is told before anything is sent.
        _read(file, 0)
    sent = rejected = new = known = 0
    try:
        with _producer(url, token_file, patience, console) as producer, _progress(console) as progress:
            for file in progress.track(files, description="submitting"):
                try:
                    receipt = producer.send(file.stem, _read(file))
                    new += receipt is None or not receipt.duplicate
                    known += receipt is not None and receipt.duplicate
                except SubmitError as error:
                    _raise_unless_rejected(error, url, patience)
                    rejected += 1
                    message = f"{file}: {error}"
                    progress.console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
                sent += 1
    finally:
        left = f", {len(files) - sent} not sent" if sent < len(files) else ""
        done = f"{new} new, {known} already there" if is_address(url) else f"{new} sent"
        click.echo(f"{done}, {rejected} refused{left}")
    return CONFIG if rejected else 0


@contextmanager
def _producer(url: str, token_file: Path | None, patience: float, console: Console) -> Iterator[Producer]:
    """Give what sends tasks to an address; a daemon that is away is told of at once."""
    with _address_error_context():
        split_address(url)
    if is_address(url):
        with daemon_client(url, token_file) as client:
            _warn_if_unreachable(client, console, patience)
            yield HttpProducer(url, client, patience)
        return
    if token_file is not None:
        raise ConfigError(f"--token-file is for a daemon; {url} is none")
    with _address_error_context():
        producer = open_producer(url, retry_seconds=patience)
    try:
        yield producer
    finally:
        producer.close()


@contextmanager
def _address_error_context() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--url {error.filename}: {error.strerror}") from error
    except (ValueError, ImportError) as error:
        raise ConfigError(f"--url {error}") from error


def _warn_if_unreachable(client: httpx.Client, console: Console, patience: float) -> None:
    try:
        client.get("/healthz")
    except (httpx.ConnectError, httpx.ConnectTimeout):
        console.print(f"no daemon answers at {client.base_url}; trying for {patience:g} s", markup=False)


def _raise_unless_rejected(error: SubmitError, url: str, patience: float) -> None:
    """Raise ``CommandError`` when the next task would fare no better than this one did."""
    if error.status == HTTPStatus.UNAUTHORIZED:
        raise CommandError(CONFIG, f"{url} asks for a token: {error.detail}; give it by --token-file") from error
    if error.reason in ABOUT_THE_TASK:
        return
    if error.status is None and error.reason != UNREACHABLE:
        raise CommandError(CONFIG, error.detail) from error
    if error.status is None or error.status in RETRY_STATUSES:
        raise CommandError(TRY_LATER, f"{error}; given up after {patience:g} s") from error


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _read(file: Path, max_bytes: int = -1) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read(max_bytes)
    except OSError as error:
        raise CommandError(CONFIG, f"{file} cannot be read: {error.strerror}") from error
