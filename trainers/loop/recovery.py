"""Save, restore and roll back the state of a run's learners with checkpoints, and quarantine rounds that fail."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import NamedTuple

from online_meta.batching.failures import is_task_failure
from online_meta.learners.pool import Pool, swap_experts
from online_meta.types import Learner, Params
from trainers.build import build_context, build_learner
from trainers.checkpoint import (
    Checkpoint,
    CheckpointError,
    begin_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    read_latest_settings,
)
from trainers.distributed.ranks import RankGroup
from trainers.journal.divergence import Diverged, Rollback, list_rollback_targets
from trainers.journal.heartbeat import COMPILING
from trainers.journal.journal import RunJournal, commit_rounds, record_round
from trainers.journal.quarantine import DEATHS, TooManyQuarantined, make_quarantine
from trainers.journal.round_records import make_quarantine_record
from trainers.journal.run_files import RunFiles
from trainers.journal.tuning_log import describe_decision, find_won, read_decision, read_decisions
from trainers.learner_settings import Decision, obey_decisions
from trainers.loop.async_checkpoint import Snapshot, complete_checkpoint, make_shard_filter, write_own_shard
from trainers.loop.run import Run, close_run
from trainers.seen_inputs import SEEN, SeenInputs
from trainers.settings import TrainerSettings
from trainers.settings_fingerprint import adopt_recorded_settings, check_same_settings

MAX_ROLLBACKS = 20
log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """The newest intact checkpoint of a run, from which it continues.

    Attributes:
        begun: the settings with which the run began.
        rounds: the number of rounds that it has learned; 0 if there is none.
        checkpoint: the checkpoint, on a rank that can read it.
        decisions: the decisions of the run's race that hold for the next round.
    """

    begun: TrainerSettings
    rounds: int
    checkpoint: Checkpoint | None
    decisions: list[Decision]

    @property
    def settings(self) -> TrainerSettings:
        """The settings for the next round."""
        return obey_decisions(self.begun, self.decisions)

    @property
    def won(self) -> str | None:
        """The name of the learner that has won the race; None while it goes on."""
        return find_won(self.decisions)


def find_restart(settings: TrainerSettings, files: RunFiles, rank_group: RankGroup) -> Restored:
    """Read the newest intact checkpoint, and the decisions that hold after it; a collective.

    Args:
        settings: of the run.
        files: of the run.
        rank_group: of the run.

    Raises:
        SettingsChanged: if the checkpoint was made with settings that lead to other parameters.
        CheckpointError: if there are checkpoints and all are damaged.
    """
    recorded = read_latest_settings(files.checkpoints) if rank_group.is_coordinator else None
    settings = adopt_recorded_settings(settings, rank_group.broadcast(recorded))
    checkpoint = load_latest(files.checkpoints) if rank_group.is_coordinator else None
    rounds: int = rank_group.broadcast(0 if checkpoint is None else checkpoint.rounds)
    if rounds and rank_group.has_storage and checkpoint is None:
        checkpoint = load_checkpoint(files.checkpoints / str(rounds))
    made = read_decisions(files.tuning_log, settings) if rank_group.is_coordinator else []
    logged = rank_group.broadcast({"decisions": [one._asdict() for one in made]})
    decisions = [read_decision(line) for line in logged["decisions"]]
    if checkpoint is not None:  # A checkpoint is written before the decision that is made at its round.
        check_same_settings(
            checkpoint.settings, obey_decisions(settings, [one for one in decisions if one.round < rounds])
        )
    return Restored(settings, rounds, checkpoint, [one for one in decisions if one.round <= rounds])


def restore(restored: Restored, learners: dict[str, Learner], rank_group: RankGroup) -> None:
    """Load a checkpoint into the learners; a collective. What has won the race there leads from now on."""
    _, rounds, checkpoint, decisions = restored
    if not rounds:
        return
    leader = next(iter(learners))
    won = restored.won if decisions and decisions[-1].round == rounds else None
    for name, learner in learners.items():
        saved = None if checkpoint is None else checkpoint.learners[won if won and name == leader else name]
        if won and saved is not None and isinstance(learner, Pool):
            saved = swap_experts(saved, leader, won)
        learner.load(_broadcast_saved(rank_group, saved), rounds)


def restore_seen(restored: Restored) -> SeenInputs:
    """Return the ranges of the inputs in a checkpoint, from which a run continues."""
    seen = SeenInputs()
    if restored.rounds:
        seen.load(restored.checkpoint.learners.get(SEEN) if restored.checkpoint else None)
    return seen


def adopt_decision(run: Run, stop: Event) -> None:
    """Continue with the settings that a decision of the race leaves, from the checkpoint of this round; a collective.

    Args:
        run: to change; its newest checkpoint is of this round.
        stop: set to end the run.
    """
    run.checkpoint_task.finish()
    if run.journal and run.journal.tuning:
        log.info("before round %d: %s", run.round, describe_decision(run.journal.tuning.decisions[-1]))
    reopen(run)
    run.plan_selector.stop_with(stop, lambda: run.heartbeat.beat(COMPILING, run.round))


def reopen(run: Run) -> None:
    """Open a run again at its newest checkpoint; a collective."""
    close_run(run)
    interrupted = run.journal.interrupted_round if run.journal else None
    vars(run).update(vars(run.reopen()))
    if run.journal:
        run.journal.interrupted_round = interrupted


def _broadcast_saved(rank_group: RankGroup, saved: Params | None) -> Params:
    """Return on every rank the state that the ranks with storage have read."""
    return rank_group.broadcast_tensors(saved) if rank_group.remote else saved or {}


def start_checkpoint(run: Run) -> None:
    """Copy the learners' state and start to write it as a checkpoint in the background; a collective."""
    run.checkpoint_task.finish()
    if run.journal:
        commit_rounds(run.journal)
    start_time, rounds, rank_group = time.monotonic(), run.round, run.rank_group
    unfinished = Path(
        rank_group.broadcast(
            str(begin_checkpoint(run.files.checkpoints, rounds)) if rank_group.is_coordinator else None
        )
    )
    keep = make_shard_filter(rank_group) if rank_group.world > 1 else None
    learners = {name: learner.save(keep) for name, learner in run.learners.items()}
    if run.journal and run.seen.ranges is not None:
        learners[SEEN] = run.seen.save()
    snapshot = Snapshot(rounds, learners, time.monotonic() - start_time)
    if run.journal:
        run.checkpoint_task.start(
            partial(
                complete_checkpoint,
                unfinished,
                run.journal,
                rank_group,
                snapshot,
                _pinned_checkpoints(run, run.journal),
            )
        )
    elif rank_group.has_storage:
        run.checkpoint_task.start(partial(write_own_shard, unfinished, rank_group, learners))
    run.last_checkpoint = rounds


