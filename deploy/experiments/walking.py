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

from online_meta.draws import generator
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.regret import LEARNER
from online_meta.revisits import Revisits
from online_meta.setup import keep_alone
from streams.history import History
from trainers.build import build_replay
from trainers.json_lines import Line, LineReader, LineWriter
from trainers.rounds import close_run, open_run, play_rounds
from trainers.run import Run
from trainers.run_files import RunFiles
from trainers.settings import TrainerSettings
from trainers.states import write_checkpoint

SAMPLES = 64


def walk(settings: TrainerSettings, files: RunFiles, history: History, until: int) -> None:
    """Bring the run in ``files`` from its last checkpoint, behind one round at least, to ``until`` rounds."""
    run = open_run(settings, files, history)
    try:
        played = run.round
        learner = run.learners[LEARNER]
        assert isinstance(learner, FollowTheMetaLeader)
        revisits = Revisits(build_replay(settings.meta), settings.seed, settings.meta.batch, keep_alone)
        weights = revisits.load(learner.save())
        walk_policy(revisits, range(played, until), settings.meta.steps_per_round, _measured(run, learner, revisits))
        learner.load({**weights, **revisits.save()}, until)
        _write_lines(files, range(played, until), run)
        run.round = until
        write_checkpoint(run)
        run.writing.finish()
    finally:
        close_run(run)


def walk_policy(revisits: Revisits, rounds: range, steps: int, measured: Iterator[list[float]]) -> None:
    """Ask and tell a policy what a learner of ``steps`` meta-steps a round asks and tells it in these ``rounds``."""
    for round in rounds:
        revisits.begin(round, range(round + 1))
        for step in range(steps):
            picks = revisits.picks(step)
            if revisits.measure is not None:
                for _ in picks:
                    revisits.told(next(measured))
            revisits.end(picks)


def _measured(run: Run, learner: FollowTheMetaLeader, revisits: Revisits) -> Iterator[list[float]]:
    """Yield what the policy measures of a few real meta-gradients, in random order, each times a random factor."""
    if revisits.measure is None:
        return
    meta, gradient = run.leader(), learner.total.gradient
    rounds = range(max(0, run.round - SAMPLES), run.round)
    values = np.array([revisits.measure(gradient(meta, run.past[round])).double().tolist() for round in rounds])
    yield from _vary(values)


def _vary(values: NDArray[np.float64]) -> Iterator[list[float]]:
    random = generator(len(values))
    while True:
        yield (values[random.integers(len(values))] * random.lognormal(0.0, 0.5)).tolist()


def _write_lines(files: RunFiles, rounds: range, run: Run) -> None:
    """Write a line and a plan for each of ``rounds``, those of the last round that was played but for the number."""
    last = _last_line(files.rounds)
    assert run.desk is not None
    plans = LineWriter(files.plans)
    for round in rounds:
        run.desk.lines.append({**last, "round": round, "id": f"walked-{round}"})
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
