"""``python -m tests.benchmarks.memory``: measure the error of the estimate of a rank's peak memory."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import click

from streams.atomic_files import replace_file
from tests.benchmarks.memory_child import NETWORKS, SAVINGS
from tests.benchmarks.resident import RETURN_MEMORY
from tests.benchmarks.surroundings import describe_machine, read_commit
from tests.support.launch_ranks import places

NAME = "bench_memory"
STEPS = (1, 8, 32)
GOAL = 0.15


class Case(NamedTuple):
    """A configuration that is measured in a separate process."""

    network: str
    steps: int
    saving: str
    kind: str = "local"
    stage: int = 0


CASES = [
    *(Case(network, steps, saving) for steps in STEPS for network in NETWORKS for saving in SAVINGS),
    *(Case("transformer", 8, "plain", "deepspeed", stage) for stage in range(4)),
]


def measure(case: Case) -> dict[str, int]:
    """Return the bytes ``measured`` and the ``estimate``; raises ``RuntimeError`` with the output of the process."""
    command = [sys.executable, "-m", "tests.benchmarks.memory_child", *map(str, case)]
    environment = {**os.environ, **RETURN_MEMORY, **places(1)[0]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("PEAK")]
    if not lines:
        raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
    found: dict[str, int] = json.loads(lines[0].removeprefix("PEAK"))
    return found


def compute_error(row: dict[str, Any]) -> float:
    """Return the relative error of the estimate."""
    return float(row["estimate"] / row["measured"] - 1)


def render(result: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    rows, machine = result["rows"], result["machine"]
    worst = max((abs(compute_error(row)) for row in rows), default=0.0)
    text = f"""# The estimate of a rank's peak memory

`{result["command"]}`, commit {result["commit"]}; {machine["processor"]}, load {machine["load_before"]:.1f} before.

*Measured* is the peak resident memory that two rounds of learning (exact, Adam, two tasks per meta-step, one thread)
add to a process that has already learned with a tiny network. *Estimated* is what `online-meta check` estimates.
Transformer: 4 blocks, width 128, 10 + 10 sequences of 64. Conv4: 48 filters, BatchNorm, 5 + 25 images of 42 x 42.

The largest error is {worst:.1%}; the goal is {GOAL:.0%}: {"met" if worst <= GOAL else "**missed**"}.

| network | K | saving | engine | measured | estimated | off by |
|---|---|---|---|---|---|---|
"""
    for row in rows:
        engine = "local" if row["kind"] == "local" else f"DeepSpeed, stage {row['stage']}"
        measured, estimated = row["measured"] / 1e6, row["estimate"] / 1e6
        text += f"| {row['network']} | {row['steps']} | {row['saving']} | {engine} "
        text += f"| {measured:.1f} MB | {estimated:.1f} MB | {compute_error(row):+.1%} |\n"
    return text


@click.command()
@click.option("--only", default="", help="Only networks whose name starts with this.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(only: str, out: Path) -> None:
    """Print and write the error of the estimate."""
    result: dict[str, Any] = {"command": " ".join(["python -m tests.benchmarks.memory", *sys.argv[1:]])}
    result |= {"commit": read_commit(), "machine": describe_machine(), "rows": []}
    for case in CASES:
        if case.network.startswith(only):
            result["rows"].append({**case._asdict(), **measure(case)})
            click.echo(f"{time.strftime('%H:%M:%S')} {case}: {compute_error(result['rows'][-1]):+.1%}", err=True)
    replace_file(out / f"{NAME}.json", json.dumps(result, indent=1).encode(), durable=False)
    replace_file(out / f"{NAME}.md", render(result).encode(), durable=False)
    click.echo(render(result))


if __name__ == "__main__":
    main()