def _pinned_checkpoints(run: Run, journal: RunJournal) -> set[int]:
    """Return the checkpoints that must not be removed, because the leader may have to roll back to them."""
    pinned = journal.rollback_log.needed_checkpoints(run.round)
    if journal.streak.length:
        pinned.add(
            list_rollback_targets(
                list_checkpoints(run.files.checkpoints), journal.streak, journal.rollback_log.before(run.round)
            )[0]
        )
    return pinned


def plan_rollback(run: Run, journal: RunJournal) -> None:
    """Log a rollback of the leader before the next round, if ``meta.max_skipped`` meta-steps in a row were skipped.

    Raises:
        Diverged: if the settings say to stop instead, or after ``MAX_ROLLBACKS`` rollbacks.
    """
    meta, streak, rollback_log = run.settings.meta, journal.streak, journal.rollback_log
    if streak.length < meta.max_skipped or rollback_log.at(run.round) is not None:
        return
    what = f"{streak.length} meta-steps in a row, from round {streak.first} on, were not finite"
    advice = "no task is lost: run `online-meta replay` on the history with a smaller meta.lr or meta.clip_norm"
    if meta.when_diverged == "stop":
        raise Diverged(f"{what}, and meta.when_diverged is 'stop'; {advice}")
    before = rollback_log.before(run.round)
    if len(before) >= MAX_ROLLBACKS:
        raise Diverged(f"{what}, and {len(before)} rollbacks have not helped; {advice}")
    run.checkpoint_task.finish()
    saved = list_rollback_targets(list_checkpoints(run.files.checkpoints), streak, before)
    rollback_log.add(Rollback(run.round, next(rounds for rounds in saved if _is_loadable(run.files, rounds))))


def _is_loadable(files: RunFiles, rounds: int) -> bool:
    try:
        return not rounds or bool(load_checkpoint(files.checkpoints / str(rounds)))
    except CheckpointError as error:
        log.error("skipping the checkpoint of round %d: %s", rounds, error)
        return False


def rollback(run: Run, back_to: int) -> None:
    """Restore the leading learner to its state after ``back_to`` rounds and halve its learning rate; a collective.

    Args:
        run: to change.
        back_to: round of a checkpoint, or 0 for the beginning.
    """
    name = run.leader_name
    leader = run.learners[name]
    if back_to:
        has_storage = run.rank_group.has_storage
        learners = load_checkpoint(run.files.checkpoints / str(back_to)).learners if has_storage else {}
        saved = learners.get(run.won or name, learners.get(name))  # Before it won, it had a name of its own.
        leader.load(_broadcast_saved(run.rank_group, saved), run.round)
    else:  # What one rank has at the beginning, every engine can load.
        leader.load(build_learner(run.settings, 0, build_context(run.settings, run.buffer)).save(), run.round)
    leader.lr_scale /= 2
    if run.journal:
        run.journal.streak.reset()
        log.error(
            "before round %d the leader is rolled back to its state after %d rounds, with %g of the learning rate: "
            "its meta-steps were no longer finite",
            run.round,
            back_to,
            leader.lr_scale,
        )


