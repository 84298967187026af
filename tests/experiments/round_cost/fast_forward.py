"""A run that begins at a late round: what it remembers and its files are as if all rounds before had been played.

No network learns on the way: the replay policy itself is asked and told, round by round, what a learner asks and tells
it, but the measurements it is told are drawn from those of a few real meta-gradients. What such a run costs, it costs
for the same reasons as one that was played; what it has learned means nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from threading import Event

import numpy as np
from numpy.typing import NDArray
from online_meta.learners import gather_single_process
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.replay import generator
from online_meta.replay._sampler import ReplaySampler
from streams.history.history import History
from trainers.build import build_replay
from trainers.journal.jsonl import Line, LineReader, LineWriter
from trainers.journal.run_files import RunFiles
from trainers.loop.recovery import start_checkpoint
from trainers.loop.rounds import close_run, open_run, play_rounds
from trainers.loop.run import Run
from trainers.settings import TrainerSettings

SAMPLES = 64


def walk(settings: TrainerSettings, files: RunFiles, history: History, until: int) -> None:
    """Bring the run in ``files`` from its last checkpoint, behind one round at least, to ``until`` rounds."""
    run = open_run(settings, files, history)
    try:
        played = run.round
        learner = run.learners[MAIN_LEARNER]
        assert isinstance(learner, FollowTheMetaLeader)
        sampler = ReplaySampler(build_replay(settings.meta), settings.seed, settings.meta.batch, gather_single_process)
        weights = sampler.load(learner.save())
        walk_policy(sampler, range(played, until), settings.meta.steps_per_round, _measured(run, learner, sampler))
        learner.load({**weights, **sampler.save()}, until)
        _write_lines(files, range(played, until), run)
        run.round = until
        start_checkpoint(run)
        run.checkpoint_task.finish()
    finally:
        close_run(run)


def walk_policy(sampler: ReplaySampler, rounds: range, steps: int, measured: Iterator[list[float]]) -> None:
    """Ask and tell a policy what a learner of ``steps`` meta-steps a round asks and tells it in these ``rounds``."""
    for round in rounds:
        sampler.begin_round(round, range(round + 1))
        for step in range(steps):
            samples = sampler.draw_samples(step)
            if sampler.measure is not None:
                for _ in samples:
                    sampler.observe(next(measured))
            sampler.finish_step(samples)


def _measured(run: Run, learner: FollowTheMetaLeader, sampler: ReplaySampler) -> Iterator[list[float]]:
    """Yield what the policy measures of a few real meta-gradients, in random order, each times a random factor."""
    if sampler.measure is None:
        return
    meta, gradient = run.leader(), learner.task_sum.gradient
    rounds = range(max(0, run.round - SAMPLES), run.round)
    values = np.array([sampler.measure(gradient(meta, run.buffer[round])).double().tolist() for round in rounds])
    yield from _vary(values)


def _vary(values: NDArray[np.float64]) -> Iterator[list[float]]:
    random = generator(len(values))
    while True:
        yield (values[random.integers(len(values))] * random.lognormal(0.0, 0.5)).tolist()


def _write_lines(files: RunFiles, rounds: range, run: Run) -> None:
    """Write a line and a plan for each of ``rounds``, those of the last round that was played but for the number."""
    last = _last_line(files.rounds)
    assert run.journal is not None
    plans = LineWriter(files.update_log)
    for round in rounds:
        run.journal.lines.append({**last, "round": round, "id": f"walked-{round}"})
        plans.append({"round": round, "rounds": 1})
    plans.sync()
    plans.close()


def _last_line(path: Path) -> Line:
    *_, last = LineReader(path).lines()
    return last


def play(settings: TrainerSettings, files: RunFiles, history: History, until: int) -> None:
    """Play the run in ``files``, or go on with it, until it has learned ``until`` rounds."""
    run = open_run(settings, files, history)
    try:
        play_rounds(run, Event(), until)
    finally:
        close_run(run)
