"""What a round costs early and late by every replay policy, and what the bounded ones lose against all rounds."""

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

from deploy.experiments.cost_loss import POLICIES, make_digits, play_digits
from deploy.experiments.cost_page import draw, render
from deploy.experiments.cost_runs import (
    UNBOUNDED,
    call_afresh,
    make_state,
    settings_of,
    state_of,
    time_rounds,
    weigh_rounds,
)
from deploy.experiments.first_table import commit
from deploy.experiments.histories import make_history
from deploy.experiments.tables import Row, choose_labels, keep, read_kept, write_files

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
    rounds=(12, 24),
    played=12,
    turns=2,
    block=2,
    full=24,
    full_turns=2,
    loss_rounds=2,
    seeds=1,
    overrides=("engine.how=loop",),
)
Call = Callable[..., Any]


def measure_policy(policy: str, scale: Scale, work: Path, call: Call) -> Row:
    """Return the costs of a policy; what was made or measured before is not again. ``call`` calls a function."""
    own = scale.of(policy)
    settings = settings_of(policy, scale.overrides)
    asked = {"policy": policy, **asdict(own), "rounds": [*own.rounds], "settings": asdict(settings.meta)}
    del asked["overrides"]
    file = state_of(work, policy, own.rounds[-1]).with_suffix(".json")
    if before := read_kept(file, asked):
        return before
    for begin, round in itertools.pairwise((0, *own.rounds)):
        if not state_of(work, policy, round).exists():
            call(make_state, work, policy, settings, round, begin, round <= own.played)
    times = call(time_rounds, work, policy, settings, own.rounds, own.turns, own.block)
    memory = [call(weigh_rounds, work, policy, settings, round, own.block) for round in own.rounds]
    return keep(file, {"asked": asked, "times": times, "memory": memory})


def call_here(function: Call, *args: Any) -> Any:
    """Call a function in this process: quicker, but its memory is also that of all before."""
    return function(*args)


@click.command()
@click.option("--quick", is_flag=True, help="A few rounds, in seconds: to see that it works; the figures mean nothing.")
@click.option("--only", multiple=True, metavar="POLICY", help="A policy; again for more. All by default.")
@click.option("--played", type=int, help="Up to which round all are played; those beyond it are walked.  [10000]")
@click.option("--seeds", type=int, help="How many seeds the losses have.  [3]")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/experiments/cost"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(quick: bool, only: tuple[str, ...], played: int | None, seeds: int | None, work: Path, out: Path) -> None:
    """Write cost.json, .md and .png into OUT, as far as they have come; what is finished in WORK is not done again."""
    chosen = {name: value for name, value in (("played", played), ("seeds", seeds)) if value is not None}
    scale = replace(QUICK if quick else Scale(), **chosen)
    if scale.played < scale.rounds[0]:
        raise click.BadParameter(f"--played is {scale.played}: {scale.rounds[0]} or more, so that a run has begun")
    policies = choose_labels(only, [*POLICIES])
    began = time.monotonic()
    (work / "states").mkdir(parents=True, exist_ok=True)
    (work / "copies").mkdir(exist_ok=True)
    make_history(work / "history", "sinusoid", 0, scale.rounds[-1] + 2 * (scale.turns + 2) * scale.block)
    for seed in range(scale.seeds):
        make_digits(work, seed, scale.loss_rounds)
    call = call_here if quick else call_afresh
    todo: list[tuple[str, Call]] = [
        ("costs", partial(measure_policy, policy, scale, work, call)) for policy in reversed(policies)
    ]
    todo += [
        ("losses", partial(call, play_digits, policy, seed, scale.loss_rounds, work, scale.overrides))
        for seed in range(scale.seeds)
        for policy in policies
    ]
    found: dict[str, list[Row]] = {"costs": [], "losses": []}
    with Progress() as progress:
        for part, step in progress.track(todo):
            found[part].append(step())
            _write(out, scale, found, time.monotonic() - began)
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


def _write(out: Path, scale: Scale, found: dict[str, list[Row]], wall_seconds: float) -> None:
    """Write the tables as far as they have come."""
    about = {"command": " ".join([f"python -m deploy.experiments.{NAME}", *sys.argv[1:]]), "commit": commit()}
    result = {**about, "wall_seconds": wall_seconds, "scale": asdict(scale), **found}
    write_files(out, NAME, result, render(result), draw(result))


if __name__ == "__main__":
    main()
