"""Run rainbow digits by the protocol of Follow the Meta-Leader: the images each learner needs to reach 90 %."""

from pathlib import Path

import click
from tests.experiments.common.tables import choose_labels, run_options, run_rows, write_table
from tests.experiments.rainbow.page import NAME, plot, render
from tests.experiments.rainbow.runs import LABELS, WARM_UP, Entry, run_entry


@click.command()
@run_options(NAME, rounds=56, about="Tasks of each run, more than in the warm-up.")
def main(rounds: int, seeds: int, only: tuple[str, ...], jobs: int, work: Path, out: Path) -> None:
    """Write rainbow_protocol.json, .md and .png into OUT; runs that are finished in WORK are reused."""
    if rounds <= WARM_UP:
        raise click.BadParameter(
            f"--rounds is {rounds}; it must be more than the {WARM_UP} of the warm-up, which are not scored"
        )
    labels = choose_labels(only, [*LABELS])
    (work / "programs").mkdir(parents=True, exist_ok=True)
    asked = [(Entry(label, rounds, seed), work) for seed in range(seeds) for label in labels]
    run_rows(jobs, run_entry, asked, lambda rows: write_table(out, NAME, __package__, rounds, rows, render, plot(rows)))
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
