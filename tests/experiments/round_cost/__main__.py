"""Measure the cost of early and late rounds for every replay policy, and the loss of bounded replay."""

import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress
from tests.experiments.common.histories import make_history
from tests.experiments.common.tables import (
    Row,
    choose_labels,
    load_row,
    read_command,
    read_commit,
    save_row,
    write_files,
)
from tests.experiments.round_cost.loss import LABELS, POLICIES, load_digits_row, make_digits, play_digits
from tests.experiments.round_cost.page import draw, render
from tests.experiments.round_cost.runs import (
    SMALL,
    UNBOUNDED,
    call_in_new_process,
    count_catching_up,
    locate_state,
    make_settings,
    make_state,
    measure_memory,
    time_rounds,
)

NAME = "cost"


@dataclass(frozen=True)
class Scale:
    """The size of the measurement.

    Attributes:
        rounds: the rounds at which costs are measured.
        played: the last round up to which every round is played; later rounds are fast-forwarded.
        turns: the number of timed blocks at each of ``rounds``.
        block: the number of rounds in a block.
        full: the last of ``rounds`` for full replay, whose rounds become slower.
        full_turns: the number of timed blocks, of one round each, for full replay.
        loss_rounds: the number of rounds whose losses are summed.
        seeds: the number of seeds for the losses.
        overrides: settings in addition to those of the table.
    """

    rounds: tuple[int, ...] = (100, 1_000, 10_000, 100_000)
    played: int = 10_000
    turns: int = 10
    block: int = 25
    full: int = 10_000
    full_turns: int = 5
    loss_rounds: int = 1_000
    seeds: int = 3
    overrides: tuple[str, ...] = ()

    def for_policy(self, policy: str) -> "Scale":
        """Return the scale for a policy."""
        if policy != UNBOUNDED:
            return self
        rounds = tuple(round for round in self.rounds if round <= self.full)
        return replace(self, rounds=rounds, played=min(self.played, self.rounds[0]), turns=self.full_turns, block=1)


QUICK = Scale(
    rounds=(4, 8),
    played=4,
    turns=2,
    block=2,
    full=8,
    full_turns=2,
    loss_rounds=2,
    seeds=1,
    overrides=("engine.batching=loop", "meta.batch=2"),
)
Call = Callable[..., Any]


class Unfinished(Exception):
    """Raised instead of a measurement, if only finished ones are wanted."""


def measure_policy(policy: str, scale: Scale, work: Path, call: Call) -> Row:
    """Return the costs of a policy, and reuse finished parts. ``call(function, *args)`` runs a part."""
    own = scale.for_policy(policy)
    settings = make_settings(policy, scale.overrides)
    asked = {key: value for key, value in asdict(own).items() if key in ("played", "turns", "block")}
    overrides = [*SMALL, *POLICIES[policy], *scale.overrides]
    asked |= {"policy": policy, "rounds": [*own.rounds], "overrides": overrides}
    file = locate_state(work, policy, own.rounds[-1]).with_suffix(".json")
    if before := load_row(file, asked):
        return before
    for begin, round in itertools.pairwise((0, *own.rounds)):
        if not locate_state(work, policy, round).exists():
            call(make_state, work, policy, settings, round, begin, round <= own.played)
    times = call(time_rounds, work, policy, settings, own.rounds, own.turns, own.block)
    memory = [call(measure_memory, work, policy, settings, round, own.block) for round in own.rounds]
    return save_row(file, {"asked": asked, "commit": read_commit(), "times": times, "memory": memory})


def measure_loss(policy: str, seed: int, scale: Scale, work: Path, call: Call) -> Row:
    """Return the loss of a policy, loaded or computed by ``call``."""
    asked = (policy, seed, scale.loss_rounds, work, scale.overrides)
    row: Row = load_digits_row(*asked) or call(play_digits, *asked)
    return row


def raise_unfinished(function: Call, *args: Any) -> Any:
    """Raise ``Unfinished`` instead of calling the function."""
    raise Unfinished


def call_here(function: Call, *args: Any) -> Any:
    """Call a function in this process: faster, but the measured memory includes earlier calls."""
    return function(*args)


@click.command()
@click.option(
    "--quick", is_flag=True, help="A few rounds, in seconds, to check that it works. The figures are meaningless."
)
@click.option("--finished", is_flag=True, help="Only write what is finished in WORK.")
@click.option("--only", multiple=True, metavar="POLICY", help="A policy; may be repeated. All by default.")
@click.option(
    "--played",
    type=int,
    help="The last round up to which every round is played; later ones are fast-forwarded.  [10000]",
)
@click.option("--seeds", type=int, help="Number of seeds for the losses.  [3]")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/experiments/cost"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(
    quick: bool, finished: bool, only: tuple[str, ...], played: int | None, seeds: int | None, work: Path, out: Path
) -> None:
    """Write cost.json, .md and .png into OUT after each step; what is finished in WORK is reused."""
    scale = QUICK if quick else Scale()
    scale = replace(scale, played=played or scale.played, seeds=scale.seeds if seeds is None else seeds)
    if scale.played < scale.rounds[0]:
        raise click.BadParameter(
            f"--played is {scale.played}; it must be at least {scale.rounds[0]}, because fast-forwarding needs a run"
        )
    began, names = time.monotonic(), choose_labels(only, LABELS)
    if not finished:
        _make_histories(scale, work)
    call: Call = raise_unfinished if finished else call_here if quick else call_in_new_process
    bounded_first = sorted((name for name in names if name in POLICIES), key=lambda name: name == UNBOUNDED)
    todo: list[tuple[str, Call]] = [
        ("costs", partial(measure_policy, policy, scale, work, call)) for policy in bounded_first
    ]
    seeds_first = itertools.product(range(scale.seeds), names)
    todo += [("losses", partial(measure_loss, policy, seed, scale, work, call)) for seed, policy in seeds_first]
    found: dict[str, list[Row]] = {"costs": [], "losses": []}
    with Progress() as progress:
        for part, step in progress.track(todo):
            with suppress(Unfinished):
                found[part].append(step())
                if not finished:
                    _write(out, scale, found, time.monotonic() - began, drawn=part == "costs")
    if not any(found.values()):
        raise click.ClickException(f"nothing is finished in {work}")
    _write(out, scale, found, time.monotonic() - began, drawn=finished)
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


def _make_histories(scale: Scale, work: Path) -> None:
    for folder in ("states", "copies"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    last = scale.rounds[-1]
    spare = 2 * (scale.turns + 2) * scale.block + count_catching_up(last)
    make_history(work / "history", "sinusoid", 0, last + spare)
    for seed in range(scale.seeds):
        make_digits(work, seed, scale.loss_rounds)


def _write(out: Path, scale: Scale, found: dict[str, list[Row]], wall_seconds: float, *, drawn: bool) -> None:
    """Write the tables with the results so far, and the picture if ``drawn``."""
    commits = sorted({row["commit"] for rows in found.values() for row in rows})
    about = {"command": read_command(__package__), "commit": ", ".join(commits)}
    result = {**about, "wall_seconds": wall_seconds, "scale": asdict(scale), **found}
    write_files(out, NAME, result, render(result), draw(result) if drawn else None)


if __name__ == "__main__":
    main()
