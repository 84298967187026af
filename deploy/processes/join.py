"""Run trainer ranks on a machine without the daemon: ``python -m deploy.processes.join CONFIG.toml``."""

import logging
import os
import sys
from pathlib import Path
from threading import Event

from torch.distributed import DistError

from deploy.checks.preflight import check_engine
from deploy.config.config import Config, read_config
from deploy.exits import CONFIG, DONE, TRY_LATER, CommandError, ConfigError
from deploy.logs import Origin, log_to_stderr
from deploy.processes.child import die_with_parent
from deploy.processes.trainer import broadcast_settings, play_run
from streams.private_files import PRIVATE_UMASK
from trainers.distributed.elastic import join_ranks
from trainers.distributed.process_group import join_process_group, read_own_rank
from trainers.journal.divergence import Diverged
from trainers.journal.heartbeat import HeartbeatWriter
from trainers.journal.run_files import RunFiles

log = logging.getLogger(__name__)


def main(config_file: str) -> int:
    """Run the ranks of this machine for the daemon at ``engine.rendezvous`` until it drains; return the exit code.

    This process starts itself again as each of the ranks. From the configuration, only [engine], run.logs and run.path
    (where compiled programs are stored) are used. The daemon's machine provides all other settings and every task.
    """
    rank = read_own_rank()
    origin = Origin("agent") if rank is None else Origin("trainer", rank, plays=True)
    try:
        config = read_config(Path(config_file))
        check_engine(config)
        if config.engine.nodes[1] == 1:
            raise ConfigError(f"[engine] nodes = {[*config.engine.nodes]}: the run has one machine, the daemon's own")
    except CommandError as error:
        sys.stderr.write(f"{error}\n")
        return error.code
    log_to_stderr(origin, config.run.logs)
    os.umask(PRIVATE_UMASK)
    return _join(config, config_file) if rank is None else _play(config, config_file, origin)


def _join(config: Config, config_file: str) -> int:
    """Start the ranks of this machine, and restart them when the machines change."""
    command = [sys.executable, "-m", "deploy.processes.join", config_file]
    try:
        return DONE if join_ranks(config.engine, command, RunFiles(Path(config.run.path)).rendezvous) else TRY_LATER
    except DistError as error:
        log.error("no daemon hosts the rendezvous at %s (any more): %s", config.engine.rendezvous, error)
        return TRY_LATER


def _play(config: Config, config_file: str, origin: Origin) -> int:
    """Play the run as one rank."""
    die_with_parent()
    try:
        with join_process_group(config.engine, has_storage=False) as rank_group:
            play_run(
                [(broadcast_settings(rank_group, None), None)],
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
        sys.exit("usage: python -m deploy.processes.join CONFIG.toml")
    status = main(sys.argv[1])
    logging.shutdown()
    os._exit(status)  # With a normal exit, threads of the process group may abort the process.
