"""online-meta demo: start a daemon, stream handwritten digits to it, and report."""

import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files as package_files
from pathlib import Path
from types import FrameType
from typing import Any

import click
import httpx
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from deploy.config.config import Config, ServeSettings, read_config
from deploy.exits import BROKEN, TRY_LATER, USAGE, CommandError, ConfigError
from deploy.processes.child import PR_SET_PDEATHSIG
from deploy.reports.report import choose_shown, describe_regret, format_losses, format_mean, summary_table
from deploy.server.listener import bind
from online_meta import registry
from online_meta.regret.verdict import display_name
from streams.private_files import private_umask
from streams.producers import connect, submit
from streams.types import TaskSource

MAX_PENDING_TASKS = 12
"""Limit of tasks sent but not yet learned: enough to keep the trainer busy, few enough to keep the display current."""


END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end the demo as Ctrl-C does."""


START_SECONDS = 120.0
"""Time limit for the daemon to start."""


HINDSIGHT_SECONDS = 240.0
"""Time limit for the hindsight comparator to cover all rounds."""


@dataclass(frozen=True)
class Demo:
    """A running demo: the daemon's process, an HTTP client connected to it, and its address."""

    daemon: "subprocess.Popen[bytes]"
    client: httpx.Client
    url: str


def demo_config(out: Path, port: int) -> tuple[Config, list[str]]:
    """Return the demo's configuration and the command that starts its daemon.

    Args:
        out: folder of the run.
        port: port of the daemon.
    """
    path = Path(str(package_files("deploy") / "demo.toml"))
    overrides = (f"run.path={json.dumps(str(out))}", f"serve.port={port}")
    sets = [part for override in overrides for part in ("--set", override)]
    return read_config(path, overrides), [sys.executable, "-m", "online_meta", "serve", str(path), *sets]


