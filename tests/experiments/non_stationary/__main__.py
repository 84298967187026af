"""Run FTML with several replay policies, and a mixture of meta-initialisations, on non-stationary streams."""

from pathlib import Path

import click
from tests.experiments.common.playing import finish_replays
from tests.experiments.common.tables import choose_labels, run_options, write_table
from tests.experiments.non_stationary.page import NAME, plot, render
from tests.experiments.non_stationary.runs import LABELS, STREAMS, list_replays, make_rows


@click.command()
@run_options(NAME, rounds=100)
def main(rounds: int, seeds: int, only: tuple[str, ...], jobs: int, work: Path, out: Path) -> None:
    """Write non_stationary.json, .md and .png into OUT; runs that are finished in WORK are reused."""
    labels = choose_labels(only, [*LABELS])
    work.mkdir(parents=True, exist_ok=True)
    replays = {stream: list_replays(stream, labels, range(seeds), rounds, work) for stream in STREAMS}
    rows = [
        row
        for stream, entries in finish_replays(replays, jobs).items()
        for entry in entries
        for row in make_rows(stream, entry, rounds)
    ]
    write_table(out, NAME, __package__, rounds, rows, render, plot(rows))
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
