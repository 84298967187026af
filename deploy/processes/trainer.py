"""The trainer process: ``python -m deploy.processes.trainer RUN/settings.json LOGS BRANCH ROLE``."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Event

from pydantic import TypeAdapter

from deploy.config.config import read_settings
from deploy.exits import BROKEN, CONFIG, DONE, TRY_LATER, CommandError
from deploy.forks import stages_of
from deploy.logs import Origin, log_to_stderr
from deploy.processes.child import die_with_parent, hold_lock, keep_freed_memory, stop_on_signals
from online_meta.batching.compile import CompileStopped
from streams.history.errors import ArchiveUnreachable, HistoryDamaged, HistoryFull, RoundDiscarded
from streams.history.history import History
from trainers.build import LOCAL
from trainers.checkpoint import CheckpointError
from trainers.distributed.process_group import join_process_group, read_own_rank
from trainers.distributed.ranks import RankGroup
from trainers.journal.divergence import Diverged
from trainers.journal.fork_log import read_branches
from trainers.journal.heartbeat import HeartbeatWriter
from trainers.journal.quarantine import TooManyQuarantined
from trainers.journal.run_files import MAIN, RunFiles
from trainers.loop.recovery import RepeatFailed
from trainers.loop.rounds import open_run, play_rounds
from trainers.loop.run import Run, close_run
from trainers.loop.stages import list_stages_left
from trainers.settings import TrainerSettings
from trainers.settings_fingerprint import SettingsChanged

BACKGROUND = "background"
NICE = 10
Part = tuple[TrainerSettings, int | None]
"""Settings, and the round at which they end; None for no end."""
log = logging.getLogger(__name__)


def main(settings_file: str, logs: str = "text", branch: str = "", role: str = "") -> int:
    """Play the rounds of a branch of the run until SIGTERM; return the exit code.

    Args:
        settings_file: path of RUN/settings.json.
        logs: "text" or "json".
        branch: name of the branch; "" for the only one of a run.
        role: ``BACKGROUND`` for a branch that is not served: its process has low priority, and no further ranks.
    """
    background = role == BACKGROUND
    origin = Origin(f"fork {branch}" if background else "trainer", read_own_rank(), plays=True)
    log_to_stderr(origin, logs)
    stop = stop_on_signals()
    die_with_parent()
    keep_freed_memory()
    os.nice(NICE if background else 0)
    files = RunFiles(Path(settings_file).parent, branch or None)
    try:
        settings = read_settings(files.settings)
        _play_branch(settings, files, background or settings.engine.kind == LOCAL, stop, origin)
        return DONE
    except CommandError as error:
        log.error("%s", error)
        return error.code
    except CompileStopped as error:  # in the middle of an update, so that there is no checkpoint of the last rounds
        log.warning("%s; the next start continues from the last checkpoint", error)
        return TRY_LATER
    except (SettingsChanged, CheckpointError, RepeatFailed) as error:
        log.error("%s", error)
        return CONFIG
    except (Diverged, TooManyQuarantined) as error:
        log.error("%s", error)
        # All ranks agree on this; with another exit code the agent would restart them.
        return DONE if settings.engine.is_distributed else BROKEN
    except HistoryDamaged as error:
        log.error("%s: run `online-meta verify %s`", error, files.history)
        return BROKEN
    except RoundDiscarded as error:
        log.error("%s, and this branch has not played it yet: it cannot continue", error)
        return BROKEN
    except (
        OSError,
        HistoryFull,
        ArchiveUnreachable,
    ) as error:  # The next start continues from the last checkpoint.
        log.error("%s", error)
        return TRY_LATER


EXPECTED = (
    *(CommandError, CompileStopped, SettingsChanged, CheckpointError, RepeatFailed, Diverged, TooManyQuarantined),
    *(HistoryDamaged, RoundDiscarded),
)
"""The errors for which a trainer ends that has nothing to add in its heartbeat."""


def _play_branch(settings: TrainerSettings, files: RunFiles, alone: bool, stop: Event, origin: Origin) -> None:
    """Play a branch, ``alone`` or as one of several ranks; the last heartbeat says for which error it ends."""
    heartbeat = HeartbeatWriter(None)
    try:
        with ExitStack() as cleanup:
            rank_group = None if alone else cleanup.enter_context(join_process_group(settings.engine))
            if rank_group is None or rank_group.is_coordinator:
                cleanup.enter_context(hold_lock(files.own / "trainer.lock"))
                heartbeat = HeartbeatWriter(files.heartbeat("trainer"))
            history = cleanup.enter_context(contextlib.closing(History.open(files.history, write=False)))
            parts = _list_parts(settings, files, rank_group)
            play_run(parts, files, history, rank_group, stop, origin, heartbeat)
    except EXPECTED:
        raise
    except Exception as error:
        heartbeat.end(error)
        raise


def _list_parts(settings: TrainerSettings, files: RunFiles, rank_group: RankGroup | None) -> Iterable[Part]:
    """Return the parts in which a branch continues: a fork begins with the settings of its parent.

    Ranks have one part: a fork that is served has reached its last stage.
    """
    if rank_group is not None:
        return [(broadcast_settings(rank_group, settings), None)]
    if files.branch in (None, MAIN):
        return [(settings, None)]
    return list_stages_left(stages_of(files.folder, read_branches(files.folder), str(files.branch)), files)


def broadcast_settings(rank_group: RankGroup, settings: TrainerSettings | None) -> TrainerSettings:
    """Return on every rank the settings that the coordinator has read; all ranks must call this function.

    Args:
        rank_group: of the run.
        settings: on the coordinator, the settings to send; None on other machines.
    """
    kind = TypeAdapter(TrainerSettings)
    return kind.validate_python(rank_group.broadcast(settings and kind.dump_python(settings, mode="json")))


def play_run(
    parts: Iterable[Part],
    files: RunFiles,
    history: History | None,
    rank_group: RankGroup | None,
    stop: Event,
    origin: Origin,
    heartbeat: HeartbeatWriter,
) -> None:
    """Play the rounds of a run, from its newest checkpoint on, until ``stop`` is set.

    Args:
        parts: the settings with which it continues, each with the round at which they end; the last ones do not end.
        files: of the run.
        history: of the run; None on a rank without storage.
        rank_group: None for the local engine.
        stop: set to drain.
        origin: filter of this process's log lines; it will add the current round.
        heartbeat: of this process.
    """
    for settings, end in parts:
        run = open_run(settings, files, history, rank_group=rank_group, heartbeat=heartbeat, count_deaths=True)
        threading.Thread(target=_note_stop, args=(run, stop), name="note-stop", daemon=True).start()
        origin.round = partial(getattr, run, "round")
        log.info("the trainer continues at round %d", run.round)
        rounds = play_rounds(run, stop, end)
        close_run(run)
        run.rank_group.broadcast(None)  # Ranks end together: one that ends early would count as dead.
        if stop.is_set():
            log.info("the trainer drained after %d rounds", rounds)
            return


def _note_stop(run: Run, stop: Event) -> None:
    """Log a request to stop as soon as it comes: a process that is killed while it drains has not died of its task."""
    stop.wait()
    if run.journal:
        run.journal.quarantine_log.note_stop()


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    logging.shutdown()
    os._exit(status)  # With a normal exit, threads of the process group may abort the process.
