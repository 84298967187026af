"""Play the rounds of a history: score, learn, record, checkpoint; continue where the last process stopped."""

import contextlib
import dataclasses
import json
import os
import socket
import time
from dataclasses import dataclass
from enum import Enum
from functools import partial
from threading import Event
from typing import Any, NamedTuple

import torch

from online_meta.batches import count_samples
from online_meta.batching.autotune import MEASURE_AFTER_SECONDS
from online_meta.batching.failures import TaskFailures, is_task_failure
from online_meta.types import Learned, Score, Task
from streams.atomic_files import replace_file
from streams.history.history import History
from streams.history.predictions import read_stored_answer
from trainers.build import LOCAL, build_context, build_engine, build_learners, find_answering_learner
from trainers.distributed.process_group import AdaptiveTimeout
from trainers.distributed.rank_stats import RankStats, measure_collectives
from trainers.distributed.ranks import SINGLE_PROCESS, RankGroup
from trainers.journal.divergence import Diverged
from trainers.journal.heartbeat import COMPILING, PLAYING, REPLAYING, WAITING, HeartbeatWriter
from trainers.journal.journal import (
    RunJournal,
    commit_rounds,
    note_process_start,
    open_journal,
    publish_leader,
    record_round,
    should_commit,
)
from trainers.journal.plans import execution_plans_from_json, execution_plans_to_json
from trainers.journal.round_records import SupportSizes, make_round_records, read_content
from trainers.journal.run_files import RunFiles
from trainers.loop.async_checkpoint import BackgroundTask
from trainers.loop.batching_plan import select_plans
from trainers.loop.recovery import (
    adopt_decision,
    find_restart,
    plan_rollback,
    quarantine_failures,
    restore,
    restore_seen,
    retry_interrupted,
    rollback,
    skip_round,
    start_checkpoint,
    take_requests,
)
from trainers.loop.run import Run
from trainers.loop.score_and_learn import learn_tasks, score_tasks
from trainers.loop.task_prefetch import HistoryBuffer
from trainers.settings import TrainerSettings
from trainers.settings_fingerprint import fingerprint

REPORT_SECONDS = 0.5


def should_report(run: Run, journal: RunJournal) -> bool:
    """Return whether a rank report is due: rounds were played, and the last report is over ``REPORT_SECONDS`` old."""
    return run.round != journal.last_reported[0] and time.monotonic() - journal.last_reported[1] > REPORT_SECONDS


def report_ranks(run: Run) -> None:
    """Write the counters of all ranks to the file of the rank report; a collective."""
    own = {
        "rank": run.rank_group.rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        **dataclasses.asdict(run.rank_stats),
    }
    ranks = run.rank_group.gather(own)
    if run.journal is None:
        return
    report = {
        "started": run.journal.started,
        "world_size": run.rank_group.world,
        "near": run.rank_group.with_storage,
        "ranks": ranks,
    }
    with contextlib.suppress(OSError):  # The report is not essential: a full disk must not end training here.
        replace_file(run.files.ranks, json.dumps(report).encode(), durable=False)
    run.journal.last_reported = (run.round, time.monotonic())


POLL_SECONDS = 0.02


PUBLISH_SECONDS = 0.5


class Command(Enum):
    """The commands that the coordinator broadcasts to all ranks, in addition to ``Play``."""

    END = "end"
    WAIT = "wait"
    CHECKPOINT = "save"
    REPORT_RANKS = "tell"
    IDLE_UPDATE = "more"
    ADOPT_DECISION = "tune"


@dataclass(frozen=True)
class Play:
    """The command to play the next update, with at most ``rounds`` rounds."""

    rounds: int


