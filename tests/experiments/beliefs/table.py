"""A table of beliefs: its contestants, what they have to reach, and the command that makes it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from tests.experiments.beliefs.page import Bar, draw, judge, render
from tests.experiments.beliefs.runs import Contestant, run
from tests.experiments.common.tables import (
    Row,
    choose_labels,
    read_command,
    read_commit,
    run_options,
    run_rows,
    write_files,
)


class Table(NamedTuple):
    """A table.

    Attributes:
        name: of the module that makes it, and of its files.
        title: of its page.
        about: the lines of its first paragraph.
        source: the kind of the source whose tasks are played.
        rounds: how many, by default.
        contestants: the learners by name.
        bars: what they have to reach.
    """

    name: str
    title: str
    about: Sequence[str]
    source: str
    rounds: int
    contestants: Mapping[str, Contestant]
    bars: Sequence[Bar]


def render_table(table: Table, result: Row) -> str:
    """Return the page of a result as Markdown."""
    return render(result, table.title, table.about, f"{table.name}.png")


def compose(table: Table, rows: list[Row]) -> dict[str, Any]:
    """Return the result of finished rows: the rows without what is drawn, and the bars."""
    command = read_command(f"tests.experiments.{table.name}")
    kept = [{key: value for key, value in row.items() if key != "drawn"} for row in rows]
    return {"command": command, "commit": read_commit(), "rows": kept, "figures": judge(rows, table.bars, command)}


def make_command(table: Table) -> click.Command:
    """Return the command that runs a table and writes its JSON, page and picture."""

    @click.command(help=f"Write {table.name}.json, .md and .png into OUT; runs that are finished in WORK are reused.")
    @run_options(table.name, table.rounds)
    def main(rounds: int, seeds: int, only: tuple[str, ...], jobs: int, work: Path, out: Path) -> None:
        def write(rows: list[Row]) -> None:
            result = compose(table, rows)
            write_files(out, table.name, result, render_table(table, result), draw(rows))

        names = choose_labels(only, [*table.contestants])
        asked = [
            (table.source, name, table.contestants[name], seed, rounds, work) for seed in range(seeds) for name in names
        ]
        run_rows(jobs, run, asked, write)
        click.echo((out / f"{table.name}.md").read_text(encoding="utf-8"))

    return main
