"""The roll of the ranks that play: who they are and how their time goes, gathered by the leading one into a file.

One file and not a port for each rank: ranks come and go, on other machines, too, while the daemon, which reads the file
and is scraped, stays; so there is one address to scrape, and what ranks did is known while they are down.
"""

import contextlib
import dataclasses
import json
import os
import socket
import time

from streams.durable import replace_file
from trainers.desk import Desk
from trainers.run import Run

TELL_SECONDS = 0.5


def must_tell(run: Run, desk: Desk) -> bool:
    """Return whether the ranks have done something since the roll was called, and that is a while ago."""
    return run.round != desk.told[0] and time.monotonic() - desk.told[1] > TELL_SECONDS


def tell_ranks(run: Run) -> None:
    """Write down what each rank has done since it began; all ranks have to call it."""
    own = {"rank": run.crew.rank, "host": socket.gethostname(), "pid": os.getpid(), **dataclasses.asdict(run.timing)}
    ranks = run.crew.gather(own)
    if run.desk is None:
        return
    roll = {"started": run.desk.started, "world_size": run.crew.world, "near": run.crew.near, "ranks": ranks}
    with contextlib.suppress(OSError):  # Who cannot be watched plays on: a full disk is met by what has to be written.
        replace_file(run.files.ranks, json.dumps(roll).encode(), durable=False)
    run.desk.told = (run.round, time.monotonic())
