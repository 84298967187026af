"""Where the state of a run's learners comes from and goes to: checkpoints."""

import logging
import time
from functools import partial
from pathlib import Path

from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.meta_optimizer import named
from online_meta.regret import LEARNER
from online_meta.types import Learner, Params
from trainers.build import build_setup
from trainers.checkpoint import (
    CheckpointError,
    begin_checkpoint,
    load_checkpoint,
    load_latest,
    saved_rounds,
)
from trainers.crew import Crew
from trainers.decisive import check_same_settings
from trainers.desk import Desk
from trainers.divergence import Diverged, Rollback, trusted
from trainers.run import Run
from trainers.run_files import RunFiles
from trainers.saving import Snapshot, kept_by, write_own_shard, write_whole
from trainers.settings import TrainerSettings

MOST_ROLLBACKS = 20
log = logging.getLogger(__name__)


def resume(settings: TrainerSettings, files: RunFiles, learners: dict[str, Learner], crew: Crew) -> int:
    """Load the last checkpoint that is whole; return how many rounds it has learned."""
    checkpoint = load_latest(files.checkpoints) if crew.leads else None
    rounds: int = crew.share(0 if checkpoint is None else checkpoint.rounds)
    if not rounds:
        return 0
    if crew.writes and checkpoint is None:
        checkpoint = load_checkpoint(files.checkpoints / str(rounds))
    if checkpoint is not None:
        check_same_settings(checkpoint.settings, settings)
    for name, learner in learners.items():
        learner.load(_spread(crew, None if checkpoint is None else checkpoint.learners[name]), rounds)
    return rounds


def _spread(crew: Crew, saved: Params | None) -> Params:
    """Return what the ranks that see the run's files have read on all ranks."""
    return crew.share_tensors(saved) if crew.far else saved or {}


def write_checkpoint(run: Run) -> None:
    """Begin to write the state that all reported rounds led to; training goes on when it is copied."""
    run.writing.finish()
    began, rounds, crew = time.monotonic(), run.round, run.crew
    unfinished = Path(crew.share(str(begin_checkpoint(run.files.checkpoints, rounds)) if crew.leads else None))
    keep = kept_by(crew) if crew.world > 1 else None
    learners = {name: learner.save(keep) for name, learner in run.learners.items()}
    snapshot = Snapshot(rounds, learners, time.monotonic() - began)
    if run.desk:
        run.writing.start(partial(write_whole, unfinished, run.desk, crew, snapshot, _held(run, run.desk)))
    elif crew.writes:
        run.writing.start(partial(write_own_shard, unfinished, crew, learners))
    run.checkpointed = rounds


def _held(run: Run, desk: Desk) -> set[int]:
    """Return the checkpoints that are kept however old they are, for the leader may have to go back to them."""
    held = desk.rollbacks.wanted(run.round)
    if desk.streak.length:
        held.add(trusted(saved_rounds(run.files.checkpoints), desk.streak, desk.rollbacks.before(run.round))[0])
    return held


def find_way_back(run: Run, desk: Desk) -> None:
    """Write down, if meta-step after meta-step was skipped, what the leader goes back to before the next round.

    Raises ``Diverged`` when the run is to stop then, or has gone back too often.
    """
    meta, streak, book = run.settings.meta, desk.streak, desk.rollbacks
    if streak.length < meta.max_skipped or book.at(run.round) is not None:
        return
    what = f"{streak.length} meta-steps in a row, from round {streak.first} on, were not finite"
    advice = "nothing is lost: play the history again by `online-meta replay` with a smaller meta.lr or meta.clip_norm"
    if meta.when_diverged == "stop":
        raise Diverged(f"{what}, and meta.when_diverged is 'stop'; {advice}")
    before = book.before(run.round)
    if len(before) >= MOST_ROLLBACKS:
        raise Diverged(f"{what}, and {len(before)} rollbacks have not helped; {advice}")
    run.writing.finish()
    saved = trusted(saved_rounds(run.files.checkpoints), streak, before)
    book.add(Rollback(run.round, next(rounds for rounds in saved if _is_whole(run.files, rounds))))


def _is_whole(files: RunFiles, rounds: int) -> bool:
    try:
        return not rounds or bool(load_checkpoint(files.checkpoints / str(rounds)))
    except CheckpointError as error:
        log.error("checkpoint of round %d is passed over: %s", rounds, error)
        return False


def go_back(run: Run, back_to: int) -> None:
    """Let the leader be again what it was after ``back_to`` rounds, and step half as far from here on."""
    leader = run.learners[LEARNER]
    assert isinstance(leader, FollowTheMetaLeader)
    if back_to:
        here = run.crew.writes
        saved = load_checkpoint(run.files.checkpoints / str(back_to)).learners[LEARNER] if here else None
        leader.load(_spread(run.crew, saved), run.round)
    else:
        leader.load(named(build_setup(run.settings, run.past).start), run.round)
    leader.lr_scale /= 2
    if run.desk:
        run.desk.streak.end()
        log.error(
            "before round %d the leader goes back to what it was after %d rounds, with %g of the learning rate: "
            "its meta-steps were not finite any more",
            run.round,
            back_to,
            leader.lr_scale,
        )
