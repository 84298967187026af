"""The maintenance process: it moves rounds into the archive and discards what retention does not keep.

``python -m deploy.processes.maintenance RUN/settings.json LOGS SETTINGS``

A process of its own, for sealing takes as much of a processor as taking tasks in does. It may be killed at any moment:
what it leaves behind, the next one clears away.
"""

import logging
import os
import sys
import threading
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from deploy.config.config import Config
from deploy.exits import DONE, TRY_LATER
from deploy.logs import Origin, copy_lines, log_to_stderr
from deploy.processes.child import die_with_parent, stop_on_signals
from deploy.processes.supervisor import SupervisedProcess
from streams.history.errors import HistoryError
from streams.history.history import History
from streams.history.maintenance import Maintenance, is_due
from streams.history.retention import RetentionSettings
from streams.history.sealing import SealingSettings
from trainers.checkpoint import list_checkpoints
from trainers.journal.run_files import RunFiles

NICE = 10


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaintenanceSettings:
    """What the process is told of ``[history]``; where the archive lies it knows from the ledger."""

    sealing: SealingSettings
    retention: RetentionSettings


def dump_settings(settings: MaintenanceSettings) -> str:
    """Return the settings as the process is given them."""
    return TypeAdapter(MaintenanceSettings).dump_json(settings).decode()


def main(settings_file: str, logs: str, settings_json: str) -> int:
    """Seal rounds and thin them out until SIGTERM, and finish the segment begun; return the exit code."""
    log_to_stderr(Origin("upkeep"), logs)
    stop = stop_on_signals()
    die_with_parent()
    os.nice(NICE)  # Arrivals and rounds go first.
    settings = TypeAdapter(MaintenanceSettings).validate_json(settings_json)
    files = RunFiles(Path(settings_file).parent)

    def oldest() -> int:
        return next(iter(list_checkpoints(files.checkpoints)), 0)

    try:
        with (
            History.open_for_maintenance(files.history) as history,
            closing(Maintenance(history, settings.sealing, settings.retention, oldest)),
        ):
            stop.wait()
        return DONE
    except (OSError, HistoryError) as error:
        log.error("%s", error)
        return TRY_LATER


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))


CHECK_SECONDS = 1.0


STOP_SECONDS = 30.0
"""How long a drain waits for the segment that is being written; then the process is killed, which loses nothing."""


class MaintenanceSupervisor:
    """Looks whether rounds are to be sealed or thinned out, and from then on has a process do so until ``close``.

    A run of few rounds needs none, which saves it the memory.

    Args:
        history: to look at.
        config: of the daemon.
        files: of the run.
    """

    def __init__(self, history: History, config: Config, files: RunFiles) -> None:
        """Start to look."""
        self._history, self._settings = history, config.history
        settings_json = dump_settings(MaintenanceSettings(config.history.sealing, config.history.retention))
        self._command = [
            sys.executable,
            "-m",
            "deploy.processes.maintenance",
            str(files.settings),
            config.run.logs,
            settings_json,
        ]
        self._copy = copy_lines if config.run.logs == "json" else None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sealer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Have the segment that is being written finished, and end the process."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_due():
            if self._closing.wait(CHECK_SECONDS):
                return
        # The kernel kills the child when the thread that started it ends: this one stays.
        child = SupervisedProcess("upkeep", self._command, copy=self._copy)
        self._closing.wait()
        code = child.stop(STOP_SECONDS)
        if code != DONE:
            log.error("the upkeep ended with %d; the next start clears away what it has left behind", code)

    def _is_due(self) -> bool:
        try:
            return is_due(self._history, self._settings.sealing, self._settings.retention)
        except Exception as error:
            log.error("it cannot be told whether rounds are to be sealed: %s", error)
            return False
