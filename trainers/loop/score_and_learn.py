"""Score the tasks of an update with every learner, and let every learner learn them."""

import contextlib
import time
from collections.abc import Iterator

from online_meta.regret.scoring import TaskAnswers, answer_as_scored, score_answers
from online_meta.types import Learned, Score, Task
from trainers.journal.round_records import charge_losses
from trainers.learner_settings import POOL
from trainers.loop.recovery import UNKNOWN_ROUND, collect_failure
from trainers.loop.run import Run


def score_tasks(run: Run, tasks: list[Task], spent: dict[str, float]) -> dict[str, list[Score]]:
    """Score the tasks of an update, by the name of each answer; add exceptions to the run's failures.

    The seconds of each learner are added to ``spent``.
    """
    scores: dict[str, list[Score]] = {}
    answered: list[dict[str, TaskAnswers]] = [{} for _ in tasks]
    prefixes, pool = run.settings.regret.prefixes, run.pool
    with run.rank_stats.measure_work():
        for name, learner in run.learners.items():
            with _measure(spent, name):
                for index, task in enumerate(tasks):
                    with collect_failure(run, run.round + index):
                        if learner is pool:
                            found = pool.mix_answers(task, answered[index])
                        else:
                            found = answer_as_scored(learner, task, prefixes)
                        answered[index][name] = found
                        for suffix, score in score_answers(found, task, run.measure).items():
                            scores.setdefault(name + suffix, []).append(score)
    if pool:
        for index in range(len(tasks)):
            own = {name: each[index] for name, each in scores.items() if len(each) == len(tasks)}
            charged = charge_losses(own, run.settings.regret.loss_cap)
            pool.observe(charged, charged.get(POOL, 0.0))
    return scores


def learn_tasks(run: Run, tasks: list[Task], spent: dict[str, float]) -> dict[str, Learned]:
    """Let every learner learn the tasks; add exceptions to the run's failures, without a round if it is not known.

    The seconds of each learner are added to ``spent``.
    """
    learned: dict[str, Learned] = {}
    with run.rank_stats.measure_work(), collect_failure(run, run.round if len(tasks) == 1 else UNKNOWN_ROUND):
        for name, learner in run.learners.items():
            with _measure(spent, name):
                learned[name] = learner.learn(*tasks)
    return learned


@contextlib.contextmanager
def _measure(spent: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the block to those that the learner ``name`` has spent."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        spent[name] += time.perf_counter() - begin
