"""The upkeep process: ``python -m deploy.upkeep RUN/settings.json LOGS SETTINGS``; it seals rounds and thins them out.

A process of its own, for sealing takes as much of a processor as taking tasks in does. It may be killed at any moment:
what it leaves behind, the next one clears away.
"""

import logging
import os
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from deploy.child import die_with_parent, stop_on_signals
from deploy.exits import DONE, TRY_LATER
from deploy.logs import Origin, log_to_stderr
from streams.history import History
from streams.ledger import HistoryError
from streams.retention import RetentionSettings
from streams.sealing import SealingSettings
from streams.upkeep import Maintenance
from trainers.checkpoint import list_checkpoints
from trainers.run_files import RunFiles

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
