"""Run five-way classification of letters of unseen scripts, with every algorithm and with embedding baselines."""

import json
from pathlib import Path

import click
from tests.experiments.common.tables import Row, choose_labels, read_command, run_rows, write_files
from tests.experiments.glyphs.jobs import plan_jobs, require_fonts, run_job
from tests.experiments.glyphs.page import NAME, render, sort_rows
from tests.experiments.glyphs.rows import list_plans
from tests.experiments.glyphs.tasks import load_letters
from tests.experiments.glyphs.training import Budget


def write_rows(out: Path, rows: list[Row]) -> None:
    """Write the table: ``rows`` replace those of the same label and shots that OUT has, and the others stay."""
    file = out / f"{NAME}.json"
    before = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    known = {(row["label"], row["shots"]): row for row in [*before, *rows]}
    result = {"command": read_command(__package__), "rows": sort_rows([*known.values()])}
    write_files(out, NAME, result, render(result))


@click.command()
@click.option("--minutes", type=float, help="Processor time of each training. By default, steps are counted.")
@click.option("--iterations", default=300, show_default=True, help="Meta-steps of each training without --minutes.")
@click.option("--only", multiple=True, metavar="NAME", help="What to train; may be repeated. All by default.")
@click.option("--shots", multiple=True, type=int, default=(1, 5), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Number of parallel trainings.")
@click.option(
    "--fonts",
    type=click.Path(path_type=Path),
    help="A folder with the Noto fonts, instead of the one that make creates.",
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/experiments/glyphs"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(
    minutes: float | None,
    iterations: int,
    only: tuple[str, ...],
    shots: tuple[int, ...],
    seed: int,
    jobs: int,
    fonts: Path | None,
    work: Path,
    out: Path,
) -> None:
    """Write glyph_table.json and .md into OUT; trainings that are finished in WORK are reused.

    Rows of OUT that are not computed again stay as they are.
    """
    names = choose_labels(only, [*list_plans()])
    place = require_fonts(fonts)
    load_letters(place, work / "letters.safetensors")
    asked = [(job, work, place) for job in plan_jobs(names, shots, Budget(minutes, iterations), seed)]
    run_rows(jobs, run_job, asked, lambda done: write_rows(out, [row for job in done for row in job["rows"]]))
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
