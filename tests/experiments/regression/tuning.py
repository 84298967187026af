"""The settings of the learners on the regression streams, and the candidates that they were chosen from.

    python -m tests.experiments.regression.tuning

runs each candidate for 100 rounds with seed 100, which is not in the table, and prints their mean losses.
"""

from itertools import product
from pathlib import Path
from statistics import fmean

import click
from tests.experiments.common.playing import play_stream, without_prefixes
from tests.experiments.regression.runs import COMPARATOR, LEARNERS, STREAMS, Choice, Entry, make_settings

LINEAR = {
    "ftml": Choice(0.08, 0.05),
    "ftml_recent": Choice(0.08, 0.05),
    "train_on_everything": Choice(0.08, 0.05),
    "ftl_fine_tune": Choice(0.08, 0.05 / 3),
    "online_reptile": Choice(0.08, 0.05),
    "moml": Choice(0.08, 0.05, {"alpha": 3.0, "steps": 5}),
    "aruba": Choice(0.08, 0.5, {"eps": 0.05}, "sgd"),
    "c_maml": Choice(0.08, 0.05, {"gamma": 0.1}),
}
"""The settings that are the same on both streams with a linear model."""

CHOSEN = {
    "sinusoids": {
        "ftml": Choice(0.02, 0.01),
        "ftml_recent": Choice(0.02, 0.01),
        "train_on_everything": Choice(0.02, 0.002),
        "ftl_fine_tune": Choice(0.02, 0.001),
        "from_scratch": Choice(0.02, options={"steps": 30, "lr": 0.03}),
        "online_reptile": Choice(0.02, 0.01),
        "moml": Choice(0.02, 0.01, {"alpha": 0.3, "steps": 5}),
        "aruba": Choice(0.02, 0.5, {"eps": 0.05}, "sgd"),
        "c_maml": Choice(0.02, 0.01, {"gamma": 0.1}),
        "dp_mixture": Choice(0.02, 0.01, {"most": 3, "temperature": 20.0}),
    },
    "flights": {
        "ftml": Choice(0.02, 0.003),
        "ftml_recent": Choice(0.02, 0.003),
        "train_on_everything": Choice(0.02, 0.01),
        "ftl_fine_tune": Choice(0.02, 0.01 / 3),
        "from_scratch": Choice(0.02, options={"steps": 30, "lr": 0.01}),
        "online_reptile": Choice(0.02, 0.003),
        "moml": Choice(0.02, 0.003, {"alpha": 0.3, "steps": 5}),
        "aruba": Choice(0.02, 0.5, {"eps": 0.05}, "sgd"),
        "c_maml": Choice(0.02, 0.01, {"gamma": -1000.0}),
    },
    "flights_linear": {**LINEAR, "from_scratch": Choice(0.08, options={"steps": 30, "lr": 0.1})},
    "schools_linear": {**LINEAR, "from_scratch": Choice(0.08, options={"steps": 30, "lr": 0.03})},
}


def get_choice(stream: str, label: str) -> Choice:
    """Return the settings of a learner on a stream; the comparators adapt as FTML does."""
    return CHOSEN[stream]["ftml" if label == COMPARATOR else label]


SEED = 100


INNER_LRS = (0.02, 0.08)


META_LRS, LINEAR_META_LRS = (0.003, 0.01), (0.015, 0.05)


def list_candidates(stream: str, label: str, inner_lr: float) -> list[Choice]:
    """Return the candidates of a learner; learners with other main options use FTML's ``inner_lr``."""
    meta_lrs = LINEAR_META_LRS if STREAMS[stream].linear else META_LRS
    match label:
        case "train_on_everything":
            return [Choice(inner_lr, lr / by) for lr, by in product(meta_lrs, (1, 5))]
        case "ftl_fine_tune":
            return [Choice(inner, lr / 3) for inner, lr in product(INNER_LRS, meta_lrs)]
        case "from_scratch":
            return [Choice(inner_lr, options={"steps": 30, "lr": lr}) for lr in (0.003, 0.01, 0.03, 0.1)]
        case "moml":
            return [Choice(inner_lr, lr, {"alpha": a, "steps": 5}) for a, lr in product((0.3, 3.0), meta_lrs)]
        case "aruba":
            return [Choice(inner_lr, by, {"eps": rate}, "sgd") for rate, by in product((0.01, 0.05), (0.1, 0.5))]
        case "c_maml":
            return [Choice(inner_lr, lr, {"gamma": gamma}) for gamma, lr in product((-1000.0, 0.1), meta_lrs)]
        case "dp_mixture":
            return [Choice(inner_lr, lr, {"most": 3, "temperature": t}) for t, lr in product((1.0, 20.0), meta_lrs)]
        case _:
            return [Choice(inner, lr) for inner, lr in product(INNER_LRS, meta_lrs)]


def evaluate_candidate(stream: str, label: str, choice: Choice, rounds: int, work: Path) -> float:
    """Return the mean loss of one candidate."""
    settings = without_prefixes(make_settings(Entry(stream, label, rounds, SEED), choice))
    rounds_played = play_stream(settings, LEARNERS[label][0], STREAMS[stream].make(SEED, rounds), work)
    return fmean(played.score.loss_after for played in rounds_played)


@click.command()
@click.option("--rounds", default=100, show_default=True)
@click.option(
    "--only", multiple=True, metavar="LABEL", help="A learner in addition to FTML; may be repeated. All by default."
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/experiments/regression_streams/programs"))
def main(rounds: int, only: tuple[str, ...], work: Path) -> None:
    """Print each candidate with its mean loss, the best of each learner last."""
    work.mkdir(parents=True, exist_ok=True)
    for name, stream in STREAMS.items():
        inner_lr = INNER_LRS[0]
        for label in LEARNERS:
            if label not in stream.labels or (only and label not in ("ftml", *only)):
                continue
            found = [
                (evaluate_candidate(name, label, c, rounds, work), c) for c in list_candidates(name, label, inner_lr)
            ]
            best = min(found, key=lambda pair: pair[0])
            inner_lr = best[1].inner_lr if label == "ftml" else inner_lr
            for loss, choice in [*(pair for pair in found if pair is not best), best]:
                click.echo(f"{name} {label} {loss:.4f} {choice}")


if __name__ == "__main__":
    main()
