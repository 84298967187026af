"""Compare online learners on streams of regression tasks, synthetic and real."""

from pathlib import Path

import click
from tests.experiments.common.tables import Row, choose_labels, run_options, run_rows, write_table
from tests.experiments.regression.page import plot, render
from tests.experiments.regression.runs import COMPARATOR, LEARNERS, NAME, STREAMS, Entry, run_entry
from tests.experiments.regression.tuning import get_choice


@click.command()
@run_options(NAME, rounds=240, jobs=1, about="Rounds of each run, at least 10.")
@click.option("--stream", multiple=True, metavar="STREAM", help="A stream; may be repeated. All by default.")
def main(
    rounds: int, seeds: int, only: tuple[str, ...], stream: tuple[str, ...], jobs: int, work: Path, out: Path
) -> None:
    """Write regression_streams.json, .md and .png into OUT; runs that are finished in WORK are reused."""
    labels, streams = choose_labels(only, (*LEARNERS, COMPARATOR)), choose_labels(stream, [*STREAMS])
    (work / "programs").mkdir(parents=True, exist_ok=True)
    asked = [
        (Entry(name, label, rounds, seed), get_choice(name, label), work)
        for seed in range(seeds)
        for name in streams
        for label in labels
        if label in (*STREAMS[name].labels, COMPARATOR)
    ]
    run_rows(jobs, run_entry, asked, lambda rows: _write(out, rounds, rows))
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


def _write(out: Path, rounds: int, rows: list[Row]) -> None:
    rounded = [{**row, "curve": [float(f"{value:.6g}") for value in row["curve"]]} for row in rows]
    write_table(out, NAME, __package__, rounds, rounded, render, plot(rows))


if __name__ == "__main__":
    main()
