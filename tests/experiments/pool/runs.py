"""Play the pool with its experts on a stream of tasks in memory, and sum up their losses."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from online_meta.learners import MemoryReplayBuffer
from online_meta.learners.pool import Pool
from online_meta.regret.scoring import TaskAnswers, answer_as_scored, score_answers
from online_meta.types import Learner, Score, Task
from tests.experiments.common.playing import find_plans
from tests.experiments.common.tables import Row, load_row, read_commit, save_row
from trainers.build import build_context, build_learners, build_pool
from trainers.journal.round_records import charge_losses
from trainers.learner_settings import POOL
from trainers.settings import TrainerSettings

START = 20
"""The goals count the losses from this round on."""
DEFAULTS_ONLY = "pool of the default experts"
"""A second pool, of the learners that are experts by default, where more play."""
EVERY = 10
"""Rounds between two recorded weights."""


class Stream(NamedTuple):
    """A stream of the table, and what plays on it.

    Attributes:
        about: the title on the page.
        rounds: how many rounds are played by default.
        make: (seed, rounds) -> its tasks.
        settings: (seed) -> the settings of the run.
        defaults: the learners that are experts by default; a second pool of these plays, unless they are all.
        static: (settings, tasks, work folder) -> the cumulative loss of the best fixed initialisation in hindsight.
    """

    about: str
    rounds: int
    make: Callable[[int, int], list[Task]]
    settings: Callable[[int], TrainerSettings]
    defaults: tuple[str, ...] = ()
    static: Callable[[TrainerSettings, list[Task], Path], float] | None = None


class Play(NamedTuple):
    """What a play records.

    Attributes:
        losses: by the name of the answer, one for each round.
        weights: of the experts, by the name of the pool, before each round.
        seconds: CPU seconds by learner.
        regret: the pool's regret and its bound after the last round, of losses as they are clipped.
    """

    losses: dict[str, list[float]]
    weights: dict[str, list[dict[str, float]]]
    seconds: dict[str, float]
    regret: dict[str, float]


def play(
    settings: TrainerSettings,
    tasks: Sequence[Task],
    programs: Path,
    defaults: Sequence[str] = (),
    on_round: Callable[[int, Play], None] = lambda round, played: None,
) -> Play:
    """Play every learner and the pool, if there is one, with one thread; all score each task before any learns it.

    Learners that are not finite are charged as a run charges them.
    """
    torch.set_num_threads(1)
    context = build_context(settings, MemoryReplayBuffer(), programs)
    made = build_learners(settings, context)
    pools = {name: one for name, one in made.items() if isinstance(one, Pool)}
    made = {name: one for name, one in made.items() if name not in pools}
    if defaults and {*made} - {*defaults}:
        pools[DEFAULTS_ONLY] = build_pool(_keep_experts(settings, defaults), made, context)
    played = Play({}, {name: [] for name in pools}, dict.fromkeys((*made, *pools), 0.0), {})
    for round, task in enumerate(tasks):
        charged = charge_losses(_score(task, made, pools, played.seconds), settings.regret.loss_cap)
        for name, loss in charged.items():
            played.losses.setdefault(name, []).append(loss)
        for name, one in pools.items():
            one.observe(charged, charged[name])
        for name, learner in {**made, **pools}.items():
            with _Measure(played.seconds, name):
                learner.learn(task)
        for name, one in pools.items():
            figures = one.figures[0]
            played.weights[name].append(figures.weights)
            if name == POOL:
                played.regret.update(regret=figures.regret, bound=figures.bound)
        on_round(round, played)
        if round == 0:
            summing = {name: one for name, one in made.items() if hasattr(one, "task_sum")}
            find_plans(settings, summing, context, programs)
    return played


def _score(
    task: Task, learners: Mapping[str, Learner], pools: Mapping[str, Pool], seconds: dict[str, float]
) -> dict[str, Score]:
    """Return the scores of all answers to a task, those of the pools last."""
    answers: dict[str, TaskAnswers] = {}
    scores: dict[str, Score] = {}
    for name, learner in learners.items():
        with _Measure(seconds, name):
            answers[name] = answer_as_scored(learner, task)
            scores |= {name + suffix: score for suffix, score in score_answers(answers[name], task).items()}
    for name, pool in pools.items():
        with _Measure(seconds, name):
            scores[name] = score_answers(pool.mix_answers(task, answers), task)[""]
    return scores


class _Measure:
    """Add the CPU seconds of the block to those of a learner."""

    def __init__(self, spent: dict[str, float], name: str) -> None:
        self.spent, self.name = spent, name

    def __enter__(self) -> None:
        self.began = time.process_time()

    def __exit__(self, *error: object) -> None:
        self.spent[self.name] += time.process_time() - self.began


def _keep_experts(settings: TrainerSettings, names: Sequence[str]) -> TrainerSettings:
    """Return the settings in which all learners but ``names`` are shadows."""
    learners = tuple(replace(one, shadow=one.shadow or one.name not in names) for one in settings.learner)
    return replace(settings, learner=learners)


def run_entry(name: str, stream: Stream, rounds: int, seed: int, work: Path) -> Row:
    """Return the row of one run; a saved row with the same settings is loaded instead of computed.

    All losses and weights lie in WORK, the first rounds of a run that has not ended, too.
    """
    settings = stream.settings(seed)
    asked = {"stream": name, "rounds": rounds, "seed": seed, "settings": repr(settings)}
    file = work / f"{name}-{rounds}-{seed}.json"
    if before := load_row(file, asked):
        return before
    tasks = stream.make(seed, rounds)
    programs = work / "programs" / name
    programs.mkdir(parents=True, exist_ok=True)

    def save(round: int, played: Play) -> None:
        if round % 50 == 49:
            row = {"asked": {**asked, "rounds": round + 1}, "commit": read_commit(), **_pack(played)}
            save_row(work / f"{name}-part-{seed}.json", row)

    played = play(settings, tasks, programs, stream.defaults, save)
    static = stream.static(settings, tasks, programs) if stream.static else None
    return save_row(file, {"asked": asked, "commit": read_commit(), **_pack(played), "static": static})


def _pack(played: Play) -> dict[str, Any]:
    weights = {name: each[::EVERY] for name, each in played.weights.items()}
    return {**played._asdict(), "weights": weights}


def summarize(row: Row) -> Row:
    """Return what the page needs of a row: for each answer the mean losses, and the pool's largest weights."""
    losses = row["losses"]
    count = len(next(iter(losses.values())))
    start = min(START, count // 2)
    last = {name: each[-1] for name, each in row["weights"].items()}
    return {
        "asked": {key: value for key, value in row["asked"].items() if key != "settings"},
        "commit": row["commit"],
        "mean": {name: _round(fmean(each)) for name, each in losses.items()},
        "late": {name: _round(fmean(each[start:])) for name, each in losses.items()},
        "weights": {
            name: dict(sorted(((one, _round(w)) for one, w in each.items() if w >= 0.001), key=lambda pair: -pair[1]))
            for name, each in last.items()
        },
        "seconds": {name: _round(each / count) for name, each in row["seconds"].items()},
        "regret": {name: _round(value) for name, value in row["regret"].items()},
        "static": None if row["static"] is None else _round(row["static"] / count),
        "curve": [_round(value) for value in _running_means(losses[POOL])],
    }


def _running_means(losses: Sequence[float]) -> list[float]:
    return [fmean(losses[:until]) for until in range(EVERY, len(losses) + 1, EVERY)]


def _round(value: float) -> float:
    return float(f"{value:.6g}")
