"""Compare FTML with three meta-gradients and two replay policies to baselines, on two streams and several seeds."""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.resources import files as package_files
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import click
from deploy.commands.replay import replay
from deploy.config.config import read_config
from rich.progress import Progress
from streams.atomic_files import replace_file

from tests.experiments.common.histories import make_history
from tests.experiments.common.tables import format_mean, read_command, read_commit

NO_COMPARATOR = ("regret.comparator=[]",)
FTML_ONLY = ("regret.baselines=[]", *NO_COMPARATOR)


class Stream(NamedTuple):
    """A stream of the table: its source, its configuration, its rounds, and the fewer rounds of full replay."""

    source: str
    config: str
    rounds: int
    full_rounds: int


class Entry(NamedTuple):
    """One run of the table."""

    stream: str
    variant: str
    seed: int
    rounds: int
    overrides: tuple[str, ...]


STREAMS = {
    "rainbow_digits": Stream("rainbow_digits", "demo.toml", 300, 60),
    "sinusoid": Stream("sinusoid", "sinusoid.toml", 300, 60),
}
REPTILE = {
    "rainbow_digits": ("meta.gradient=reptile", "meta.optimizer=sgd", "meta.lr=0.5", "inner.steps=5", "inner.lr=0.1"),
    "sinusoid": ("meta.gradient=reptile", "meta.optimizer=sgd", "meta.lr=0.5", "inner.steps=16", "inner.lr=0.02"),
}


def list_entries(seeds: Sequence[int]) -> list[Entry]:
    """List all runs, sorted so that those with the baselines come first, then by seed."""
    found = []
    for name, stream in STREAMS.items():
        for seed in seeds:
            whole = stream.rounds
            found += [
                Entry(name, "exact", seed, whole, NO_COMPARATOR),
                Entry(name, "first order", seed, whole, ("meta.gradient=first_order", *FTML_ONLY)),
                Entry(name, "reptile", seed, whole, (*REPTILE[name], *FTML_ONLY)),
            ]
        # Full replay costs more with every round, so it has one seed and fewer rounds, as has uniform replay.
        found.append(Entry(name, "full replay", 0, stream.full_rounds, ("meta.replay=all", *FTML_ONLY)))
        found.append(Entry(name, "uniform replay", 0, stream.full_rounds, FTML_ONLY))
    return sorted(found, key=lambda entry: (entry.variant != "exact", entry.seed))


def run_entry(entry: Entry, work: Path) -> dict[str, Any]:
    """Start or resume one run, and return its line of the table."""
    stream = STREAMS[entry.stream]
    config = read_config(
        Path(str(package_files("deploy") / stream.config)), (*entry.overrides, f"run.seed={entry.seed}")
    )
    history = work / entry.stream / str(entry.seed) / "history"
    out = work / entry.stream / str(entry.seed) / entry.variant.replace(" ", "_")
    began = time.monotonic()
    report = replay(config, history, out, entry.rounds, lambda what, done, of: None)
    return {**entry._asdict(), "seconds": time.monotonic() - began, **{k: report[k] for k in ("learners", "regret")}}


@click.command()
@click.option("--seeds", default=3, show_default=True, help="Number of seeds, starting at 0.")
@click.option("--jobs", default=2, show_default=True, help="Number of parallel runs.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/experiments"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(seeds: int, jobs: int, work: Path, out: Path) -> None:
    """Write first_table.json and first_table.md into OUT."""
    began = time.monotonic()
    for name, stream in STREAMS.items():
        for seed in range(seeds):
            make_history(work / name / str(seed) / "history", stream.source, seed, stream.rounds)
    todo = list_entries(range(seeds))
    lines: list[dict[str, Any]] = []
    with Progress() as progress, ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        bar = progress.add_task("runs", total=len(todo))
        for future in as_completed([pool.submit(run_entry, entry, work) for entry in todo]):
            lines.append(future.result())
            progress.advance(bar)
            _write(out, lines, time.monotonic() - began)
    click.echo((out / "first_table.md").read_text(encoding="utf-8"))


def _write(out: Path, lines: list[dict[str, Any]], wall_seconds: float) -> None:
    """Write the table with the runs so far."""
    lines.sort(key=lambda line: (line["stream"], line["variant"], line["seed"]))
    out.mkdir(parents=True, exist_ok=True)
    about = {"command": read_command("tests.experiments.first_table"), "commit": read_commit()}
    result = {**about, "wall_seconds": wall_seconds, "runs": lines}
    replace_file(out / "first_table.json", json.dumps(result, indent=1).encode(), durable=False)
    replace_file(out / "first_table.md", render(result).encode(), durable=False)


def render(result: dict[str, Any]) -> str:
    """Return the table as Markdown: means over the seeds and their standard errors."""
    rows: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for line in result["runs"]:
        for name, learner in line["learners"].items():
            label = f"FTML, {line['variant']}" if name == "ftml" else name.replace("_", " ")
            rows.setdefault((line["stream"], label, line["rounds"]), []).append({**learner, "seconds": line["seconds"]})
    text = [
        "# FTML next to its baselines",
        "",
        f"`{result['command']}`, commit {result['commit']}, {result['wall_seconds'] / 60:.0f} minutes.",
        "Mean over the seeds ± standard error. Loss and accuracy are those on the query set after adaptation; each",
        "task is scored before it is learned. Seconds are those of the whole run, with the baselines that share it.",
        "",
        "| stream | learner | rounds | loss, last 100 | accuracy, last 100 | cumulative loss | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for (stream, label, rounds), learners in sorted(rows.items()):
        figures = [
            _format_spread(learners, key)
            for key in ("mean_loss_last_100", "mean_accuracy_last_100", "cumulative_loss", "seconds")
        ]
        text.append(f"| {stream} | {label} | {rounds} | {' | '.join(figures)} |")
    return "\n".join([*text, ""])


def _format_spread(learners: list[dict[str, Any]], key: str) -> str:
    return format_mean([learner[key] for learner in learners if learner[key] is not None], ".3f")


if __name__ == "__main__":
    main()
