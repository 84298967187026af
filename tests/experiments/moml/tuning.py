"""Choose the settings of ``moml_protocol`` from nine candidates per learner, on a seed outside the table."""

from functools import cache
from pathlib import Path
from statistics import mean

import click
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.types import Task
from tests.experiments.common.playing import play_stream
from tests.experiments.common.tables import Row, choose_labels, load_row, save_row
from tests.experiments.moml.__main__ import CHOSEN, Choice, make_settings, make_tasks

SEED, ROUNDS = 100, 150
INNER, OUTER = (0.25, 0.5, 1.0), (0.0003, 0.001, 0.003)


@cache
def stream() -> list[Task]:
    """Return the tasks on which all candidates are compared."""
    return make_tasks(SEED, ROUNDS)


def list_candidates(label: str) -> list[Choice]:
    """Return the nine candidates of a learner."""
    leader, reptile = CHOSEN[MAIN_LEARNER], CHOSEN["online_reptile"]
    own = {
        "moml": [
            Choice(leader.inner, outer, {"alpha": alpha, "steps": 10})
            for alpha in (0.03, 0.1, 1.0)
            for outer in (0.0001, 0.0003, 0.001)
        ],
        "aruba": [
            Choice(reptile.inner, outer, {"eps": reptile.inner * zeta, "zeta": zeta})
            for zeta in (0.01, 0.1, 1.0)
            for outer in OUTER
        ],
        "train_on_everything": [Choice(leader.inner, round(0.0001 * 2**power, 4), {}) for power in range(9)],
        "from_scratch": [
            Choice(leader.inner, leader.outer, {"steps": steps, "lr": lr}) for steps in (10, 20, 30) for lr in OUTER
        ],
    }
    return own.get(label) or [Choice(inner, outer, {}) for inner in INNER for outer in OUTER]


def evaluate_candidate(label: str, tried: Choice, work: Path) -> Row:
    """Return the scores of a candidate on the stream; a saved row is loaded instead of computed."""
    asked = {"label": label, "tried": tried._asdict(), "rounds": ROUNDS, "seed": SEED}
    name = "-".join(map(str, (label, tried.inner, tried.outer, *tried.options.values())))
    file = work / f"try-{name}.json"
    if before := load_row(file, asked):
        return before
    played = [
        round.score for round in play_stream(make_settings(label, SEED, tried), label, stream(), work / "programs")
    ]
    half = played[ROUNDS // 2 :]
    found = {
        "loss": mean(score.loss_after for score in half),
        "accuracy": mean(score.accuracy or 0.0 for score in half),
    }
    return save_row(file, {"asked": asked, **found})


@click.command()
@click.option("--only", multiple=True, metavar="LABEL", help="The name of a learner; may be repeated. All by default.")
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("runs/experiments/moml_protocol"), show_default=True
)
def main(only: tuple[str, ...], work: Path) -> None:
    """Print the candidates of each learner, sorted by mean loss over the last half of the rounds."""
    (work / "programs").mkdir(parents=True, exist_ok=True)
    for label in choose_labels(only, [*CHOSEN]):
        rows = [evaluate_candidate(label, tried, work) for tried in list_candidates(label)]
        for row in sorted(rows, key=lambda row: float(row["loss"])):
            click.echo(f"{label}: loss {row['loss']:.3f}, accuracy {row['accuracy']:.3f}, {row['asked']['tried']}")


if __name__ == "__main__":
    main()
