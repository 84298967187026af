"""Play the rounds of a history: score, learn, report, checkpoint; from wherever the last process stopped."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch

from online_meta.path_finder import PATIENCE_SECONDS
from online_meta.regret import LEARNER
from online_meta.types import Learner, Meta, Task
from streams.history import History
from trainers.build import LOCAL, build_learners, build_setup
from trainers.checkpoint import load_checkpoint, load_latest
from trainers.crew import ALONE, Crew
from trainers.decisive import check_same_settings
from trainers.desk import Desk, close_desk, keep_checkpoint, open_desk, publish, report
from trainers.past import HistoryPast
from trainers.paths import Steering, read_paths, told_paths
from trainers.round_lines import round_lines
from trainers.run_files import RunFiles
from trainers.settings import TrainerSettings

POLL_SECONDS = 0.02
PUBLISH_SECONDS = 0.5
END, WAIT = "end", "wait"
log = logging.getLogger(__name__)


@dataclass
class Run:
    """An open run: what is played, by whom, and, on the rank that leads, the files it is written to."""

    settings: TrainerSettings
    history: History
    learners: dict[str, Learner]
    leader: Callable[[], Meta]
    past: HistoryPast
    steering: Steering
    crew: Crew
    desk: Desk | None
    round: int = 0
    checkpointed: int = 0


def open_run(
    settings: TrainerSettings,
    files: RunFiles,
    history: History,
    patience: float = PATIENCE_SECONDS,
    crew: Crew | None = None,
) -> Run:
    """Open a run at its last whole checkpoint, or at its beginning; all ranks of a ``crew`` at the same one.

    Without a crew this process is alone, and steps by the local engine whatever the settings say.

    Faster paths for its meta-gradients are looked for once these have taken ``patience`` seconds.
    Raises ``SettingsChanged`` when the run was begun with settings that give other parameters,
    ``CheckpointError`` when there are checkpoints and none is whole, or rounds before it have lost their lines.
    """
    torch.set_num_threads(settings.engine.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # It only costs time.
    past = HistoryPast(history, torch.device(settings.engine.device))
    setup = build_setup(settings, past, files.programs, settings.engine.kind if crew else LOCAL)
    learners = build_learners(settings, setup)
    crew = crew or ALONE
    rounds = _resume(settings, files, learners, crew)
    share = -(-settings.meta.batch // crew.world)
    return Run(
        settings=settings,
        history=history,
        learners=learners,
        leader=learners[LEARNER].engine.meta,  # type: ignore[attr-defined]  # FTML has an engine
        past=past,
        steering=Steering(learners, settings.engine, share, files.programs, patience),
        crew=crew,
        desk=open_desk(settings, files, rounds) if crew.leads else None,
        round=rounds,
        checkpointed=rounds,
    )


def _resume(settings: TrainerSettings, files: RunFiles, learners: dict[str, Learner], crew: Crew) -> int:
    """Load the last checkpoint that is whole; return how many rounds it has learned."""
    checkpoint = load_latest(files.checkpoints) if crew.leads else None
    rounds: int = crew.share(0 if checkpoint is None else checkpoint.rounds)
    if rounds and not crew.leads:
        checkpoint = load_checkpoint(files.checkpoints / str(rounds))
    if checkpoint is None:
        return 0
    check_same_settings(checkpoint.settings, settings)
    for name, learner in learners.items():
        learner.load(checkpoint.learners[name], rounds)
    return rounds


def play_rounds(run: Run, stop: Event, until: int | None = None) -> int:
    """Play rounds as they are committed, until ``stop`` is set or ``until`` rounds are learned; checkpoint.

    Returns how many are learned. What is being played when ``stop`` is set is finished first. Of several ranks
    the leading one says what they do next; ``stop`` and ``until`` of the others do not count.
    """
    while (order := run.crew.share(_order(run, stop, until) if run.crew.leads else None)) != END:
        if order == WAIT:
            _publish(run)
            stop.wait(POLL_SECONDS)
            continue
        play_update(run, order)
        if run.desk and time.monotonic() - run.desk.published[1] > PUBLISH_SECONDS:
            _publish(run)
        if run.round - run.checkpointed >= run.settings.checkpoint.every_rounds:
            write_checkpoint(run)
    if run.round > run.checkpointed:
        write_checkpoint(run)
    _publish(run)
    return run.round


def _order(run: Run, stop: Event, until: int | None) -> int | str:
    """Return how many rounds can be played now, or that it is time to wait or to end."""
    if stop.is_set() or (until is not None and run.round >= until):
        return END
    available = len(run.history) - run.round
    return (available if until is None else min(available, until - run.round)) or WAIT


def play_update(run: Run, available: int) -> None:
    """Play one plan: score its rounds with every learner, let each learn them, report."""
    # What timing decides is written down before it is played, and shared.
    rounds = run.crew.share(_plan(run, available, run.desk) if run.desk else None)
    tasks: list[Task] = [run.past[round] for round in range(run.round, run.round + rounds)]
    run.steering.follow(read_paths(run.crew.share(_find_paths(run, tasks, run.desk) if run.desk else None)))
    began = time.monotonic()
    scores = {name: [learner.score(task) for task in tasks] for name, learner in run.learners.items()}
    learned = {name: learner.learn(*tasks) for name, learner in run.learners.items()}
    seconds = time.monotonic() - began
    if run.desk:
        entries = [run.history.entry(round) for round in range(run.round, run.round + rounds)]
        for line in round_lines(entries, scores, learned[LEARNER], seconds):
            report(run.desk, line)
    run.round += rounds


def _plan(run: Run, available: int, desk: Desk) -> int:
    """Return how many rounds share the next update."""
    return desk.plans.decide(run.round, available, run.settings.meta.max_rounds_per_update).rounds


def _find_paths(run: Run, tasks: list[Task], desk: Desk) -> dict[str, Any]:
    """Return the paths by which the next update is computed, as JSON has them."""
    if not (desk.known or desk.paths.binds(run.round)):  # What was played before goes by the same paths.
        desk.paths.change(run.round, run.steering.find(desk.paths.at(run.round), tasks))
    return told_paths(desk.paths.at(run.round))


def write_checkpoint(run: Run) -> None:
    """Make all that was reported durable, then the state that led there."""
    learners = {name: learner.save() for name, learner in run.learners.items()}
    if run.desk:
        keep_checkpoint(run.desk, run.round, learners)
    run.checkpointed = run.round


def _publish(run: Run) -> None:
    if run.desk:
        publish(run.desk, run.leader(), run.round)


def close_run(run: Run) -> None:
    """Stop what is being compiled and close the run's files."""
    run.steering.close()
    if run.desk:
        close_desk(run.desk)
