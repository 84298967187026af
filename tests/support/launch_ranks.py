"""Ranks of ``rank_program`` as processes on loopback, without an agent."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from trainers.distributed.rendezvous import STORE_VARIABLE

ROOT = Path(__file__).parents[2]


def places(world: int) -> list[dict[str, str]]:
    """Return the environment variables that the agent would set for each of ``world`` ranks on this machine."""
    shared = {"WORLD_SIZE": str(world), STORE_VARIABLE: f"file:{Path(tempfile.mkdtemp(prefix='ranks-')) / 'store'}"}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def start_ranks(what: str, folder: Path, world: int, **environment: str) -> list["subprocess.Popen[bytes]"]:
    """Start ``world`` ranks; their output goes to FOLDER/rank-<n>.log."""
    ranks = []
    for rank, place in enumerate(places(world)):
        with (folder / f"rank-{rank}.log").open("wb") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.engines.rank_program", what, str(folder)],
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), **place, **environment},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return ranks


def run_ranks(what: str, folder: Path, world: int, **environment: str) -> None:
    """Run ``world`` ranks to their end; raise ``AssertionError`` with the log of a failed one."""
    ranks = start_ranks(what, folder, world, **environment)
    try:
        codes = [rank.wait(500) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for number, code in enumerate(codes):
        assert code == 0, (folder / f"rank-{number}.log").read_text()
