"""online-meta submit: send task files to a daemon, a broker or a folder."""

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
"""Reasons, not from a daemon, that concern one task only: the next task may still be accepted."""


@click.command("submit")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--url", required=True, help="Address to send to, for example http://127.0.0.1:8780")
@click.option("--token-file", type=click.Path(path_type=Path), help="File that contains the daemon's token.")
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=RETRY_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="How long to retry a task while the daemon is unreachable, full or busy.",
)
def command(files: tuple[Path, ...], url: str, token_file: Path | None, patience: float) -> int:
    """Send task FILES (safetensors or JSON) in the order given. The id of a task is its file name without the suffix.

    The address is that of a daemon (http://host:port), or of a place from which a daemon reads:
    redis://host:port/db?stream=name, kafka://host:port/topic, nats://host:port/stream-or-subject, file:///folder. The
    parameters of a broker's address name the files with its password and its certificate authority:
    rediss://me@host/0?stream=name&password_file=F&ca_file=F. A task counts as sent once it is durable there.

    It is safe to send a file again: the daemon knows its id. The command waits while a daemon's backlog is full. Exit
    code 78: a task was rejected; the other tasks are sent nevertheless. Exit code 75: no task was accepted for
    --patience seconds; run the command again later.
    """
    console = Console(stderr=True)
    for file in files:  # A file that cannot be read is reported before any task is sent.
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
    """Yield a producer for an address; print at once if the daemon is unreachable."""
    with _address_error_context():
        split_address(url)
    if is_address(url):
        with daemon_client(url, token_file) as client:
            _warn_if_unreachable(client, console, patience)
            yield HttpProducer(url, client, patience)
        return
    if token_file is not None:
        raise ConfigError(f"--token-file is only for a daemon; {url} is not the address of a daemon")
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
        console.print(f"no daemon answers at {client.base_url}; retrying for {patience:g} s", markup=False)


def _raise_unless_rejected(error: SubmitError, url: str, patience: float) -> None:
    """Raise ``CommandError`` if the next task would fail for the same reason as this one."""
    if error.status == HTTPStatus.UNAUTHORIZED:
        raise CommandError(CONFIG, f"{url} requires a token: {error.detail}; pass it with --token-file") from error
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
