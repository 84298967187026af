"""Compare FTML with three meta-gradients and two replay policies to baselines, on two streams and several seeds."""

import json
import time
from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, NamedTuple

import click
from deploy.commands.compare import Replay
from deploy.reports.comparison import Entry
from trainers.journal.jsonl import LineReader
from trainers.journal.run_files import RunFiles

from tests.experiments.common.histories import make_history
from tests.experiments.common.playing import finish_replays
from tests.experiments.common.tables import format_mean, read_command, read_commit, write_files

PLAIN = ("regret.comparator=[]", "pool.aggregation=none")
FTML_ONLY = ("regret.baselines=[]", *PLAIN)


class Stream(NamedTuple):
    """A stream of the table: its source, its configuration, its rounds, and the fewer rounds of full replay."""

    source: str
    config: str
    rounds: int
    full_rounds: int


STREAMS = {
    "rainbow_digits": Stream("rainbow_digits", "demo.toml", 300, 60),
    "sinusoid": Stream("sinusoid", "sinusoid.toml", 300, 60),
}
REPTILE = {
    "rainbow_digits": ("meta.gradient=reptile", "meta.optimizer=sgd", "meta.lr=0.5", "inner.steps=5", "inner.lr=0.1"),
    "sinusoid": ("meta.gradient=reptile", "meta.optimizer=sgd", "meta.lr=0.5", "inner.steps=16", "inner.lr=0.02"),
}


def list_replays(name: str, seeds: Sequence[int], work: Path) -> list[Replay]:
    """Return the runs on a stream: of each seed, the variants on a history of its own."""
    stream = STREAMS[name]
    config = Path(str(package_files("deploy"))) / stream.config
    found = []
    for seed in seeds:
        history = make_history(work / name / str(seed) / "history", stream.source, seed, stream.rounds)
        variants = {
            "exact": (stream.rounds, PLAIN),
            "first order": (stream.rounds, ("meta.gradient=first_order", *FTML_ONLY)),
            "reptile": (stream.rounds, (*REPTILE[name], *FTML_ONLY)),
        }
        if seed == 0:  # Full replay costs more with every round, so it has one seed and fewer rounds.
            variants["full replay"] = (stream.full_rounds, ("meta.replay=all", *FTML_ONLY))
            variants["uniform replay"] = (stream.full_rounds, FTML_ONLY)
        for variant, (rounds, overrides) in variants.items():
            found.append(Replay(variant, seed, config, overrides, history, rounds, work / name / "replays"))
    return found


def make_lines(stream: str, entry: Entry) -> list[dict[str, Any]]:
    """Return the lines of the table of one variant on a stream, one for each seed."""
    lines = []
    for seed, folder in entry.folders.items():
        report = json.loads((folder / "report.json").read_bytes())
        seconds = sum(line["seconds"] for line in LineReader(RunFiles(folder).rounds).lines())
        about = {"stream": stream, "variant": entry.name, "seed": seed, "rounds": report["rounds"]}
        lines.append({**about, "seconds": seconds, "learners": report["learners"]})
    return lines


@click.command()
@click.option("--seeds", default=3, show_default=True, help="Number of seeds, starting at 0.")
@click.option("--jobs", default=2, show_default=True, help="Number of parallel runs.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/experiments"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(seeds: int, jobs: int, work: Path, out: Path) -> None:
    """Write first_table.json and first_table.md into OUT; runs that are finished in WORK are reused."""
    began = time.monotonic()
    found = finish_replays({name: list_replays(name, range(seeds), work) for name in STREAMS}, jobs)
    lines = [line for stream, entries in found.items() for entry in entries for line in make_lines(stream, entry)]
    about = {"command": read_command("tests.experiments.first_table"), "commit": read_commit()}
    result = {**about, "wall_seconds": time.monotonic() - began, "runs": lines}
    write_files(out, "first_table", result, render(result))
    click.echo((out / "first_table.md").read_text(encoding="utf-8"))


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
