"""Run a mixture of meta-initialisations, and one initialisation, on glyphs that go through filters."""

from pathlib import Path

import click
from tests.experiments.common.tables import Row, choose_labels, run_options, run_rows, write_files
from tests.experiments.filtered_glyphs.page import NAME, compose, draw, render
from tests.experiments.filtered_glyphs.runs import CONTESTANTS, ROUNDS, Entry, run
from tests.experiments.filtered_glyphs.streams import STREAMS
from tests.experiments.glyphs.jobs import require_fonts
from tests.experiments.glyphs.tasks import load_letters


@click.command()
@run_options(NAME, rounds=ROUNDS)
@click.option("--stream", multiple=True, default=STREAMS, show_default=True, help="A stream; may be repeated.")
@click.option("--fonts", type=click.Path(path_type=Path), help="A folder with the Noto fonts.")
def main(
    rounds: int,
    seeds: int,
    only: tuple[str, ...],
    jobs: int,
    work: Path,
    out: Path,
    stream: tuple[str, ...],
    fonts: Path | None,
) -> None:
    """Write filtered_glyphs.json, .md and .png into OUT; runs that are finished in WORK are reused."""
    place = require_fonts(fonts)
    (work / "programs").mkdir(parents=True, exist_ok=True)
    load_letters(place, work / "letters.safetensors")
    asked = [
        (Entry(each, name, seed, rounds), CONTESTANTS[name], work, place)
        for seed in range(seeds)
        for each in choose_labels(stream, STREAMS)
        for name in choose_labels(only, [*CONTESTANTS])
    ]

    def write(rows: list[Row]) -> None:
        result = compose(rows)
        write_files(out, NAME, result, render(result), draw(rows))

    run_rows(jobs, run, asked, write)
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
