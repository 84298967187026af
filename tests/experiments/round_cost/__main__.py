"""What a round costs early and late by every replay policy, and what the bounded ones lose against all rounds."""

import itertools
import sys
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
from tests.experiments.common.tables import Row, choose_labels, commit, keep, read_kept, write_files
from tests.experiments.round_cost.loss import PLAYED, POLICIES, finished_digits, make_digits, play_digits
from tests.experiments.round_cost.page import draw, render
from tests.experiments.round_cost.runs import (
    SMALL,
    UNBOUNDED,
    call_afresh,
    make_state,
    settings_of,
    state_of,
    time_rounds,
    weigh_rounds,
)

NAME = "cost"


@dataclass(frozen=True)
class Scale:
    """How much is done: costs are taken at ``rounds``, up to ``played`` of which all are played, beyond it walked.

    ``turns`` blocks of ``block`` rounds are timed at each; full replay, whose rounds grow, goes to ``full`` rounds and
    has ``full_turns`` blocks of one round. Losses are those of ``loss_rounds`` rounds by ``seeds`` seeds. Settings are
    as ``overrides`` say beside those of the table.
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

    def of(self, policy: str) -> "Scale":
        """Return the scale of a policy."""
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
    """Something was to be made or measured, and nothing was to be done."""


def measure_policy(policy: str, scale: Scale, work: Path, call: Call) -> Row:
    """Return the costs of a policy; what was made or measured before is not again. ``call`` calls a function."""
    own = scale.of(policy)
    settings = settings_of(policy, scale.overrides)
    asked = {key: value for key, value in asdict(own).items() if key in ("played", "turns", "block")}
    said = [*SMALL, *POLICIES[policy], *scale.overrides]
    asked |= {"policy": policy, "rounds": [*own.rounds], "overrides": said}
    file = state_of(work, policy, own.rounds[-1]).with_suffix(".json")
    if before := read_kept(file, asked):
        return before
    for begin, round in itertools.pairwise((0, *own.rounds)):
        if not state_of(work, policy, round).exists():
            call(make_state, work, policy, settings, round, begin, round <= own.played)
    times = call(time_rounds, work, policy, settings, own.rounds, own.turns, own.block)
    memory = [call(weigh_rounds, work, policy, settings, round, own.block) for round in own.rounds]
    return keep(file, {"asked": asked, "commit": commit(), "times": times, "memory": memory})


def measure_loss(policy: str, seed: int, scale: Scale, work: Path, call: Call) -> Row:
    """Return the loss of a policy, if need be played by ``call``."""
    asked = (policy, seed, scale.loss_rounds, work, scale.overrides)
    row: Row = finished_digits(*asked) or call(play_digits, *asked)
    return row


def do_nothing(function: Call, *args: Any) -> Any:
    """Call no function; raises ``Unfinished``."""
    raise Unfinished


def call_here(function: Call, *args: Any) -> Any:
    """Call a function in this process: quicker, but its memory is also that of all before."""
    return function(*args)


@click.command()
@click.option("--quick", is_flag=True, help="A few rounds, in seconds: to see that it works; the figures mean nothing.")
@click.option("--finished", is_flag=True, help="Write what is finished in WORK, and do nothing else.")
@click.option("--only", multiple=True, metavar="POLICY", help="A policy; again for more. All by default.")
@click.option("--played", type=int, help="Up to which round all are played; those beyond it are walked.  [10000]")
@click.option("--seeds", type=int, help="How many seeds the losses have.  [3]")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/experiments/cost"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(
    quick: bool, finished: bool, only: tuple[str, ...], played: int | None, seeds: int | None, work: Path, out: Path
) -> None:
    """Write cost.json, .md and .png into OUT, as far as they have come; what is finished in WORK is not done again."""
    scale = QUICK if quick else Scale()
    scale = replace(scale, played=played or scale.played, seeds=scale.seeds if seeds is None else seeds)
    if scale.played < scale.rounds[0]:
        raise click.BadParameter(f"--played is {scale.played}: {scale.rounds[0]} or more, so that a run has begun")
    began, names = time.monotonic(), choose_labels(only, PLAYED)
    if not finished:
        _make_histories(scale, work)
    call: Call = do_nothing if finished else call_here if quick else call_afresh
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
    make_history(work / "history", "sinusoid", 0, scale.rounds[-1] + 2 * (scale.turns + 2) * scale.block)
    for seed in range(scale.seeds):
        make_digits(work, seed, scale.loss_rounds)


def _write(out: Path, scale: Scale, found: dict[str, list[Row]], wall_seconds: float, *, drawn: bool) -> None:
    """Write the tables as far as they have come, and the picture if it is to be ``drawn``."""
    commits = sorted({row["commit"] for rows in found.values() for row in rows})
    about = {"command": " ".join([f"python -m tests.experiments.{NAME}", *sys.argv[1:]]), "commit": ", ".join(commits)}
    result = {**about, "wall_seconds": wall_seconds, "scale": asdict(scale), **found}
    write_files(out, NAME, result, render(result), draw(result) if drawn else None)


if __name__ == "__main__":
    main()
