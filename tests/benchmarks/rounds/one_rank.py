"""Time the rounds of one rank: ``one_rank.py HISTORY FOLDER BATCH ROUNDS TURNS``; rank 0 prints what one takes."""

import json
import os
import sys
from pathlib import Path

from tests.benchmarks.ranks import MARK
from tests.benchmarks.rounds.parts import ALONE, GAMES
from tests.benchmarks.rounds.players import OurPlayer, read_settings
from trainers.distributed.process_group import join_process_group

WAIT = 600.0
"""Seconds that ranks wait for one that compiles."""


def main(history: Path, folder: Path, batch: int, rounds: int, turns: int) -> None:
    """Join the other ranks on a core of its own, and print the seconds of a round in each turn."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    engine = ("engine.kind='deepspeed'", f"engine.processes={world}", f"engine.timeout_seconds={WAIT}")
    settings = read_settings((*GAMES["k5"], *ALONE, *engine, f"meta.batch={batch}"))
    with (
        join_process_group(settings.engine) as rank_group,
        OurPlayer(settings, history, folder, rank_group) as player,
    ):
        player.warm_up()
        found = [player.turn(rounds) for _ in range(turns)]
        if rank == 0:
            print(MARK, json.dumps(found), flush=True)
        rank_group.broadcast(None)  # Ranks end together.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
