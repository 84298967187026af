"""The comparator process: ``python -m deploy.processes.comparators RUN/settings.json``."""

import logging
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

import trainers.comparators
from deploy.config.config import read_settings
from deploy.exits import DONE, TRY_LATER, CommandError
from deploy.leader import find_leader
from deploy.logs import Origin, log_to_stderr
from deploy.processes.child import die_with_parent, hold_lock, keep_freed_memory, stop_on_signals, wait_for_lock
from online_meta import registry
from online_meta.batching.failures import is_task_failure
from online_meta.learners import LearnerContext
from online_meta.tree import copy_aligned
from online_meta.types import Params
from streams.atomic_files import replace_file
from streams.history.errors import ArchiveUnreachable, HistoryFull, RoundDiscarded
from streams.history.history import History
from trainers.build import build_context
from trainers.comparators import (
    ComparatorUnavailable,
    Refresh,
    RefreshRequest,
    RefreshResult,
    is_exact,
    load_comparator,
)
from trainers.journal.heartbeat import PLAYING, WAITING, HeartbeatWriter
from trainers.journal.jsonl import LineReader, LineWriter
from trainers.journal.plans import read_execution_plans
from trainers.journal.run_files import RunFiles
from trainers.journal.tuning_log import settings_of_checkpoint
from trainers.learner_settings import lead_settings, list_learners
from trainers.loop.task_prefetch import HistoryBuffer
from trainers.settings import TrainerSettings

POLL_SECONDS = 0.25
IDLE_SECONDS = 1.5
LAST_SECONDS = 8.0
"""How long the newest round may take at the end of a run."""
log = logging.getLogger(__name__)


def main(settings_file: str, logs: str = "text", branch: str = "") -> int:
    """Refresh the comparators until SIGTERM; return the exit code. ``FINISH`` lets them judge the newest round first.

    Args:
        settings_file: path of RUN/settings.json.
        logs: "text" or "json".
        branch: name of the branch that is compared; "" for the only one of a run.
    """
    log_to_stderr(Origin("comparators"), logs)
    finish = Event()
    stop = stop_on_signals(finish)
    die_with_parent()
    keep_freed_memory()
    os.nice(10)  # Training has priority.
    files = RunFiles(Path(settings_file).parent, branch or None)
    heartbeat = HeartbeatWriter(None)
    try:
        with hold_lock(files.own / "comparators.lock"):
            heartbeat = HeartbeatWriter(files.heartbeat("comparators"))
            settings = read_settings(files.settings)
            with History.open(files.history, write=False) as history:
                refresh_with_rounds(settings, files, history, stop, heartbeat, finish)
            return DONE
    except CommandError as error:
        log.error("%s", error)
        return error.code
    except (OSError, HistoryFull, ArchiveUnreachable) as error:
        # For example a full disk; the next start continues from the saved state.
        log.error("%s", error)
        heartbeat.end(error)
        return TRY_LATER
    except Exception as error:
        heartbeat.end(error)
        raise


def refresh_with_rounds(
    settings: TrainerSettings,
    files: RunFiles,
    history: History,
    stop: Event,
    heartbeat: HeartbeatWriter | None = None,
    finish: Event | None = None,
) -> None:
    """Refresh each comparator after every ``regret.every_rounds`` learned rounds, and when the stream is idle.

    Args:
        settings: of the run.
        files: of the run.
        history: of the run.
        stop: set to end.
        heartbeat: of this process; None writes none.
        finish: set before ``stop`` if the newest round is to be judged once the trainer has ended.
    """
    torch.set_num_threads(settings.engine.threads)
    buffer = HistoryBuffer(history, torch.device(settings.engine.device))
    with closing(buffer), closing(LineWriter(files.comparators)) as writer:
        process = ComparatorProcess(settings, buffer, files, writer, stop, heartbeat or HeartbeatWriter(None))
        rounds = RoundReader(LineReader(files.rounds))
        covered = _read_covered(process)
        _refresh_loop(process, history, rounds, covered)
        if finish is not None and finish.is_set():
            wait_for_lock(files.own / "trainer.lock", lambda: process.heartbeat.beat(WAITING))
            rounds.read(lambda: True)
            _judge_newest(process, rounds, covered)