def open_run(
    settings: TrainerSettings,
    files: RunFiles,
    history: History | None,
    measure_after: float = MEASURE_AFTER_SECONDS,
    rank_group: RankGroup | None = None,
    heartbeat: HeartbeatWriter | None = None,
    count_deaths: bool = False,
) -> Run:
    """Open a run at its newest intact checkpoint, or at its beginning; a collective.

    Args:
        settings: of the run.
        files: of the run.
        history: of the run; None on a rank without storage.
        measure_after: seconds of computing meta-gradients before faster execution plans are measured.
        rank_group: of the run; None for a single process, which uses the local engine whatever the settings say.
        heartbeat: of this process; None writes none.
        count_deaths: whether a process that ended in the middle of an update has died; two deaths quarantine a round.

    Raises:
        SettingsChanged: if the run was begun with settings that lead to other parameters.
        CheckpointError: if all checkpoints are damaged, or lines of rounds before the checkpoint are missing.
    """
    configure_torch(settings.engine.threads)
    reopen = partial(open_run, settings, files, history, measure_after, rank_group, heartbeat)
    kind, rank_group = settings.engine.kind if rank_group else LOCAL, rank_group or SINGLE_PROCESS
    restored, rank_stats, failures = find_restart(settings, files, rank_group), RankStats(), TaskFailures()
    settings, rounds, device = restored.settings, restored.rounds, torch.device(restored.settings.engine.device)
    timed_group = measure_collectives(rank_group, rank_stats)  # The start of the ranks does not count as waiting.
    buffer = HistoryBuffer(history, device, timed_group, None if history is None else files.own)
    context = build_context(settings, buffer, files.programs, kind, rank_stats, timed_group.gather, failures)
    learners = build_learners(settings, context, partial(build_engine, kind=kind, rank_stats=rank_stats))
    restore(restored, learners, rank_group)
    journal = open_journal(settings, files, rounds, fingerprint(restored.begun)) if rank_group.is_coordinator else None
    if journal and count_deaths:
        note_process_start(journal, rounds)
    rollback_count = rank_group.broadcast(len(journal.rollback_log.before(rounds)) if journal else None)
    next(iter(learners.values())).lr_scale = 0.5**rollback_count
    return Run(
        settings=settings,
        files=files,
        history=history,
        learners=learners,
        answering=find_answering_learner(settings, learners),
        buffer=buffer,
        plan_selector=select_plans(settings, learners, files.programs, rank_group.world, measure_after),
        rank_group=timed_group,
        rank_stats=rank_stats,
        checkpoint_task=BackgroundTask("checkpoint"),
        rank_timeout=AdaptiveTimeout(settings.engine.timeout_seconds),
        journal=journal,
        heartbeat=heartbeat or HeartbeatWriter(None),
        failures=failures,
        seen=restore_seen(restored),
        reopen=reopen,
        round=rounds,
        last_checkpoint=rounds,
        won=restored.won,
    )


