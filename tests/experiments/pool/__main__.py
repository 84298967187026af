"""Play the pool with its experts on the streams of the other tables, and on two that no setting was chosen on."""

from pathlib import Path

import click
from tests.experiments.common.tables import Row, choose_labels, run_rows, write_table
from tests.experiments.pool.page import NAME, plot, render
from tests.experiments.pool.runs import run_entry, summarize
from tests.experiments.pool.streams import STREAMS


def run_named(name: str, rounds: int, seed: int, work: Path) -> Row:
    """Return the summary of one run."""
    return summarize(run_entry(name, STREAMS[name], rounds, seed, work))


@click.command()
@click.option("--rounds", type=int, help="Rounds of each run; by default those of the stream.")
@click.option("--seeds", default=3, show_default=True, help="Number of seeds, starting at 0.")
@click.option("--only", multiple=True, metavar="STREAM", help="A stream; may be repeated. All by default.")
@click.option("--jobs", default=2, show_default=True, help="Number of parallel runs.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/experiments/pool"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(rounds: int | None, seeds: int, only: tuple[str, ...], jobs: int, work: Path, out: Path) -> None:
    """Write pool.json, .md and .png into OUT; runs that are finished in WORK are reused."""
    names = choose_labels(only, [*STREAMS])
    work.mkdir(parents=True, exist_ok=True)
    asked = [(name, rounds or STREAMS[name].rounds, seed, work) for name in names for seed in range(seeds)]
    run_rows(jobs, run_named, asked, lambda rows: _write(out, rows))
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


def _write(out: Path, rows: list[Row]) -> None:
    write_table(out, NAME, __package__, max(row["asked"]["rounds"] for row in rows), rows, render, plot(rows))


if __name__ == "__main__":
    main()