class ComparatorProcess(NamedTuple):
    """The objects that the comparator process uses."""

    settings: TrainerSettings
    buffer: HistoryBuffer
    files: RunFiles
    writer: LineWriter
    stop: Event
    heartbeat: HeartbeatWriter

    def settings_at(self, rounds: int) -> TrainerSettings:
        """Return the settings that hold after ``rounds`` rounds."""
        return settings_of_checkpoint(self.settings, self.files, rounds)

    def should_continue(self) -> bool:
        """Return whether the refresh in progress should continue; comparators call this often."""
        self.heartbeat.beat(PLAYING)
        return not self.stop.is_set()

    def make_context(self, settings: TrainerSettings) -> LearnerContext:
        """Return what the learner that leads with these settings shares with its comparators."""
        return build_context(lead_settings(settings), self.buffer, self.files.programs)

    def make_request(self, context: LearnerContext, rounds: "RoundReader", target: int, covered: int) -> RefreshRequest:
        """Return the request for a refresh as of round ``target``; the last one was as of ``covered``."""
        leader = list_learners(self.settings_at(target))[0].name
        plans = read_execution_plans(self.files.execution_plan_log).get(leader, ())
        return RefreshRequest(target, covered, rounds.skipped, find_leader(self.files.leader, context.start), plans)

    def forget_other_leader(self, kind: str, covered: int, settings: TrainerSettings) -> None:
        """Remove a comparator's state if a race has changed the learner that leads since it was saved."""
        if covered and lead_settings(self.settings_at(covered)) != lead_settings(settings):
            self.files.comparator(kind).unlink(missing_ok=True)


@dataclass
class RoundReader:
    """The rounds that are ``learned``, and those of them that count for no learner."""

    lines: LineReader
    learned: int = 0
    skipped: set[int] = field(default_factory=set)

    def read(self, should_continue: Callable[[], bool]) -> bool:
        """Read the rounds that were learned since, as long as allowed; return whether there were any."""
        before = self.learned
        for line in self.lines.lines():
            self.learned += 1
            self.skipped |= {line["round"]} if line["skipped"] else set()
            if not should_continue():
                break
        return self.learned > before


def _read_covered(process: ComparatorProcess) -> dict[str, int]:
    """Return the rounds that the last refresh of each comparator has covered."""
    covered: dict[str, int] = dict.fromkeys(process.settings.regret.comparator, 0)
    for line in LineReader(process.files.comparators).lines():
        if line["kind"] in covered and not line.get("extended"):
            covered[line["kind"]] = max(covered[line["kind"]], line["as_of_round"])
    return covered


def _refresh_loop(process: ComparatorProcess, history: History, rounds: RoundReader, covered: dict[str, int]) -> None:
    stop, known = process.stop, lead_settings(process.settings)
    context = process.make_context(process.settings)
    last_round_at = time.monotonic()
    while not stop.is_set():
        if rounds.read(lambda: not stop.is_set()):
            last_round_at = time.monotonic()
        process.heartbeat.beat(WAITING)
        idle = time.monotonic() - last_round_at > IDLE_SECONDS and rounds.learned >= len(history)
        every = process.settings.regret.every_rounds
        targets = {kind: next_target(done, rounds.learned, every, idle) for kind, done in covered.items()}
        if not any(targets.values()):
            stop.wait(POLL_SECONDS)
        for kind, target in targets.items():
            if target is not None and not stop.is_set():
                settings = process.settings_at(target)
                if lead_settings(settings) != known:
                    known, context = lead_settings(settings), process.make_context(settings)
                process.forget_other_leader(kind, covered[kind], settings)
                request = process.make_request(context, rounds, target, covered[kind])
                _refresh_one(process, context, kind, request, covered)


