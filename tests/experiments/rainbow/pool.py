"""The pool on rainbow digits: what plays in it, and its weights for all sizes of the support set, or for each size."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from online_meta.learners import MemoryReplayBuffer
from online_meta.learners.pool import Pool
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.regret.scoring import TaskAnswers, answer_as_scored, score_answers
from online_meta.types import Score, Task
from tests.experiments.common.playing import find_plans
from tests.experiments.common.tables import Row, load_row, read_commit, save_row
from tests.experiments.rainbow.page import FEWER, PROFICIENCY, compute_efficiency
from tests.experiments.rainbow.runs import (
    DRAWS,
    LABELS,
    OPTIONS,
    PREFIXES,
    WARM_UP,
    Curve,
    Entry,
    draw_minibatches,
    make_curve,
    make_settings,
    make_tasks,
    run_entry,
)
from trainers.build import build_context, build_learner, build_pool
from trainers.journal.round_records import charge_losses
from trainers.learner_settings import POOL, list_learners
from trainers.settings import AnswerRuleSettings, LearnerSettings, PoolSettings, TrainerSettings

FTML = next(label for label, name in LABELS.items() if name == MAIN_LEARNER)
LADDER = (0, 1, 2, 10, 20)
"""The numbers of inner steps that FTML's leader also answers after."""
HEADS = ("ridge_head",)
"""The heads in closed form that it also answers with; the good embedding answers with a logistic regression."""


SLOW = 0.4
"""The leader also answers after as many steps of Adam at this share of the rate of *from scratch*."""


class Play(NamedTuple):
    """What a play of the pool records of the tasks after the warm-up.

    Attributes:
        curves: of the pool whose weights come from the losses with the whole support set.
        by_size: of the pools that have weights of their own for each size of the support set.
        experts: curves by the name of the answer.
        weights: of the experts after the last round, by the size of the support set.
        seconds: CPU seconds of all.
    """

    curves: list[Curve]
    by_size: list[Curve]
    experts: dict[str, list[Curve]]
    weights: dict[int, dict[str, float]]
    seconds: float


def make_pool_settings(seed: int) -> TrainerSettings:
    """Return the settings of the pool: FTML leads, and it and *from scratch* play as they do in the table.

    FTML's leader also answers after other numbers of inner steps, by the steps of Adam that *from scratch* makes, by
    as many slower ones, and with a head in closed form.
    """
    base, tuned = make_settings(FTML, seed), OPTIONS["from_scratch"]
    others = (
        LearnerSettings("from_scratch", options=tuned),
        LearnerSettings("good_embedding", options={"classes": 10}),
    )
    inner = replace(
        base.inner,
        answer_steps=LADDER,
        answer_heads=HEADS,
        answer_rules={
            "adam": AnswerRuleSettings((tuned["steps"],), tuned["lr"]),
            "slow_adam": AnswerRuleSettings((tuned["steps"],), SLOW * tuned["lr"], "adam"),
        },
    )
    return replace(
        base,
        inner=inner,
        learner=(LearnerSettings(MAIN_LEARNER), *others),
        pool=PoolSettings("auto"),
        global_labels=True,
    )


def play_pool(settings: TrainerSettings, tasks: Sequence[Task], programs: Path, warm_up: int = WARM_UP) -> Play:
    """Play all learners, and the pools of their answers; a task is scored by all before any learns it."""
    torch.set_num_threads(1)
    began = time.process_time()
    context = build_context(settings, MemoryReplayBuffer(), programs)
    # Each learner has a buffer of its own, so that it draws the minibatches that it draws when it plays alone.
    contexts = {one.name: draw_minibatches(FTML, settings.seed, context) for one in list_learners(settings)}
    learners = {name: build_learner(settings, at, own) for at, (name, own) in enumerate(contexts.items())}
    pools: dict[int, Pool] = {}
    played = Play([], [], {}, {}, 0.0)
    for round, task in enumerate(tasks):
        answered = {name: answer_as_scored(one, task, PREFIXES) for name, one in learners.items()}
        found = dict(_split_by_size(task, answered))
        for size in found.keys() - pools.keys():
            pools[size] = build_pool(settings, learners, context)
        mixed = pools[max(found)].mix_answers(task, answered)
        scores = {size: _score_and_observe(pools[size], task, each) for size, each in found.items()}
        if round >= warm_up:
            played.curves.append(make_curve(score_answers(mixed, task)[""], task))
            played.by_size.append([[size, each[POOL].accuracy] for size, each in scores.items()])
            for name in scores[max(found)].keys() - {POOL}:
                curve = [[size, each[name].accuracy] for size, each in scores.items()]
                played.experts.setdefault(name, []).append(curve)
        for learner in (*learners.values(), *pools.values()):
            learner.learn(task)
        if round == 0:
            for name, one in learners.items():
                if hasattr(one, "task_sum"):
                    find_plans(settings, {name: one}, contexts[name], programs)
    played.weights.update({size: one.weights() for size, one in sorted(pools.items())})
    return played._replace(seconds=time.process_time() - began)


def _split_by_size(task: Task, answered: Mapping[str, TaskAnswers]) -> Iterator[tuple[int, dict[str, TaskAnswers]]]:
    """Yield the sizes of support sets in rising order, each with the answers from a support set of this size."""
    for at, (size, _) in enumerate(next(iter(answered.values())).parts):
        yield size, {name: TaskAnswers(one.before, one.parts[at][1]) for name, one in answered.items()}
    yield len(task.support.x), {name: TaskAnswers(one.before, one.whole) for name, one in answered.items()}


def _score_and_observe(pool: Pool, task: Task, answered: Mapping[str, TaskAnswers]) -> dict[str, Score]:
    """Return the scores of all answers and of the pool, which notes the losses."""
    every = {**answered, POOL: pool.mix_answers(task, answered)}
    scores = {name + suffix: one for name, each in every.items() for suffix, one in score_answers(each, task).items()}
    charged = charge_losses(scores)
    pool.observe(charged, charged[POOL])
    return scores


def run_pool(entry: Entry, work: Path) -> Row:
    """Return the row of a run of the pool; a saved row with the same configuration is loaded instead of computed.

    It has the curves of the pool and of that with weights by size. Of each expert it has the means over the tasks: the
    accuracies by size, and the points that the two accuracies of the table need.
    """
    settings = make_pool_settings(entry.seed)
    asked = {**entry._asdict(), "settings": asdict(settings), "draws": DRAWS}
    file = work / f"{entry.label}-{entry.rounds}-{entry.seed}.json"
    if before := load_row(file, asked):
        return before
    played = play_pool(settings, make_tasks(entry.seed, entry.rounds), work / "programs")
    found = played._asdict() | {
        "experts": {name: _summarize(curves) for name, curves in sorted(played.experts.items())},
        "weights": {size: {name: w for name, w in each.items() if w >= 0.001} for size, each in played.weights.items()},
        "commit": read_commit(),
    }
    return save_row(file, {"asked": asked, **found})


def _summarize(curves: list[Curve]) -> Row:
    found = [compute_efficiency({"curves": curves}, proficiency) for proficiency in (PROFICIENCY, FEWER)]
    right = zip(*([share for _, share in curve] for curve in curves), strict=True)
    return {
        "accuracy": [fmean(float(share or 0.0) for share in one) for one in right],
        "points": [one.points for one in found],
        "reached": [one.reached for one in found],
    }


def run_any(entry: Entry, work: Path) -> Row:
    """Return the row of one run, that of the pool or that of a learner."""
    return (run_pool if LABELS[entry.label] == POOL else run_entry)(entry, work)