@contextmanager
def start_daemon(command: list[str], url: str, log: Path) -> Iterator[Demo]:
    """Start the daemon, wait until it answers, and drain it at the end of the block.

    SIGTERM, SIGHUP (a terminal that closes) and SIGINT (Ctrl-C) end the block, too. If this process is killed instead,
    the kernel tells the daemon to drain (on Linux). A Ctrl-C while the daemon drains kills it.

    Args:
        command: command line of the daemon.
        url: address at which it will answer.
        log: file to which its output is appended.

    Raises:
        CommandError: if the daemon does not start or ends with an error.
        SystemExit: on SIGTERM and SIGHUP, with 128 plus the number of the signal.
    """
    with private_umask():
        log.parent.mkdir(parents=True, exist_ok=True)
        output = open(log, "ab")  # noqa: SIM115 - closed below
    # A session of its own, so that a terminal signals only this process, which then drains the daemon once.
    with output, _exit_on_signals():
        daemon = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, preexec_fn=_drain_with_parent()
        )
        try:
            with connect(url) as client:
                _wait_until_ready(daemon, client, log)
                yield Demo(daemon, client, url)
        finally:
            for kind in END_SIGNALS:
                signal.signal(kind, signal.SIG_IGN)
            signal.signal(signal.SIGINT, lambda *_: daemon.kill())
            if daemon.poll() is None:
                daemon.terminate()
            code = daemon.wait()
    if code != 0:
        raise CommandError(BROKEN, f"the daemon ended with exit code {code}; its last messages are in {log}")


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Raise ``SystemExit`` on each of ``END_SIGNALS`` during the block, unless the signal is ignored (``nohup``)."""

    def exit(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {kind: signal.getsignal(kind) for kind in (*END_SIGNALS, signal.SIGINT)}
    for kind in END_SIGNALS:
        if before[kind] is not signal.SIG_IGN:
            signal.signal(kind, exit)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _drain_with_parent() -> Callable[[], object] | None:
    """Return what a new process calls so that it receives SIGTERM when its parent dies; None if not on Linux."""
    if sys.platform != "linux":
        return None
    return partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_until_ready(daemon: "subprocess.Popen[bytes]", client: httpx.Client, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        code = daemon.poll()
        if code is not None:
            raise CommandError(code or BROKEN, log.read_text(encoding="utf-8", errors="replace").strip()[-2000:])
        try:
            if client.get("/healthz").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise CommandError(TRY_LATER, f"the daemon did not answer within {START_SECONDS:.0f} s; see {log}")


def choose_port(port: int) -> int:
    """Return ``port``, or a free port if ``port`` is 0.

    Raises:
        CommandError: with exit code 75 if another process listens on the port.
    """
    with closing(bind(ServeSettings(port=port))) as listener:
        chosen: int = listener.getsockname()[1]
        return chosen


def demo_source(config: Config, kind: str) -> TaskSource:
    """Return the demo's stream of tasks, which its client submits over HTTP.

    Args:
        config: of the demo.
        kind: name of a source in ``streams.sources``.

    Raises:
        ConfigError: if the source needs a package that is not installed.
    """
    import streams.sources

    module = registry.load_module(streams.sources, kind)
    try:
        source: TaskSource = module.create_source(module.Settings(), config.task, kind, config.run.seed)
    except ImportError as error:
        raise ConfigError(
            f"the demo's data set is not installed: run pip install 'online-meta[digits]' ({error})"
        ) from error
    return source


def stream_tasks(demo: Demo, source: TaskSource, rounds: int) -> Iterator[dict[str, Any]]:
    """Submit ``rounds`` tasks and yield the daemon's status until all are learned.

    At most ``MAX_PENDING_TASKS`` tasks are sent but not yet learned.

    Raises:
        CommandError: if the daemon ends before all tasks are learned.
    """
    arrivals = source.read(after=None)
    sent = 0
    status = demo.client.get("/v1/status").json()
    while status["rounds"]["learned"] + status["rounds"]["skipped"] < rounds:
        capacity = min(rounds - sent, MAX_PENDING_TASKS - (sent - status["rounds"]["learned"]))
        for _ in range(capacity):
            arrival = next(arrivals)
            while arrival is None:
                arrival = next(arrivals)
            submit(demo.url, arrival.id, arrival.body, client=demo.client)
            sent += 1
        yield status
        time.sleep(0.25)
        if demo.daemon.poll() is not None:
            raise CommandError(BROKEN, "the daemon ended before all tasks were learned; its log says why")
        status = demo.client.get("/v1/status").json()
    yield status


def wait_for_hindsight(demo: Demo, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the daemon's status until the hindsight comparator covers all rounds, for ``HINDSIGHT_SECONDS`` at most."""
    deadline = time.monotonic() + HINDSIGHT_SECONDS
    while time.monotonic() < deadline:
        status = demo.client.get("/v1/status").json()
        yield status
        if status["regret"].get("hindsight", {"as_of_round": 0})["as_of_round"] >= rounds:
            return
        time.sleep(0.5)


@click.command("demo")
@click.option("--rounds", type=click.IntRange(min=1), default=300, show_default=True, help="Number of tasks to stream.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run; by default runs/demo-DATE-TIME.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8780,
    show_default=True,
    help="Port of the daemon and its dashboard; 0 chooses a free port.",
)
@click.option("--keep-serving", is_flag=True, help="Keep the daemon running at the end, until Ctrl-C.")
def command(rounds: int, out: Path | None, port: int, keep_serving: bool) -> None:
    """Start a daemon, stream few-shot tasks to it over HTTP, and print a report.

    The tasks are rainbow digits (Finn et al., 2019): handwritten digits in 7 colours, 2 sizes and 4 rotations. Follow
    the Meta-Leader and its baselines learn them as they arrive.
    """
    folder = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    if folder.exists() and any(folder.iterdir()):
        raise CommandError(USAGE, f"{folder} is not empty: choose another folder with --out")
    port = choose_port(port)
    config, serve_command = demo_config(folder, port)
    source = demo_source(config, "rainbow_digits")  # first, because it may need a package that is not installed
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"starting the daemon in {folder} ...")
    url = f"http://127.0.0.1:{port}"
    with start_daemon(serve_command, url, folder / "daemon.log") as demo:
        console.print(f"dashboard: [bold]{url}/[/]   API: {url}/docs   log: {folder / 'daemon.log'}")
        _play(demo, source, rounds, console)
        if keep_serving:
            console.print(f"all {rounds} tasks are learned; the dashboard remains at {url}/ until Ctrl-C")
            _wait_for_end()
        console.print("draining: writing the last checkpoint and the report ...")
    console.print(summary_table(_read_report(folder)))
    for file, what in (
        ("report.html", "the report with a plot"),
        ("report.json", "the report as JSON"),
        ("regret.png", "the plot"),
        ("rounds.jsonl", "one line per round"),
    ):
        console.print(f"  {folder / file}: {what}")
    console.print("next: a run on rows of your own, docs/tutorials/your-own-rows.md")