def _judge_newest(process: ComparatorProcess, rounds: RoundReader, covered: dict[str, int]) -> None:
    """Compare as of the newest round of a run that ends, within ``LAST_SECONDS``, if need be without training."""
    settings, deadline = process.settings_at(rounds.learned), time.monotonic() + LAST_SECONDS

    def should_continue() -> bool:
        process.heartbeat.beat(PLAYING)
        return time.monotonic() < deadline

    for kind, done in list(covered.items()):
        if rounds.learned > done and should_continue():
            context = process.make_context(settings)
            process.forget_other_leader(kind, done, settings)
            request = process.make_request(context, rounds, rounds.learned, done)
            extend = getattr(load_comparator(kind), "extend", None)
            if extend is None and not is_exact(kind):
                continue
            _refresh_one(process, context, kind, request, covered, extend, should_continue)


def next_target(covered: int, learned: int, every_rounds: int, idle: bool) -> int | None:
    """Return the number of rounds that the next refresh covers; None if no refresh is due.

    Args:
        covered: rounds that the last refresh covers.
        learned: rounds learned so far.
        every_rounds: a refresh is due at each multiple of it.
        idle: whether the stream is idle; a refresh then covers all learned rounds.
    """
    due = learned - learned % every_rounds
    if due > covered:
        return due
    return learned if idle and learned > covered else None


def _refresh_one(
    process: ComparatorProcess,
    context: LearnerContext,
    kind: str,
    request: RefreshRequest,
    covered: dict[str, int],
    extend: Refresh | None = None,
    should_continue: Callable[[], bool] | None = None,
) -> None:
    """Refresh or ``extend`` a comparator and write its result; remove it from ``covered`` if it is unavailable."""
    start_time = time.monotonic()
    refresh: Refresh = registry.load(trainers.comparators, kind)
    saved, regret = load_state(process.files.comparator(kind)), process.settings.regret
    options = {} if extend else regret.comparator_options.get(kind, {})
    try:
        found = (extend or refresh)(
            context, regret, request, saved, should_continue or process.should_continue, **options
        )
    except RoundDiscarded as error:  # Retention removed rounds meanwhile; try again with newer ones.
        log.warning("the refresh of %s as of round %d is abandoned: %s", kind, request.rounds, error)
        process.stop.wait(IDLE_SECONDS)
        return
    except ComparatorUnavailable as error:
        log.error("%s is no longer refreshed: %s", kind, error)
        del covered[kind]
        return
    except Exception as error:
        if not is_task_failure(error):
            raise
        log.exception("the refresh of %s as of round %d failed; the next one tries again", kind, request.rounds)
        covered[kind] = request.rounds
        return
    if found is not None:
        covered[kind] = request.rounds
        found = found._replace(comparator=found.comparator._replace(kind=kind))
        _save_result(process, found, time.monotonic() - start_time, extended=extend is not None)


def _save_result(process: ComparatorProcess, found: RefreshResult, seconds: float, *, extended: bool) -> None:
    """Save the comparator's state, then append its result to the log."""
    comparator, path = found.comparator, process.files.comparator(found.comparator.kind)
    if not math.isfinite(comparator.cumulative_loss):
        log.error("the loss of %s as of round %d is not finite; starting over", comparator.kind, comparator.as_of_round)
        path.unlink(missing_ok=True)
        return
    if not extended:  # The next refresh continues where the last one has ended.
        replace_file(path, save({key: value.contiguous() for key, value in found.saved.items()}), durable=True)
    process.writer.append(
        {**comparator._asdict(), "timestamp": time.time(), **({"extended": True} if extended else {})}
    )
    process.writer.sync()
    note = " without training" if extended else "" if comparator.settled else "; its loss was still falling"
    log.info("%s as of round %d took %.1f s%s", comparator.kind, comparator.as_of_round, seconds, note)


def load_state(path: Path) -> Params | None:
    """Return a comparator's saved state; None if there is none or it is damaged, because it can be recomputed."""
    try:
        return copy_aligned(load(path.read_bytes()))
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        log.error("%s is damaged and will be recomputed: %s", path, error)
        return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