def configure_torch(threads: int) -> None:
    """Set the number of torch's threads, and choose algorithms that give the same bits each time."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # It would only cost time.


def play_rounds(run: Run, stop: Event, until: int | None = None) -> int:
    """Play rounds as they are committed, and write checkpoints; a collective.

    Args:
        run: to play.
        stop: set to end after the current update; only that of the coordinator counts.
        until: number of learned rounds at which to end, None for no limit; only that of the coordinator counts.

    Returns:
        The number of rounds that are learned.

    Raises:
        OSError: if a file cannot be written.
        Diverged: if the run must stop because its meta-steps are no longer finite.
    """
    run.plan_selector.stop_with(stop, lambda: run.heartbeat.beat(COMPILING, run.round))
    while (command := _next_command(run, stop, until)) is not Command.END:
        _beat(run, command)
        if run.journal and not isinstance(command, Play):
            commit_rounds(run.journal)
        if command is Command.CHECKPOINT:
            start_checkpoint(run)
        elif command is Command.REPORT_RANKS:
            report_ranks(run)
        elif command is Command.ADOPT_DECISION:
            adopt_decision(run, stop)
        elif command is Command.WAIT:
            _publish(run)
            stop.wait(POLL_SECONDS)
        else:
            if isinstance(command, Play):
                play_update(run, command.rounds, may_wait=True)
            else:
                play_idle_update(run)
            if run.journal and time.monotonic() - run.journal.published.at > PUBLISH_SECONDS:
                _publish(run)
    run.checkpoint_task.finish()
    _publish(run)
    return run.round


def _next_command(run: Run, stop: Event, until: int | None) -> Command | Play:
    """Return the next command, which the coordinator chooses and broadcasts; a collective.

    Raises ``Diverged`` on every rank if the coordinator stops the run.
    """
    run.checkpoint_task.is_idle()  # Raises an exception of the background task.
    command: Command | Play = Command.WAIT
    problem = None
    if run.journal and run.history is not None:
        try:
            plan_rollback(run, run.journal)
            command = _choose_command(run, run.journal, len(run.history), stop, until)
        except Diverged as error:
            problem = str(error)
    waited = run.rank_stats.waiting_seconds
    encoded, problem = run.rank_group.broadcast([_encode_command(command), problem])
    command = _decode_command(encoded)
    if command is Command.WAIT:  # Ranks do not poll at the same moment; only a longer wait is due to a slow rank.
        run.rank_stats.waiting_seconds = max(waited, run.rank_stats.waiting_seconds - POLL_SECONDS)
    if problem:
        raise Diverged(problem)
    return command


def _beat(run: Run, command: Command | Play) -> None:
    """Write a heartbeat that says what the run does next."""
    replayed = len(run.journal.recorded_lines) if run.journal else 0
    if replayed:
        run.heartbeat.beat(REPLAYING, run.round, run.round + replayed - 1)
    elif run.plan_selector.is_compiling():
        run.heartbeat.beat(COMPILING, run.round)
    else:
        run.heartbeat.beat(WAITING if command is Command.WAIT else PLAYING, run.round)


def _encode_command(command: Command | Play) -> str | int:
    """Return a command as a JSON value: the value of a ``Command``, or the number of rounds of a ``Play``."""
    return command.rounds if isinstance(command, Play) else command.value


def _decode_command(encoded: str | int) -> Command | Play:
    """Return the command that ``_encode_command`` encoded."""
    return Play(encoded) if isinstance(encoded, int) else Command(encoded)


def _choose_command(run: Run, journal: RunJournal, committed: int, stop: Event, until: int | None) -> Command | Play:
    """Choose the next command. At most one checkpoint is in flight, unless a rollback needs another."""
    # A checkpoint contains the state directly after a round; it does not record how many idle updates followed.
    new = 0 if run.idle_updates else run.round - run.last_checkpoint
    if new and run.round in journal.rollback_log.needed_checkpoints(run.round + 1):
        return Command.CHECKPOINT
    if new >= run.settings.checkpoint.every_rounds and run.checkpoint_task.is_idle():
        return Command.CHECKPOINT
    if should_report(run, journal):
        return Command.REPORT_RANKS
    stops, ends = stop.is_set(), until is not None and run.round >= until
    if new and (ends or stops):
        return Command.CHECKPOINT
    if stops:
        return Command.END
    if journal.tuning and journal.tuning.is_due(run.round, run.settings.tuning):
        return Command.CHECKPOINT if new else Command.ADOPT_DECISION
    if run.idle_updates < journal.update_log.idle_updates(run.round):
        return Command.IDLE_UPDATE
    if ends:
        return Command.END
    take_requests(run, journal)
    available = committed - run.round
    if available:
        return Play(available if until is None else min(available, until - run.round))
    return _choose_idle_command(run, journal, new)


def _choose_idle_command(run: Run, journal: RunJournal, new: int) -> Command:
    """Choose the command while no task is pending: updates on past rounds, within the budget, after a checkpoint."""
    decided = journal.update_log.is_planned(run.round) or journal.rollback_log.at(run.round) is not None
    if decided or not run.round or run.idle_updates >= run.settings.meta.idle_updates:
        return Command.WAIT
    if new:
        return Command.CHECKPOINT if run.checkpoint_task.is_idle() else Command.WAIT
    journal.update_log.add_idle_update(run.round)
    return Command.IDLE_UPDATE


def play_update(run: Run, available: int, may_wait: bool = False) -> None:
    """Play one update: score its rounds with every learner, let each learner learn them, and record them; a collective.

    If the model raises an exception on a task, the task's round is quarantined and the run goes back to its newest
    checkpoint. A round that is quarantined before it was learned is only recorded.
    Nothing is played, either, if the run is to end while a program that the update needs is compiled.

    Args:
        run: to change.
        available: largest number of rounds in the update.
        may_wait: whether the lines of the rounds may wait to be committed with those of the next update.
    """
    # Decisions that depend on timing are logged before they take effect, and broadcast.
    update = Update(*run.rank_group.broadcast(_plan_update(run, available, run.journal) if run.journal else None))
    if update.back_to is not None:
        rollback(run, update.back_to)
    _exclude(run, update.excluded)
    if update.quarantined:
        skip_round(run)
        if run.journal and not may_wait:
            commit_rounds(run.journal)
        return
    new_rounds = range(run.round, run.round + update.rounds)
    run.buffer.read_ahead(range(run.round, run.round + available))
    run.buffer.distribute([new_rounds] * run.rank_group.world)
    tasks: list[Task] = [run.buffer[round] for round in new_rounds]
    start_time, spent = time.monotonic(), dict.fromkeys(run.learners, 0.0)
    scores = score_tasks(run, tasks, spent)
    if quarantine_failures(run):
        return
    run.plan_selector.follow(
        execution_plans_from_json(
            run.rank_group.broadcast(_choose_execution_plans(run, tasks, run.journal) if run.journal else None)
        )
    )
    if not run.plan_selector.prepare(tasks, run.rank_group):
        return
    learned = learn_tasks(run, tasks, spent)
    if quarantine_failures(run):
        return
    run.rank_stats.steps += len(learned[run.leader_name].steps)
    seconds = time.monotonic() - start_time
    run.rank_timeout.observe(seconds)
    if run.rank_timeout.is_ready():
        run.rank_group.set_timeout(run.rank_timeout.seconds())
    if run.journal and run.history is not None:
        _record_update(run, run.journal, run.history, (tasks, scores, learned[run.leader_name]), seconds, spent)
        if not may_wait or available == update.rounds or should_commit(run.journal):
            commit_rounds(run.journal)
    run.round += update.rounds
    run.idle_updates, run.idle_steps = 0, []


def _record_update(
    run: Run,
    journal: RunJournal,
    history: History,
    played: tuple[list[Task], dict[str, list[Score]], Learned],
    seconds: float,
    spent: dict[str, float],
) -> None:
    """Record the rounds of an update: its tasks, the scores, and what the leading learner learned."""
    regret, (tasks, scores, learned) = run.settings.regret, played
    sizes = SupportSizes([count_samples(task.support) for task in tasks], regret.proficiency)
    lines = make_round_records(
        [history.entry(run.round + index) for index in range(len(tasks))],
        scores,
        learned,
        seconds,
        sizes if regret.prefixes else None,
        run.idle_steps,
        [read_content(task) for task in tasks],
        regret.loss_cap,
        spent,
        run.pool.figures if run.pool else (),
    )
    for task in tasks:
        run.seen.add(task)
    for line in lines:
        record_round(journal, {**line, **read_stored_answer(history, line["id"])})


def play_idle_update(run: Run) -> None:
    """Let each learner make one update on past rounds, which is logged already; a collective."""
    plans, excluded = None, None
    if run.journal:
        # Use the plans of the last round: a restart may begin here.
        plans = execution_plans_to_json(run.journal.execution_plan_log.at(run.round - 1))
        excluded = run.journal.quarantine_log.excluded(run.round, run.excluded)
    plans, excluded = run.rank_group.broadcast([plans, excluded])
    _exclude(run, excluded)
    run.plan_selector.follow(execution_plans_from_json(plans))
    with run.rank_stats.measure_work():
        reports = {name: learner.learn_more(run.idle_updates) for name, learner in run.learners.items()}
    if quarantine_failures(run):
        return
    run.rank_stats.steps += len(reports[run.leader_name])
    run.idle_steps += reports[run.leader_name]
    run.idle_updates += 1


class Update(NamedTuple):
    """The decisions on the next update.

    Attributes:
        rounds: number of rounds.
        back_to: round to which the leader rolls back before; None for no rollback.
        excluded: quarantined rounds that are not revisited from now on, in addition to earlier ones.
        quarantined: whether the update is one quarantined round, which is only recorded.
    """

    rounds: int
    back_to: int | None
    excluded: list[int]
    quarantined: bool


def _plan_update(run: Run, available: int, journal: RunJournal) -> Update:
    """Return the decisions on the next update, which are logged."""
    quarantine_log = journal.quarantine_log
    excluded = quarantine_log.excluded(run.round, run.excluded)
    if quarantine_log.find(run.round) is not None:
        return Update(1, _plan_rollback_target(run, journal), excluded, True)
    limit = quarantine_log.next_after(run.round)
    if limit is not None:
        available = min(available, limit - run.round)
    plan = journal.update_log.choose_rounds(run.round, available, run.settings.meta.max_rounds_per_update)
    rounds = plan.rounds if limit is None else min(plan.rounds, limit - run.round)
    if journal.interrupted_round == run.round:
        rounds = retry_interrupted(journal, run.round, rounds)
    back_to = _plan_rollback_target(run, journal)
    if not rounds:
        return Update(1, back_to, quarantine_log.excluded(run.round, run.excluded), True)
    return Update(rounds, back_to, excluded, False)


def _plan_rollback_target(run: Run, journal: RunJournal) -> int | None:
    """Return the round to which the leader rolls back before the next round; None for no rollback."""
    back_to = journal.rollback_log.at(run.round)
    if back_to is not None:
        run.checkpoint_task.finish()  # The rollback may need the checkpoint in progress.
    return back_to


def _exclude(run: Run, rounds: list[int]) -> None:
    if rounds:
        run.buffer.exclude(rounds)
        run.excluded += len(rounds)


def _choose_execution_plans(run: Run, tasks: list[Task], journal: RunJournal) -> dict[str, Any]:
    """Return the execution plans of the next update as a JSON value."""
    # Rounds that were played before use the same plans again.
    if not (journal.recorded_lines or journal.execution_plan_log.is_bound(run.round)):
        known = journal.execution_plan_log.at(run.round)
        try:
            found = run.plan_selector.find(known, tasks, run.round)
        except Exception as error:
            if not is_task_failure(error):
                raise
            found = known  # If the model fails on a task, learning the task will show it.
        journal.execution_plan_log.record(run.round, found)
    return execution_plans_to_json(journal.execution_plan_log.at(run.round))


def _publish(run: Run) -> None:
    if run.journal:
        answering = run.answering
        publish_leader(
            run.journal, answering.name, run.leader_name, answering.learner.state, run.round, run.idle_updates, run.seen
        )
