"""Run digits under 1,000 transformations by the protocol of MOML: the loss on the next task and on past tasks."""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import click
import torch
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.types import Learner, Score, Task
from streams.sources.transformed_digits import Settings, load_digits, make_task
from tests.experiments.common.playing import Training, centred_mlp, play_stream, train_leader
from tests.experiments.common.tables import (
    Row,
    choose_labels,
    load_row,
    read_commit,
    run_options,
    run_rows,
    save_row,
    write_table,
)
from tests.experiments.moml.page import NAME, plot, render
from torch import nn
from trainers.settings import (
    EngineSettings,
    InnerSettings,
    MetaSettings,
    ModelSettings,
    RegretSettings,
    TrainerSettings,
)

STEPS = 2
"""Steps of the inner loop."""

CHECKS = (100, 250, 500)
"""The rounds after which all tasks so far are scored, in addition to the last round."""


class Entry(NamedTuple):
    """One run: a learner, the number of its rounds, and the seed."""

    label: str
    rounds: int
    seed: int


class Choice(NamedTuple):
    """Settings of a learner: the inner and the outer learning rate, and its own options."""

    inner: float
    outer: float
    options: dict[str, Any]


CHOSEN = {
    MAIN_LEARNER: Choice(1.0, 0.001, {}),
    "moml": Choice(1.0, 0.0003, {"alpha": 1.0, "steps": 10}),
    "aruba": Choice(0.5, 0.003, {"eps": 0.05, "zeta": 0.1}),
    "c_maml": Choice(1.0, 0.001, {}),
    "online_reptile": Choice(0.5, 0.001, {}),
    "ftl_fine_tune": Choice(0.25, 0.0003, {}),
    "train_on_everything": Choice(1.0, 0.0008, {}),
    "from_scratch": Choice(1.0, 0.001, {"steps": 30, "lr": 0.001}),
}
"""The best of the nine candidates in ``tuning``; the last two were chosen manually."""


def digits_mlp(hidden: Sequence[int] = (200,)) -> nn.Module:
    """Return the perceptron of the table."""
    return centred_mlp(28 * 28, 10, hidden)


def make_settings(label: str, seed: int, chosen: Choice | None = None) -> TrainerSettings:
    """Return the settings of a run, with its ``CHOSEN`` settings by default."""
    inner, outer, options = chosen or CHOSEN[label]
    return TrainerSettings(
        ModelSettings("tests.experiments.moml.__main__:digits_mlp"),
        InnerSettings(steps=STEPS, lr=inner),
        MetaSettings(lr=outer, steps_per_round=2, batch=5),
        regret=RegretSettings(
            baseline_optimizer="meta",
            comparator=(),
            baselines=() if label == MAIN_LEARNER else (label,),
            options={label: options} if options else {},
        ),
        engine=EngineSettings(batching="traced"),
        seed=seed,
    )


def make_tasks(seed: int, rounds: int) -> list[Task]:
    """Return the first tasks of a seed's stream, with 60 support and 10 query images each."""
    torch.set_num_threads(1)
    digits = load_digits()
    return [make_task(digits, Settings(), seed, t) for t in range(rounds)]


def run_entry(entry: Entry, work: Path) -> Row:
    """Return the row of one run; a saved row with the same configuration is loaded instead of computed.

    The row has the loss and accuracy on each task before it was learned. It also has those on all tasks so far, after
    the rounds in ``CHECKS`` and after the last round.
    """
    settings = make_settings(entry.label, entry.seed)
    training = Training(**CHOSEN["from_scratch"].options) if entry.label == MAIN_LEARNER else None
    asked = {**entry._asdict(), "chosen": CHOSEN[entry.label]._asdict()}
    asked |= {"trained": training._asdict()} if training else {}
    file = work / f"{'-'.join(map(str, entry))}.json"
    if before := load_row(file, asked):
        return before
    tasks, scores, long_term, seconds, checking = make_tasks(entry.seed, entry.rounds), [], [], 0.0, 0.0
    tuned: list[Score] = []

    def train_and_score(learner: Learner, task: Task) -> None:
        if training:
            tuned.append(train_leader(settings, training, learner, task))

    for learner, score, spent in play_stream(settings, entry.label, tasks, work / "programs", on_task=train_and_score):
        scores.append(score)
        seconds += spent
        if len(scores) in {*CHECKS, entry.rounds}:
            began = time.process_time()
            long_term.append({"rounds": len(scores), **summarize(score_all(learner, tasks[: len(scores)], scores))})
            checking += time.process_time() - began
    row = {
        "asked": asked,
        "commit": read_commit(),
        **_collect(scores),
        **({"tuned": _collect(tuned)} if training else {}),
        "long_term": long_term,
        "state_bytes": sum(value.nbytes for value in learner.save().values()),
        "past_bytes": count_bytes(tasks) if isinstance(learner, FollowTheMetaLeader) else 0,
        "seconds": seconds,
        "checking": checking,
    }
    return save_row(file, row)


def _collect(scores: Sequence[Score]) -> Row:
    """Return the loss and accuracy on each task."""
    return {"losses": [score.loss_after for score in scores], "accuracies": [score.accuracy for score in scores]}


def score_all(learner: Learner, tasks: Sequence[Task], before: Sequence[Score]) -> list[Score]:
    """Return the scores on all past tasks, and leave the learner unchanged.

    A learner without state has the same scores as ``before``.
    """
    if not (state := learner.save()):
        return [*before]
    scores = [learner.score(task) for task in tasks]
    learner.load(state, len(tasks))  # Otherwise it would expect to learn these tasks next.
    return scores


def summarize(scores: Sequence[Score]) -> Row:
    """Return the mean loss and accuracy."""
    return {
        "loss": mean(score.loss_after for score in scores),
        "accuracy": mean(score.accuracy for score in scores if score.accuracy is not None),
    }


def count_bytes(tasks: Sequence[Task]) -> int:
    """Return the number of bytes that the tasks take in memory."""
    return sum(values.nbytes for task in tasks for batch in task for values in batch)


@click.command()
@run_options(NAME, rounds=1000, about="Tasks of each run.")
def main(rounds: int, seeds: int, only: tuple[str, ...], jobs: int, work: Path, out: Path) -> None:
    """Write moml_protocol.json, .md and .png into OUT; runs that are finished in WORK are reused."""
    labels = choose_labels(only, [*CHOSEN])
    (work / "programs").mkdir(parents=True, exist_ok=True)
    asked = [(Entry(label, rounds, seed), work) for seed in range(seeds) for label in labels]
    run_rows(jobs, run_entry, asked, lambda rows: _write(out, rounds, rows))
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


def _write(out: Path, rounds: int, rows: list[Row]) -> None:
    write_table(out, NAME, __package__, rounds, [_round_losses(row) for row in rows], render, plot(rows))


def _round_losses(row: Row) -> Row:
    """Round the losses of a row to the digits that the table needs."""
    tuned = {"tuned": _round_losses(row["tuned"])} if "tuned" in row else {}
    return {**row, "losses": [float(f"{loss:.5g}") for loss in row["losses"]], **tuned}


if __name__ == "__main__":
    main()
