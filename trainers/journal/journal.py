"""The files that the coordinator writes: plans before a round is played, round records and the leader after it."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path

from online_meta.types import State
from streams.atomic_files import replace_file
from trainers.checkpoint import CheckpointError
from trainers.journal.divergence import RollbackLog, SkipStreak, read_skip_streak
from trainers.journal.jsonl import Line, LineReader, LineWriter, find_line, read_line
from trainers.journal.leader_file import Published, encode_leader, read_published_leader
from trainers.journal.plans import ExecutionPlanLog, UpdateLog
from trainers.journal.quarantine import QuarantineLog
from trainers.journal.round_records import find_difference
from trainers.journal.run_files import RunFiles
from trainers.journal.tuning_log import TuningLog, find_won
from trainers.learner_settings import find_player, list_learners
from trainers.seen_inputs import SeenInputs, encode_ranges
from trainers.settings import TrainerSettings

log = logging.getLogger(__name__)

MOST_PENDING, PENDING_SECONDS = 64, 0.1
"""The largest number of lines that wait for a common commit, and how long they wait, in seconds."""


@dataclass
class RunJournal:
    """The open files of a run.

    ``recorded_lines`` are an earlier process's round records after the checkpoint. ``interrupted_round`` is the first
    round of the update in which an earlier process died, until it is played again; None if there is none.
    ``pending_lines`` are the round records that ``commit_rounds`` is still to write.
    """

    settings: TrainerSettings
    files: RunFiles
    update_log: UpdateLog
    execution_plan_log: ExecutionPlanLog
    rollback_log: RollbackLog
    quarantine_log: QuarantineLog
    quarantine_requests: LineReader
    streak: SkipStreak
    lines: LineWriter
    recorded_lines: list[Line]
    checkpoints: LineWriter
    published: Published
    tuning: TuningLog | None = None
    interrupted_round: int | None = None
    last_reported: tuple[int, float] = field(default=(-1, 0.0))
    started: float = field(default_factory=time.time)
    pending_lines: list[Line] = field(default_factory=list)
    committed_at: float = field(default_factory=time.monotonic)


def open_journal(settings: TrainerSettings, files: RunFiles, rounds: int, own: str) -> RunJournal:
    """Open the files of a run.

    Args:
        settings: of the run, after the decisions of its race.
        files: of the run.
        rounds: number of rounds in the checkpoint from which the run continues.
        own: fingerprint of the settings with which the run began.

    Raises:
        CheckpointError: if lines of rounds before the checkpoint are missing.
    """
    position = _find_resume_position(files.rounds, rounds)
    update_log, lines = UpdateLog(files.update_log, rounds), LineWriter(files.rounds, position)
    rollback_log = RollbackLog(files.rollback_log, own)
    quarantine_log, requests = QuarantineLog(files.quarantine_log, own), LineReader(files.quarantine_requests)
    for _ in islice(requests.lines(), quarantine_log.requests):
        pass  # These requests are in the log already.
    journal = RunJournal(
        settings=settings,
        files=files,
        update_log=update_log,
        execution_plan_log=ExecutionPlanLog(files.execution_plan_log, own, update_log.end),
        rollback_log=rollback_log,
        quarantine_log=quarantine_log,
        quarantine_requests=requests,
        streak=read_skip_streak(files.rounds, rounds, rollback_log.before(rounds)),
        lines=lines,
        recorded_lines=LineReader(files.rounds, position).refresh(),
        checkpoints=LineWriter(files.checkpoint_log),
        published=read_published_leader(files.leader, find_player(settings, settings.answers)),
        tuning=_open_tuning_log(settings, files, rounds, own, update_log.end) if settings.race else None,
    )
    if journal.tuning:
        _move_plans(journal, journal.tuning, rounds)
    return journal


def _open_tuning_log(settings: TrainerSettings, files: RunFiles, rounds: int, own: str, planned: int) -> TuningLog:
    """Open the log of the race, and follow the race up to the checkpoint's round."""
    found = TuningLog(files.tuning_log, own, settings.race, planned, rounds)
    for line in takewhile(lambda line: line["round"] < rounds, LineReader(files.rounds).lines()):
        if found.is_over():
            break
        found.observe(line, settings.tuning.warmup)
    return found


