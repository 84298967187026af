"""Starts the upkeep process as soon as there is something for it to do, keeps it running, stops it."""

import logging
import sys
import threading

from deploy.config import Config
from deploy.exits import DONE
from deploy.logs import copy_lines
from deploy.supervise import SupervisedProcess
from deploy.upkeep import MaintenanceSettings, dump_settings
from streams.history import History
from streams.upkeep import is_due
from trainers.run_files import RunFiles

CHECK_SECONDS = 1.0
STOP_SECONDS = 30.0
"""How long a drain waits for the segment that is being written; then the process is killed, which loses nothing."""

log = logging.getLogger(__name__)


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
        self._command = [sys.executable, "-m", "deploy.upkeep", str(files.settings), config.run.logs, settings_json]
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
