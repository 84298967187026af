"""Run FTML with several replay policies, and a mixture of meta-initialisations, on non-stationary streams."""

from pathlib import Path

import click
from tests.experiments.common.tables import choose_labels, run_options, run_rows, write_table
from tests.experiments.non_stationary.page import NAME, plot, render
from tests.experiments.non_stationary.runs import COMPARATOR, LABELS, STREAMS, Entry, run_entry


@click.command()
@run_options(NAME, rounds=100)
def main(rounds: int, seeds: int, only: tuple[str, ...], jobs: int, work: Path, out: Path) -> None:
    """Write non_stationary.json, .md and .png into OUT; runs that are finished in WORK are reused."""
    labels = choose_labels(only, (*LABELS, COMPARATOR))
    (work / "programs").mkdir(parents=True, exist_ok=True)
    asked = [
        (Entry(stream, label, rounds, seed), work) for seed in range(seeds) for label in labels for stream in STREAMS
    ]
    run_rows(jobs, run_entry, asked, lambda rows: write_table(out, NAME, __package__, rounds, rows, render, plot(rows)))
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
