"""Run a daemon on a full disk, then free space. test_disk_full.py runs this in its own mount namespace.

Usage: ``python fill_disk.py CONFIG``. The run's folder is a disk of a few MB.
"""

import errno
import os
import sys
from pathlib import Path

import httpx
import torch

from deploy.commands.replay import replay
from deploy.config.config import read_config
from streams.formats import wire
from streams.history.verify import verify
from streams.sources.sinusoid import make_task
from tests.support.daemon import Daemon, running_daemon, wait_for
from trainers.checkpoint import load_latest

SETS = ("regret.comparator=[]", "serve.limits={ backlog = 10000 }", "checkpoint.every_rounds=2")
SAMPLES = 4000


def send(daemon: Daemon, t: int) -> httpx.Response:
    return daemon.post(wire.encode(make_task(0, t, SAMPLES, 5)), f"t-{t}")


def send_until_full(daemon: Daemon, first: int) -> int:
    """Send tasks until one is refused for lack of space; return the total number acknowledged."""
    for t in range(first, first + 1000):
        answer = send(daemon, t)
        if answer.status_code == 507:
            assert answer.json()["reason"] == "disk_full", answer.text
            assert "free some space" in answer.json()["detail"], answer.text
            return t
        assert (answer.status_code, answer.json()["round"]) == (201, t), answer.text
    raise AssertionError("the disk never filled up")


def fill(file: Path) -> None:
    """Write until the disk has no free byte."""
    with open(file, "wb", buffering=0) as filler:
        for size in (65536, 512, 1):
            try:
                while True:
                    filler.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def run_until_full_and_recover(config: Path, run: Path) -> None:
    ballast = run / "ballast"
    ballast.write_bytes(bytes(2_000_000))
    with running_daemon(config, *SETS) as daemon:
        daemon.child("trainer").suspend()
        kept = send_until_full(daemon, 0)
        assert kept > 10
        assert send(daemon, kept).status_code == 507
        assert daemon.client.get("/healthz").is_success
        assert daemon.status()["rounds"]["ingested"] == kept
        assert send(daemon, 0).status_code == 200
        fill(run / "filler")
        assert daemon.post(bytes(100_000), "no-task").status_code == 422, "there is no room for a dead letter"
        daemon.child("trainer").resume()
        wait_for(
            "the full disk killed the trainer and it restarts", lambda: daemon.status()["trainer"]["restarts"] >= 1
        )
        wait_for("the daemon reports it", lambda: daemon.client.get("/readyz").status_code == 503)
        assert daemon.client.get("/metrics").is_success
        assert daemon.drain() == 75, "there was no room for the report"
    log = daemon.log.read_text()
    assert "error: drained, but " in log
    assert "rejected tasks cannot be kept" in log
    assert "Traceback" not in log, log
    for file in (ballast, run / "filler"):
        file.unlink()
    with running_daemon(config, *SETS) as daemon:
        assert daemon.status()["rounds"]["ingested"] == kept
        assert [send(daemon, t).status_code for t in (kept, kept + 1)] == [201, 201]
        daemon.wait_until_learned(kept + 2)
        fates = [daemon.client.get(f"/v1/tasks/t-{t}").json() for t in range(kept + 2)]
        assert [(fate["round"], fate["status"]) for fate in fates] == [(t, "learned") for t in range(kept + 2)]
        assert daemon.drain() == 0
    assert verify(run / "history").clean


def compare(config: Path, run: Path, out: Path) -> None:
    """Replay the same rounds on a disk with room: the parameters must be bit-identical."""
    replay(read_config(config, SETS), run / "history", out, None, lambda *_: None)
    here, there = load_latest(run / "checkpoints"), load_latest(out / "checkpoints")
    assert here is not None
    assert there is not None
    assert here.rounds == there.rounds
    for name, learner in here.learners.items():
        assert learner.keys() == there.learners[name].keys()
        assert all(torch.equal(tensor, there.learners[name][key]) for key, tensor in learner.items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = Path(sys.argv[1])
    folder = Path(read_config(given).run.path)
    assert os.path.ismount(folder)
    run_until_full_and_recover(given, folder)
    compare(given, folder, given.parent / "replayed")
    print("ok")
