"""online-meta demo: the main job, on real data, in a few minutes."""

import signal
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from deploy.config import Config
from deploy.demo import Demo, choose_port, demo_config, demo_source, start_daemon, stream_tasks, wait_for_hindsight
from deploy.exits import USAGE, CommandError
from deploy.report import display_name
from deploy.summary import summary_table
from online_meta.regret import MAIN_LEARNER


@click.command("demo")
@click.option("--rounds", type=click.IntRange(min=1), default=300, show_default=True, help="How many tasks to stream.")
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder; runs/demo-DATE-TIME by default.")
@click.option("--port", type=click.IntRange(0, 65535), default=8780, show_default=True, help="Where the dashboard is.")
@click.option("--keep-serving", is_flag=True, help="Leave the daemon up at the end, until Ctrl-C.")
def command(rounds: int, out: Path | None, port: int, keep_serving: bool) -> None:
    """Start the daemon, stream real few-shot tasks through its HTTP front door, and report.

    The stream is rainbow digits (Finn et al., 2019): handwritten digits in 7 colours, 2 sizes and 4 rotations,
    learned by Follow the Meta-Leader beside its baselines while they arrive.
    """
    folder = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    if folder.exists() and any(folder.iterdir()):
        raise CommandError(USAGE, f"{folder} is not empty: give --out another folder")
    port = choose_port(port)
    config, serve_command = demo_config(folder, port)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"starting the daemon in {folder} ...")
    url = f"http://127.0.0.1:{port}"
    with start_daemon(serve_command, url, folder / "daemon.log") as demo:
        console.print(f"dashboard: [bold]{url}/[/]   API: {url}/docs   log: {folder / 'daemon.log'}")
        _play(demo, config, rounds, console)
        if keep_serving:
            console.print(f"all {rounds} tasks are learned; the dashboard stays at {url}/ until Ctrl-C")
            _wait_for_interrupt()
        console.print("draining: the last checkpoint and the report ...")
    console.print(summary_table(_read_report(folder)))
    for file, what in (
        ("report.html", "the report with its plot"),
        ("report.json", "the same for programs"),
        ("regret.png", "the plot alone"),
        ("rounds.jsonl", "every round"),
    ):
        console.print(f"  {folder / file}: {what}")
    console.print("next: README.md, 'A run of your own'")


def _play(demo: Demo, config: Config, rounds: int, console: Console) -> None:
    """Stream the tasks and show how it goes: a live display on a terminal, a line now and then elsewhere."""
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )
    bar = progress.add_task("rounds", total=rounds)
    start_time, reported = time.monotonic(), 0
    with Live(progress, console=console, refresh_per_second=4, transient=True) as live:
        for status in stream_tasks(demo, demo_source(config, "rainbow_digits"), rounds):
            learned = status["rounds"]["learned"] + status["rounds"]["skipped"]
            progress.update(bar, completed=learned)
            live.update(Group(progress, live_table(status, learned / (time.monotonic() - start_time))))
            if not console.is_terminal and learned >= reported + 25:
                reported = learned
                console.print(status_line(status, learned / (time.monotonic() - start_time), rounds - learned))
        progress.update(bar, description="the hindsight comparator catches up", total=None)
        for status in wait_for_hindsight(demo, rounds):
            live.update(Group(progress, live_table(status, rounds / (time.monotonic() - start_time))))


def live_table(status: dict[str, Any], pace: float) -> Table:
    """Return what is shown live: losses before and after adaptation, regret, tasks per second."""
    table = Table(show_header=False, box=None)
    last = status["last"]
    if last and not last["skipped"]:
        accuracy = "" if last["accuracy"] is None else f", accuracy {last['accuracy']:.0%}"
        table.add_row("last task", f"loss {last['loss_before']:.3f} -> {last['loss_after']:.3f}{accuracy}")
    table.add_row("pace", f"{pace:.2f} tasks/s, {status['rounds']['pending']} waiting")
    for name, learner in status["learners"].items():
        if learner["mean_loss_last_100"] is not None:
            label = "FTML" if name == MAIN_LEARNER else display_name(name)
            table.add_row(f"{label}, last 100", f"loss {learner['mean_loss_last_100']:.3f}")
    for against, regret in status["regret"].items():
        table.add_row(
            f"regret against {display_name(against)}", f"{regret['value']:+.1f} as of round {regret['as_of_round']}"
        )
    return table


def status_line(status: dict[str, Any], pace: float, left: int) -> str:
    """Return the progress as one line, for logs."""
    last, regrets = status["last"], status["regret"]
    losses = f"loss {last['loss_before']:.3f} -> {last['loss_after']:.3f}" if last and not last["skipped"] else ""
    reported = ", ".join(f"{display_name(against)} {regret['value']:+.1f}" for against, regret in regrets.items())
    learned = status["rounds"]["learned"]
    return (
        f"round {learned}: {losses}; regret against {reported}; {pace:.2f} tasks/s, {left / max(pace, 1e-9):.0f} s left"
    )


def _read_report(folder: Path) -> dict[str, Any]:
    import json

    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def _wait_for_interrupt() -> None:
    try:
        signal.pause()
    except KeyboardInterrupt:
        return
