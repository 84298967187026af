"""Run rainbow digits by the protocol of Follow the Meta-Leader: the images each learner needs to reach 90 %."""

from pathlib import Path

import click
from tests.experiments.common.tables import Row, choose_labels, run_options, run_rows, write_table
from tests.experiments.rainbow.page import NAME, plot, read_other_rows, render
from tests.experiments.rainbow.pool import run_any
from tests.experiments.rainbow.runs import LABELS, WARM_UP, Entry


@click.command()
@run_options(NAME, rounds=56, about="Tasks of each run, more than in the warm-up.")
@click.option("--keep", is_flag=True, help="Keep the rows of the other learners that the table in OUT has.")
def main(rounds: int, seeds: int, only: tuple[str, ...], jobs: int, work: Path, out: Path, keep: bool) -> None:
    """Write rainbow_protocol.json, .md and .png into OUT; runs that are finished in WORK are reused."""
    if rounds <= WARM_UP:
        raise click.BadParameter(
            f"--rounds is {rounds}; it must be more than the {WARM_UP} of the warm-up, which are not scored"
        )
    labels = choose_labels(only, [*LABELS])
    (work / "programs").mkdir(parents=True, exist_ok=True)
    asked = [(Entry(label, rounds, seed), work) for seed in range(seeds) for label in labels]
    kept = read_other_rows(out / f"{NAME}.json", rounds, labels) if keep else []

    def write(found: list[Row]) -> None:
        rows = [*kept, *found]
        write_table(out, NAME, __package__, rounds, rows, render, plot(rows))

    run_rows(jobs, run_any, asked, write)
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
