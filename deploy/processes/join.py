"""Run trainer ranks on a machine without the daemon: ``torchrun ... -m deploy.processes.join CONFIG.toml``."""

import logging
import os
import sys
from pathlib import Path
from threading import Event

from deploy.config.config import read_config
from deploy.exits import CONFIG, DONE, CommandError
from deploy.logs import Origin, log_to_stderr
from deploy.processes.child import die_with_parent
from deploy.processes.trainer import broadcast_settings, play_run
from streams.private_files import PRIVATE_UMASK
from trainers.distributed.process_group import join_process_group, read_own_rank
from trainers.journal.divergence import Diverged
from trainers.journal.heartbeat import HeartbeatWriter
from trainers.journal.run_files import RunFiles

log = logging.getLogger(__name__)


def main(config_file: str) -> int:
    """Play the run of the daemon at ``engine.rendezvous`` until the daemon drains; return the exit code.

    From the configuration, only [engine], run.logs and run.path (where compiled programs are stored) are used. The
    daemon's machine provides all other settings and every task.
    """
    try:
        config = read_config(Path(config_file))
    except CommandError as error:
        sys.stderr.write(f"{error}\n")
        return error.code
    origin = Origin("trainer", read_own_rank(), plays=True)
    log_to_stderr(origin, config.run.logs)
    os.umask(PRIVATE_UMASK)
    die_with_parent()
    try:
        with join_process_group(config.engine, has_storage=False) as rank_group:
            play_run(
                broadcast_settings(rank_group, None),
                RunFiles(Path(config.run.path)),
                None,
                rank_group,
                Event(),
                origin,
                HeartbeatWriter(None),
            )
            return DONE
    except Diverged:  # The daemon's machine logs the error.
        return DONE
    except CommandError as error:
        log.error("%s", error)
        return error.code
    except ValueError as error:
        log.error("%s: %s", config_file, error)
        return CONFIG


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: torchrun [...] -m deploy.processes.join CONFIG.toml")
    status = main(sys.argv[1])
    logging.shutdown()
    os._exit(status)  # With a normal exit, threads of the process group may abort the process.