def _play(demo: Demo, source: TaskSource, rounds: int, console: Console) -> None:
    """Stream the tasks and show the progress: a live display on a terminal, otherwise a line every 25 rounds."""
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )
    bar = progress.add_task("rounds", total=rounds)
    start_time, reported = time.monotonic(), 0
    with Live(progress, console=console, refresh_per_second=4, transient=True) as live:
        for status in stream_tasks(demo, source, rounds):
            learned = status["rounds"]["learned"] + status["rounds"]["skipped"]
            progress.update(bar, completed=learned)
            live.update(Group(progress, live_table(status, learned / (time.monotonic() - start_time))))
            if not console.is_terminal and learned >= reported + 25:
                reported = learned
                console.print(status_line(status, learned / (time.monotonic() - start_time), rounds - learned))
        progress.update(bar, description="waiting for the hindsight comparator", total=None)
        for status in wait_for_hindsight(demo, rounds):
            live.update(Group(progress, live_table(status, rounds / (time.monotonic() - start_time))))


def live_table(status: dict[str, Any], pace: float) -> Table:
    """Return the table of the live display: losses before and after adaptation, regret, tasks per second.

    Args:
        status: answer of ``/v1/status``.
        pace: tasks learned per second.
    """
    table = Table(show_header=False, box=None)
    last = status["last"]
    if last and not last["skipped"]:
        accuracy = "" if last["accuracy"] is None else f", accuracy {last['accuracy']:.0%}"
        table.add_row("last task", f"{format_losses(last)}{accuracy}")
    table.add_row("pace", f"{pace:.2f} tasks/s, {status['rounds']['pending']} waiting")
    shown = choose_shown(status["learners"], status["verdict"])
    for name, learner in shown.items():
        if learner["mean_loss_last_100"] is not None:
            mean = format_mean(learner["mean_loss_last_100"], learner["rounds_last_100"], "loss {:.3f}")
            table.add_row(f"{display_name(name)}, last 100", mean)
    for against, regret in status["regret"].items():
        if against in shown or regret["kind"] != "baseline":
            table.add_row(f"regret against {display_name(against)}", describe_regret(regret))
    table.add_row("verdict", status["verdict"]["sentence"])
    return table


def status_line(status: dict[str, Any], pace: float, left: int) -> str:
    """Return the progress as one line of text.

    Args:
        status: answer of ``/v1/status``.
        pace: tasks learned per second.
        left: number of tasks still to learn.
    """
    last, shown = status["last"], choose_shown(status["learners"], status["verdict"])
    regrets = {name: one for name, one in status["regret"].items() if name in shown or one["kind"] != "baseline"}
    losses = format_losses(last) if last and not last["skipped"] else ""
    reported = ", ".join(f"{display_name(against)} {regret['value']:+.1f}" for against, regret in regrets.items())
    learned = status["rounds"]["learned"]
    return (
        f"round {learned}: {losses}; regret against {reported}; {pace:.2f} tasks/s, {left / max(pace, 1e-9):.0f} s left"
    )


def _read_report(folder: Path) -> dict[str, Any]:
    import json

    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def _wait_for_end() -> None:
    """Wait for Ctrl-C or another signal that ends the demo."""
    try:
        signal.pause()
    except (KeyboardInterrupt, SystemExit):
        return
