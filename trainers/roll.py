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
from trainers.desk import RunJournal
from trainers.run import Run

REPORT_SECONDS = 0.5


def should_report(run: Run, journal: RunJournal) -> bool:
    """Return whether the ranks have done something since the roll was called, and that is a while ago."""
    return run.round != journal.last_reported[0] and time.monotonic() - journal.last_reported[1] > REPORT_SECONDS


def report_ranks(run: Run) -> None:
    """Write down what each rank has done since it began; all ranks have to call it."""
    own = {
        "rank": run.rank_group.rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        **dataclasses.asdict(run.rank_stats),
    }
    ranks = run.rank_group.gather(own)
    if run.journal is None:
        return
    report = {
        "started": run.journal.started,
        "world_size": run.rank_group.world,
        "near": run.rank_group.with_storage,
        "ranks": ranks,
    }
    with contextlib.suppress(OSError):  # Who cannot be watched plays on: a full disk is met by what has to be written.
        replace_file(run.files.ranks, json.dumps(report).encode(), durable=False)
    run.journal.last_reported = (run.round, time.monotonic())
