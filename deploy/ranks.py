"""The trainer as many ranks on this node: ``python -m deploy.ranks RUN/settings.json``."""

import sys
from pathlib import Path

from deploy.child import die_with_parent, log_to_stderr
from deploy.config import read_settings
from deploy.exits import BROKEN, DONE
from trainers.engines._launch import launch_ranks


def main(settings_file: str) -> int:
    """Keep ``engine.processes`` ranks of ``deploy.trainer`` running until they drain; return the exit code."""
    log_to_stderr()
    die_with_parent()
    engine = read_settings(Path(settings_file)).engine
    command = [sys.executable, "-m", "deploy.trainer", settings_file]
    drained = launch_ranks(engine, command)
    return DONE if drained else BROKEN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
