"""Rainbow digits by the protocol of Follow the Meta-Leader: how many images each learner needs to reach 90 %."""

from pathlib import Path

import click

from deploy.experiments.rainbow_page import NAME, plot, render
from deploy.experiments.rainbow_runs import LABELS, WARM_UP, Entry, run_entry
from deploy.experiments.tables import choose_labels, run_rows, write_table


@click.command()
@click.option("--rounds", default=56, show_default=True, help="Tasks of each run, more than the warm-up has.")
@click.option("--seeds", default=3, show_default=True, help="How many seeds, from 0.")
@click.option("--only", multiple=True, metavar="LABEL", help="A learner by its label; again for more. All by default.")
@click.option("--jobs", default=2, show_default=True, help="How many runs at once.")
@click.option("--work", type=click.Path(path_type=Path), default=Path(f"runs/experiments/{NAME}"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(rounds: int, seeds: int, only: tuple[str, ...], jobs: int, work: Path, out: Path) -> None:
    """Write rainbow_protocol.json, .md and .png into OUT; runs that are finished in WORK are not made again."""
    if rounds <= WARM_UP:
        raise click.BadParameter(f"--rounds is {rounds}: more than the {WARM_UP} of the warm-up, or none is judged")
    labels = choose_labels(only, [*LABELS])
    (work / "programs").mkdir(parents=True, exist_ok=True)
    asked = [(Entry(label, rounds, seed), work) for seed in range(seeds) for label in labels]
    run_rows(jobs, run_entry, asked, lambda rows: write_table(out, NAME, rounds, rows, render, plot(rows)))
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
