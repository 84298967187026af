"""Fast-forward a run to a late round: its replay memory and files have the size they have after playing every round.

The network does not learn. In each round, the replay policy draws samples and observes measurements as in a real run,
but the measurements are drawn from those of a few real meta-gradients. The cost of further rounds is therefore
realistic. What the run has learned is not.
"""

from collections.abc import Iterator
from pathlib import Path
from threading import Event

import numpy as np
from numpy.typing import NDArray
from online_meta.answers import unpack_meta
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
from trainers.loop.rounds import open_run, play_rounds
from trainers.loop.run import Run, close_run
from trainers.settings import TrainerSettings

SAMPLES = 64


def fast_forward(settings: TrainerSettings, files: RunFiles, history: History, until: int) -> None:
    """Advance the run in ``files`` from its last checkpoint, after at least one round, to ``until`` rounds."""
    run = open_run(settings, files, history)
    try:
        played = run.round
        learner = run.learners[MAIN_LEARNER]
        assert isinstance(learner, FollowTheMetaLeader)
        sampler = ReplaySampler(build_replay(settings.meta), settings.seed, settings.meta.batch, gather_single_process)
        weights = sampler.load(learner.save())
        fast_forward_policy(
            sampler, range(played, until), settings.meta.steps_per_round, _yield_measurements(run, learner, sampler)
        )
        learner.load({**weights, **sampler.save()}, until)
        _write_lines(files, range(played, until), run)
        run.round = until
        start_checkpoint(run)
        run.checkpoint_task.finish()
    finally:
        close_run(run)


def fast_forward_policy(sampler: ReplaySampler, rounds: range, steps: int, measured: Iterator[list[float]]) -> None:
    """Make the calls to a policy that a learner with ``steps`` meta-steps per round makes in ``rounds``."""
    for round in rounds:
        sampler.begin_round(round, range(round + 1))
        for step in range(steps):
            samples = sampler.draw_samples(step)
            if sampler.measure is not None:
                for _ in samples:
                    sampler.observe(next(measured))
            sampler.finish_step(samples)


def _yield_measurements(run: Run, learner: FollowTheMetaLeader, sampler: ReplaySampler) -> Iterator[list[float]]:
    """Yield measurements of a few real meta-gradients in random order, each multiplied by a random factor."""
    if sampler.measure is None:
        return
    meta, gradient = unpack_meta(run.answering.learner.state()), learner.task_sum.gradient
    rounds = range(max(0, run.round - SAMPLES), run.round)
    values = np.array([sampler.measure(gradient(meta, run.buffer[round])).double().tolist() for round in rounds])
    yield from _draw_varied(values)


def _draw_varied(values: NDArray[np.float64]) -> Iterator[list[float]]:
    random = generator(len(values))
    while True:
        yield (values[random.integers(len(values))] * random.lognormal(0.0, 0.5)).tolist()


def _write_lines(files: RunFiles, rounds: range, run: Run) -> None:
    """Write a record and an update plan for each of ``rounds``, copied from the last round that was played."""
    last = _read_last_line(files.rounds)
    assert run.journal is not None
    plans = LineWriter(files.update_log)
    for round in rounds:
        run.journal.lines.append({**last, "round": round, "id": f"walked-{round}"})
        plans.append({"round": round, "rounds": 1})
    plans.sync()
    plans.close()


def _read_last_line(path: Path) -> Line:
    *_, last = LineReader(path).lines()
    return last


def play(settings: TrainerSettings, files: RunFiles, history: History, until: int) -> None:
    """Start or continue the run in ``files`` until it has learned ``until`` rounds."""
    run = open_run(settings, files, history)
    try:
        play_rounds(run, Event(), until)
    finally:
        close_run(run)
