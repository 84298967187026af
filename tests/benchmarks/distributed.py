"""``python -m tests.benchmarks.distributed``: measure the gain and the cost of several ranks, into docs/results."""

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click

from streams.atomic_files import replace_file
from streams.producers import submit
from tests.benchmarks.goals import format_verdict
from tests.benchmarks.one_rank import BATCH, SIDE
from tests.benchmarks.ranks import time_ranks
from tests.benchmarks.stalls import compute_share, time_stalls
from tests.benchmarks.surroundings import describe_machine, log_progress, read_commit
from tests.recovery.test_kills import body
from tests.recovery.test_ranks import ENGINE, kill_rank
from tests.support.daemon import RestartedDaemon, wait_for
from trainers.journal.jsonl import LineReader

NAME = "bench_distributed"
WAYS = {"local, 1 rank": ("local", 1), "deepspeed, 1 rank": ("deepspeed", 1), "deepspeed, 2 ranks": ("deepspeed", 2)}


def time_steps(kind: str, world: int, steps: int) -> float:
    """Return the median seconds of a meta-step on ``world`` ranks, each a process with one thread."""
    command = [sys.executable, "-m", "tests.benchmarks.one_rank", kind, "0", str(steps)]
    return statistics.median(time_ranks(command, world))


def race(rounds: int, steps: int) -> dict[str, list[float]]:
    """Return the seconds of a meta-step for each of ``WAYS``, one value per round; the ways take turns."""
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for round in range(rounds):
        for name, (kind, world) in WAYS.items():
            log_progress(f"round {round + 1} of {rounds}: {name}")
            found[name].append(time_steps(kind, world, steps))
    return found


class Recoveries(NamedTuple):
    """Seconds from each fault until the next round is learned; restarts of ranks and agent; seconds of the rounds."""

    taken: list[float]
    restarts: int
    rounds: list[float]


def stop_rank(served: RestartedDaemon, number: int) -> None:
    """Stop a rank with SIGSTOP, so that it hangs."""
    os.kill(wait_for("there is a rank", lambda: served.rank(number)), signal.SIGSTOP)


def time_recoveries(fault: Callable[[RestartedDaemon, int], None], times: int, folder: Path) -> Recoveries:
    """Run a daemon with a tiny network on two ranks, and cause ``fault`` ``times`` times."""
    served = RestartedDaemon(folder, more=ENGINE)
    taken, fed = [], 0
    for number in range(times):
        log_progress(f"{fault.__name__}, {number + 1} of {times}")
        submit(served.url, f"t{fed}", body(fed))
        fed += 1
        wait_for("it is learned", lambda fed=fed: served.status()["rounds"]["learned"] == fed, 120)
        fault(served, number % 2)
        began = time.monotonic()
        submit(served.url, f"t{fed}", body(fed))
        fed += 1
        wait_for("the next one is learned", lambda fed=fed: served.status()["rounds"]["learned"] == fed, 120)
        taken.append(time.monotonic() - began)
    restarts = served.status()["trainer"]["restarts"]
    served.drain()
    return Recoveries(taken, restarts, [line["seconds"] for line in LineReader(served.run / "rounds.jsonl").refresh()])


def compute_figures(result: dict[str, Any]) -> list[tuple[str, float, float, str]]:
    """Return for each figure its name, its value, its goal and the verdict."""
    seconds = {name: statistics.median(taken) for name, taken in result["steps"].items()}
    killed, stopped = (Recoveries(*result[name]) for name in ("killed", "stopped"))
    more = seconds["local, 1 rank"] / seconds["deepspeed, 2 ranks"]
    cost = seconds["deepspeed, 1 rank"] / seconds["local, 1 rank"]
    ninety_ninth = sorted(stopped.rounds)[int(0.99 * (len(stopped.rounds) - 1))]
    stalls = result["stalls"]
    at_most = [
        ("time of deepspeed stage 0 / local, one rank", cost, 1.10),
        (f"seconds from a kill to the next round, median of {len(killed.taken)}", statistics.median(killed.taken), 6.0),
        ("the longest of these", max(killed.taken), 15.0),
        (
            f"seconds from a stop (hang) to the next round, median of {len(stopped.taken)} (3 x p99 of rounds + 10)",
            statistics.median(stopped.taken),
            3 * ninety_ninth + 10,
        ),
        ("checkpoint after each round: time that training waits / time of a round, Conv4", compute_share(stalls), 0.02),
        (
            "checkpoint after each round: time of a round with / without checkpoints",
            statistics.median(stalls["with"]) / statistics.median(stalls["without"]),
            1.02,
        ),
    ]
    first = ("tasks per second, 2 ranks / the local engine", more, 1.8, "met" if more >= 1.8 else "**missed**")
    restarts = killed.restarts / len(killed.taken)
    second = ("restarts per killed rank", restarts, 1.0, "met" if restarts == 1 else "**missed**")
    return [first, second, *((what, found, most, format_verdict(found, most)) for what, found, most in at_most)]


def render(result: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    machine = result["machine"]
    about = f"""# Several ranks

`{result["command"]}`, commit {result["commit"]}; {machine["processor"]}, load {machine["load_before"]:.1f} before.

A meta-step of exact MAML (K = 5) on {BATCH} tasks of Conv4-32, {SIDE} x {SIDE}, 5-way 1-shot. Each rank is a process
with one thread. The configurations take turns, each time in fresh processes. The time is the median over the rounds of
the median meta-step.

| ranks | time of a meta-step | min to max |
|---|---|---|
"""
    for name, taken in result["steps"].items():
        about += f"| {name} | {statistics.median(taken):.3f} s | {min(taken):.3f} to {max(taken):.3f} |\n"
    about += "\n| figure | found | goal | verdict |\n|---|---|---|---|\n"
    return about + "".join(
        f"| {what} | {found:.3g} | {goal:g} | {outcome} |\n" for what, found, goal, outcome in compute_figures(result)
    )


@click.command()
@click.option("--rounds", default=5, show_default=True, help="How many times each configuration is timed.")
@click.option("--steps", default=5, show_default=True, help="Meta-steps per timing.")
@click.option("--kills", default=20, show_default=True)
@click.option("--stops", default=6, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(rounds: int, steps: int, kills: int, stops: int, out: Path) -> None:
    """Print and write the gain and the cost of several ranks."""
    result: dict[str, Any] = {"command": " ".join(["python -m tests.benchmarks.distributed", *sys.argv[1:]])}
    result |= {"commit": read_commit(), "machine": describe_machine(), "steps": race(rounds, steps)}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        result["killed"] = time_recoveries(kill_rank, kills, Path(folder) / "killed")
        result["stopped"] = time_recoveries(stop_rank, stops, Path(folder) / "stopped")
        log_progress("checkpoints")
        result["stalls"] = time_stalls(20, Path(folder))
    replace_file(out / f"{NAME}.json", json.dumps(result, indent=1).encode(), durable=False)
    replace_file(out / f"{NAME}.md", render(result).encode(), durable=False)
    click.echo(render(result))


if __name__ == "__main__":
    main()
