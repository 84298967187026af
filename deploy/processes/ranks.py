"""Run the trainer as several ranks on this machine: ``python -m deploy.processes.ranks RUN/settings.json``."""

import contextlib
import json
import logging
import os
import signal
import sys
from pathlib import Path

from deploy.config.config import read_settings
from deploy.exits import BROKEN, DONE, TRY_LATER
from deploy.logs import Origin, log_to_stderr
from deploy.processes.child import die_with_parent
from streams.atomic_files import replace_file
from trainers.distributed.elastic import launch_ranks
from trainers.journal.run_files import RunFiles

log = logging.getLogger(__name__)


def main(settings_file: str, logs: str = "text", branch: str = "") -> int:
    """Keep ``engine.processes`` trainer ranks running until they drain; return the exit code.

    Args:
        settings_file: path of RUN/settings.json.
        logs: "text" or "json".
        branch: name of the branch that they play; "" for the only one of a run.
    """
    log_to_stderr(Origin("agent"), logs)
    die_with_parent()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # The daemon drains when a terminal closes, and then stops the ranks.
    files = RunFiles(Path(settings_file).parent, branch or None)
    engine = read_settings(files.settings).engine
    command = [sys.executable, "-m", "deploy.processes.trainer", settings_file, logs, branch]

    def restarted(restarts: int) -> None:
        with contextlib.suppress(OSError):  # A full disk must not prevent the ranks from starting.
            replace_file(files.agent, json.dumps({"pid": os.getpid(), "restarts": restarts}).encode(), durable=False)

    try:
        drained = launch_ranks(engine, command, restarted, files.rendezvous)
    except OSError as error:
        log.error("[engine] rendezvous = %r: %s", engine.rendezvous, error)
        return TRY_LATER
    return DONE if drained else BROKEN


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