def _move_plans(journal: RunJournal, tuning: TuningLog, rounds: int) -> None:
    """Log the execution plans of the learner that wins at this round as the leading one's: they have its settings."""
    won, leader = find_won(tuning.obeyed), list_learners(journal.settings)[0].name
    bound = journal.recorded_lines or journal.execution_plan_log.is_bound(rounds)
    if won in (None, leader) or tuning.obeyed[-1].round != rounds or bound:
        return
    plans = journal.execution_plan_log.at(rounds)
    others = {name: plan for name, plan in plans.items() if name not in (won, leader)}
    moved = {leader: plans[str(won)]} if won in plans else {}
    journal.execution_plan_log.record(rounds, {**moved, **others})


def _find_resume_position(path: Path, rounds: int) -> int:
    """Return the position, in bytes, of the first line after the checkpoint's rounds; only a few lines are read.

    Raises ``CheckpointError`` if the line of the checkpoint's last round is missing.
    """
    last = read_line(path, find_line(path, lambda line: bool(line["round"] >= rounds - 1))) if rounds else None
    if last and last[0]["round"] == rounds - 1:
        return last[1]
    if rounds:  # The lines were durable before the checkpoint was published.
        line_count = sum(1 for _ in LineReader(path).lines())
        problem = f"{path} is damaged: {line_count} lines are intact, but the checkpoint is of round {rounds}"
        raise CheckpointError(f"{problem}. Restore the file, or run `online-meta replay` on the history")
    return 0


def note_process_start(journal: RunJournal, rounds: int) -> None:
    """Log the start of a process that plays the run, and find the update in which the last process died.

    Args:
        journal: of the run; its ``interrupted_round`` is set.
        rounds: number of rounds in the checkpoint from which the run continues.
    """
    first, last = rounds + len(journal.recorded_lines), journal.update_log.last
    was_played = last is not None and last.round >= first
    journal.interrupted_round = last.round if last and was_played and not journal.quarantine_log.stopped else None
    journal.quarantine_log.note_start()


def record_round(journal: RunJournal, line: Line) -> None:
    """Keep the line of a round for ``commit_rounds``; if an earlier process wrote it, log a difference of the two.

    Args:
        journal: of the run.
        line: from ``make_round_records``.
    """
    journal.streak.observe(line)
    if journal.tuning:
        journal.tuning.observe(line, journal.settings.tuning.warmup)
    if not journal.recorded_lines:
        journal.pending_lines.append(line)
        return
    before = journal.recorded_lines.pop(0)
    difference = find_difference(before, line)
    if difference:
        log.error("round %d does not repeat: %s (another machine, torch or model code?)", line["round"], difference)


def commit_rounds(journal: RunJournal) -> None:
    """Make the plans durable, and then write the lines of the rounds that were played by them.

    Nothing that depends on a plan may leave the process before: no line, leader or checkpoint.
    """
    journal.update_log.sync()
    journal.execution_plan_log.sync()
    for line in journal.pending_lines:
        journal.lines.append(line)
    journal.pending_lines, journal.committed_at = [], time.monotonic()


def should_commit(journal: RunJournal) -> bool:
    """Return whether the lines that wait are many or old."""
    return len(journal.pending_lines) >= MOST_PENDING or time.monotonic() - journal.committed_at > PENDING_SECONDS


def publish_leader(
    journal: RunJournal,
    learner: str,
    leads: str,
    state: Callable[[], State],
    rounds: int,
    idle_updates: int = 0,
    seen: SeenInputs | None = None,
) -> None:
    """Write what the run answers from to the file that other processes read, if it is newer than the published one.

    Args:
        journal: of the run.
        learner: the name of the learner that answers.
        leads: the name of the learner that leads.
        state: returns its state.
        rounds: number of rounds that it has learned.
        idle_updates: number of its updates on past rounds since.
        seen: the ranges of the inputs of its rounds.
    """
    if (rounds, idle_updates) > journal.published[:2]:
        commit_rounds(journal)
        decisions = journal.tuning.obeyed if journal.tuning else ()
        data = encode_leader(
            state(), rounds, idle_updates, learner, leads, decisions, encode_ranges(seen) if seen else ""
        )
        replace_file(journal.files.leader, data, durable=True)
        journal.published = Published(rounds, idle_updates, time.monotonic())


def close_journal(journal: RunJournal) -> None:
    """Commit what was played, and close the run's files."""
    commit_rounds(journal)
    journal.update_log.close()
    journal.execution_plan_log.close()
    journal.rollback_log.close()
    journal.quarantine_log.close()
    journal.lines.close()
    journal.checkpoints.close()
    if journal.tuning:
        journal.tuning.close()