UNKNOWN_ROUND = -1
"""Stands for the round of an exception when several rounds may have caused it."""


class RepeatFailed(RuntimeError):
    """The model fails on a round that it learned before, so that the run cannot be repeated."""


@contextmanager
def collect_failure(run: Run, round: int) -> Iterator[None]:
    """Add the model's exception on a task of ``round`` in this block to the run's failures."""
    try:
        yield
    except Exception as error:
        if not is_task_failure(error):
            raise
        run.failures.add(round, error)


def quarantine_failures(run: Run) -> bool:
    """Quarantine the rounds on which the model failed on any rank, and reopen the run without them; a collective.

    A failure that several rounds may have caused splits the update instead: its first round is then played alone.

    Args:
        run: to change; its ``failures`` are those of this rank.

    Returns:
        Whether a round failed. The run is then at its newest checkpoint again.

    Raises:
        TooManyQuarantined: if too many of the last rounds are quarantined.
        RepeatFailed: if an earlier process has learned the rounds of this update without a failure.
    """
    own = [[round, text] for round, text in run.failures.found.items()]
    failed = {round: text for share in run.rank_group.gather(own) for round, text in share}
    if not failed:
        return False
    journal = run.journal
    repeat, too_many = run.rank_group.broadcast(_log_failures(run, journal, failed) if journal else None)
    if repeat:
        raise RepeatFailed(repeat)
    if too_many:
        raise TooManyQuarantined(too_many)
    reopen(run)
    return True


def _log_failures(run: Run, journal: RunJournal, failed: dict[int, str]) -> list[str | None]:
    """Log the quarantine of failed rounds; return why the rounds cannot be repeated, and why the run must stop."""
    if journal.recorded_lines:
        what = f"the model fails on round {max(failed)}, which it learned before: {failed[max(failed)]}"
        return [f"{what}. Has its code or a library changed? Start the version that began the run, or replay it", None]
    known = [round for round in sorted(failed) if round != UNKNOWN_ROUND]
    if not known:
        log.error("round %d is played alone, because its update failed: %s", run.round, failed[UNKNOWN_ROUND])
        journal.update_log.amend(run.round, 1)
        return [None, None]
    for round in known:
        log.error("round %d is quarantined: %s", round, failed[round])
    journal.quarantine_log.add(make_quarantine(round, run.round, "model_error", failed[round]) for round in known)
    try:
        journal.quarantine_log.check_count(max(run.round, *known))
    except TooManyQuarantined as error:
        return [None, str(error)]
    return [None, None]


def retry_interrupted(journal: RunJournal, round: int, rounds: int) -> int:
    """Decide how to retry the update in which an earlier process died, and log it.

    The update is tried again after the first death. After the second one, its first round is played alone, or
    quarantined if it was alone already.

    Args:
        journal: of the run.
        round: first round of the update.
        rounds: number of its rounds.

    Returns:
        The number of rounds to play; 0 if the round is quarantined.
    """
    journal.interrupted_round = None
    deaths = 1 + journal.quarantine_log.count_attempts(round, rounds)
    if deaths < DEATHS:
        journal.quarantine_log.add_attempt(round, rounds)
        return rounds
    if rounds > 1:
        log.error("round %d is played alone, because the process died %d times in its update", round, deaths)
        journal.update_log.amend(round, 1)
        return 1
    detail = f"the process died {deaths} times in the update of this round"
    log.error("round %d is quarantined: %s", round, detail)
    journal.quarantine_log.add([make_quarantine(round, round, "process_death", detail)])
    return 0


def skip_round(run: Run) -> None:
    """Record the next round as quarantined; the learners count it, but learn nothing. A collective."""
    for learner in run.learners.values():
        learner.load(learner.save(), run.round + 1)
    if run.journal and run.history is not None:
        quarantine = run.journal.quarantine_log.find(run.round)
        assert quarantine is not None
        record_round(run.journal, make_quarantine_record(run.history.entry(run.round), quarantine, run.idle_steps))
    run.round += 1
    run.idle_updates, run.idle_steps = 0, []


def take_requests(run: Run, journal: RunJournal) -> None:
    """Log the quarantines that operators have requested; they take effect from the next update on."""
    path, requests = run.files.quarantine_requests, journal.quarantine_requests
    planned = journal.recorded_lines or journal.update_log.is_planned(run.round)
    if planned or not path.exists() or path.stat().st_size == requests.position:
        return
    for line in requests.refresh():
        # Idle updates at this round were made with the rounds that were available then.
        at = run.round + 1 if run.idle_updates and line["round"] < run.round else run.round
        journal.quarantine_log.add([make_quarantine(line["round"], at, "operator", line["reason"])])
        log.warning("round %d is quarantined by an operator: %s", line["round"], line["reason"])
