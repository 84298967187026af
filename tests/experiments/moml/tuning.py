"""What ``moml_protocol`` was chosen by: nine tries for each learner, on a seed that the table does not have."""

from functools import cache
from pathlib import Path
from statistics import mean

import click
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.types import Task
from tests.experiments.common.playing import play_stream
from tests.experiments.common.tables import Row, choose_labels, keep, read_kept
from tests.experiments.moml.__main__ import CHOSEN, Chosen, make_tasks, settings_of

SEED, ROUNDS = 100, 150
INNER, OUTER = (0.25, 0.5, 1.0), (0.0003, 0.001, 0.003)


@cache
def stream() -> list[Task]:
    """Return the tasks that all tries are made on."""
    return make_tasks(SEED, ROUNDS)


def list_tries(label: str) -> list[Chosen]:
    """Return the nine tries of a learner."""
    leader, reptile = CHOSEN[MAIN_LEARNER], CHOSEN["online_reptile"]
    own = {
        "moml": [
            Chosen(leader.inner, outer, {"alpha": alpha, "steps": 10})
            for alpha in (0.03, 0.1, 1.0)
            for outer in (0.0001, 0.0003, 0.001)
        ],
        "aruba": [
            Chosen(reptile.inner, outer, {"eps": reptile.inner * zeta, "zeta": zeta})
            for zeta in (0.01, 0.1, 1.0)
            for outer in OUTER
        ],
        "train_on_everything": [Chosen(leader.inner, round(0.0001 * 2**power, 4), {}) for power in range(9)],
        "from_scratch": [
            Chosen(leader.inner, leader.outer, {"steps": steps, "lr": lr}) for steps in (10, 20, 30) for lr in OUTER
        ],
    }
    return own.get(label) or [Chosen(inner, outer, {}) for inner in INNER for outer in OUTER]


def play_try(label: str, tried: Chosen, work: Path) -> Row:
    """Play the stream by a try; one that was played before is read."""
    asked = {"label": label, "tried": tried._asdict(), "rounds": ROUNDS, "seed": SEED}
    said = "-".join(map(str, (label, tried.inner, tried.outer, *tried.options.values())))
    kept = work / f"try-{said}.json"
    if before := read_kept(kept, asked):
        return before
    played = [round.score for round in play_stream(settings_of(label, SEED, tried), label, stream(), work / "programs")]
    half = played[ROUNDS // 2 :]
    found = {
        "loss": mean(score.loss_after for score in half),
        "accuracy": mean(score.accuracy or 0.0 for score in half),
    }
    return keep(kept, {"asked": asked, **found})


@click.command()
@click.option("--only", multiple=True, metavar="LABEL", help="A learner by its name; again for more. All by default.")
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("runs/experiments/moml_protocol"), show_default=True
)
def main(only: tuple[str, ...], work: Path) -> None:
    """Tell the tries of each learner, the lowest mean loss over the last half of the rounds first."""
    (work / "programs").mkdir(parents=True, exist_ok=True)
    for label in choose_labels(only, [*CHOSEN]):
        rows = [play_try(label, tried, work) for tried in list_tries(label)]
        for row in sorted(rows, key=lambda row: float(row["loss"])):
            click.echo(f"{label}: loss {row['loss']:.3f}, accuracy {row['accuracy']:.3f}, {row['asked']['tried']}")


if __name__ == "__main__":
    main()
