"""The maintenance process: move rounds into the archive, and remove rounds according to the retention settings.

``python -m deploy.processes.maintenance RUN/settings.json LOGS SETTINGS``

It is a separate process because sealing takes as much processor time as ingest. It may be killed at any time: the next
one removes incomplete files.
"""

import logging
import os
import sys
import threading
from contextlib import closing
from dataclasses import dataclass
from functools import partial
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
from trainers.journal.fork_log import oldest_checkpoint
from trainers.journal.heartbeat import WAITING, HeartbeatWriter
from trainers.journal.run_files import RunFiles

NICE = 10


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaintenanceSettings:
    """The ``[history]`` settings passed to the process; the archive's location comes from the ledger."""

    sealing: SealingSettings
    retention: RetentionSettings


def dump_settings(settings: MaintenanceSettings) -> str:
    """Return the settings as JSON, for the command line of the process."""
    return TypeAdapter(MaintenanceSettings).dump_json(settings).decode()


def main(settings_file: str, logs: str, settings_json: str) -> int:
    """Seal and remove rounds until SIGTERM, finish the current segment, and return the exit code.

    Args:
        settings_file: path of RUN/settings.json.
        logs: "text" or "json".
        settings_json: result of ``dump_settings``.
    """
    log_to_stderr(Origin("upkeep"), logs)
    stop = stop_on_signals()
    die_with_parent()
    os.nice(NICE)  # Ingest and training have priority.
    settings = TypeAdapter(MaintenanceSettings).validate_json(settings_json)
    files = RunFiles(Path(settings_file).parent)

    heartbeat = HeartbeatWriter(files.heartbeat("maintenance"))

    oldest = partial(oldest_checkpoint, files.folder)

    def report(errors: str) -> None:
        heartbeat.beat(WAITING, problem=errors)

    try:
        with (
            History.open_for_maintenance(files.history) as history,
            closing(Maintenance(history, settings.sealing, settings.retention, oldest, report)),
        ):
            stop.wait()
        return DONE
    except (OSError, HistoryError) as error:
        log.error("%s", error)
        heartbeat.end(error)
        return TRY_LATER


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))


CHECK_SECONDS = 1.0


STOP_SECONDS = 30.0
"""How long a drain waits for the segment in progress; after that the process is killed, which loses no data."""


class MaintenanceSupervisor:
    """A supervisor that starts the maintenance process once there are rounds to seal or remove.

    The process then runs until ``close``. A run with few rounds never starts it, which saves memory.

    Args:
        history: checked every ``CHECK_SECONDS``.
        config: of the daemon.
        files: of the run.

    ``child`` is the process, None before it is needed.
    """

    def __init__(self, history: History, config: Config, files: RunFiles) -> None:
        """Start the thread that checks the history."""
        self._history, self._settings = history, config.history
        self._stop_seconds = min(STOP_SECONDS, config.serve.drain_seconds / 2)
        settings_json = dump_settings(MaintenanceSettings(config.history.sealing, config.history.retention))
        self._command = [
            sys.executable,
            "-m",
            "deploy.processes.maintenance",
            str(RunFiles(files.folder).settings),
            config.run.logs,
            settings_json,
        ]
        self._copy = copy_lines if config.run.logs == "json" else None
        self._closing = threading.Event()
        self.child: SupervisedProcess | None = None
        self._thread = threading.Thread(target=self._run, name="sealer", daemon=True)
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Let the process finish the segment in progress and end; return at once."""
        self._closing.set()

    def close(self) -> None:
        """Let the process finish the segment in progress and end; kill it if that takes too long."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_due():
            if self._closing.wait(CHECK_SECONDS):
                return
        # The kernel kills the child when the thread that started it ends, so this thread must stay alive.
        self.child = child = SupervisedProcess("upkeep", self._command, copy=self._copy)
        self._closing.wait()
        code = child.stop(self._stop_seconds)
        if code != DONE:
            log.error("the maintenance process ended with exit code %d; the next start removes incomplete files", code)

    def _is_due(self) -> bool:
        try:
            return is_due(self._history, self._settings.sealing, self._settings.retention)
        except Exception as error:
            log.error("cannot check whether rounds must be sealed: %s", error)
            return False
