"""Choose the settings of ``filtered_glyphs`` on a seed outside the table."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from tests.experiments.common.tables import Row, run_rows
from tests.experiments.filtered_glyphs.page import NAME
from tests.experiments.filtered_glyphs.runs import MIXTURE, ROUNDS, SCRATCH, SINGLE, Contestant, Entry, run
from tests.experiments.filtered_glyphs.streams import STREAMS
from tests.experiments.glyphs.jobs import require_fonts
from tests.experiments.glyphs.tasks import load_letters

SEED = 100
CONCENTRATIONS, TEMPERATURES = (1.0, 10.0), (0.3, 1.0)
INNER, OUTER = (0.1, 0.3, 1.0), (0.003, 0.01)


def list_candidates() -> Iterator[tuple[str, Contestant]]:
    """Yield the names of the candidates and what they are."""
    for inner in INNER:
        for outer in OUTER:
            yield f"try-ftml-{inner}-{outer}", replace(SINGLE, inner_lr=inner, meta_lr=outer)
    for concentration in CONCENTRATIONS:
        for temperature in TEMPERATURES:
            options: dict[str, Any] = {"concentration": concentration, "temperature": temperature}
            mixture = replace(MIXTURE, options={**MIXTURE.options, **options})
            yield f"try-dp_mixture-{concentration}-{temperature}", mixture
    for steps in (20, 50):
        yield f"try-from_scratch-{steps}", replace(SCRATCH, options={**SCRATCH.options, "steps": steps})


def _print_rows(rows: list[Row]) -> None:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["asked"]["name"], []).append(row)
    click.echo()
    for name, own in sorted(found.items(), key=lambda item: -fmean(row["after"] for row in item[1])):
        about = (
            f"{row['asked']['stream']} {row['after']:.4f}, {row['nll']:.3f} nats, {row['seconds']:.0f} s, "
            f"components {row['clusters']}, Rand index {row['rand']}, {row['rand_of_last_half']}"
            for row in own
        )
        click.echo(f"{name}: {'; '.join(about)}")


@click.command()
@click.option("--only", default="", metavar="TEXT", help="Candidates with this in their names.")
@click.option("--stream", multiple=True, default=STREAMS, show_default=True, help="A stream; may be repeated.")
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option("--jobs", default=2, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path(f"runs/experiments/{NAME}"), show_default=True)
@click.option("--fonts", type=click.Path(path_type=Path), help="A folder with the Noto fonts.")
def main(only: str, stream: tuple[str, ...], rounds: int, jobs: int, work: Path, fonts: Path | None) -> None:
    """Print the candidates, the most accurate first; runs that are finished in WORK are reused."""
    place = require_fonts(fonts)
    (work / "programs").mkdir(parents=True, exist_ok=True)
    load_letters(place, work / "letters.safetensors")
    chosen = [(name, one) for name, one in list_candidates() if only in name]
    asked = [(Entry(each, name, SEED, rounds), one, work, place) for name, one in chosen for each in stream]
    run_rows(jobs, run, asked, _print_rows)


if __name__ == "__main__":
    main()
