"""What must hold after a soak, whichever faults there were."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from streams.history.history import History
from streams.history.verify import verify
from tests.soak.arriving import body_of
from tests.soak.watching import Sample, trend
from tests.support.daemon import RestartedDaemon, hash_of, wait_for

Result = tuple[str, bool, str]
"""The checked property, whether it holds, and the figures."""


def check_tasks(history: Path, acknowledged: list[dict[str, Any]]) -> Iterator[Result]:
    """Compare the history with the acknowledgements {"id", "round"}; "round" is None if unknown."""
    lost, changed = [], []
    with History.open(history, write=False) as opened:
        rounds = len(opened)
        found = [opened.entry(round).id for round in range(rounds)]
        for said in acknowledged:
            round = opened.find(said["id"])
            if round is None or said["round"] not in (None, round):
                lost.append(said["id"])
            elif opened.payload(round) != body_of(said["id"]):
                changed.append(said["id"])
    duplicated = rounds - len(set(found))
    unknown = set(found) - {said["id"] for said in acknowledged}
    yield "every acknowledged task is there", not lost, f"{len(acknowledged)} acknowledged, lost {len(lost)} {lost[:3]}"
    yield "with the bytes that were sent", not changed, f"changed {len(changed)}"
    yield "each of them once", not duplicated, f"{rounds} rounds, duplicated {duplicated}"
    yield "no other task is there", not unknown, f"not acknowledged {len(unknown)} {sorted(unknown)[:3]}"
    yield "verify is clean", (said := verify(history)).clean, "clean" if said.clean else str(said)


def check_counts(status: dict[str, Any], run: Path) -> Iterator[Result]:
    """Check that the daemon's own numbers add up and that each round was scored once."""
    rounds = status["rounds"]
    whole = rounds["ingested"] == rounds["learned"] + rounds["skipped"] + rounds["pending"]
    figures = ", ".join(f"{name} {rounds[name]}" for name in ("ingested", "learned", "skipped", "pending"))
    yield "ingested = learned + skipped + pending", whole, figures
    scored = [json.loads(line)["round"] for line in (run / "rounds.jsonl").read_text().splitlines()]
    yield "each round is scored once, in order", scored == list(range(rounds["ingested"])), f"{len(scored)} lines"


def check_replay(served: RestartedDaemon, out: Path) -> Iterator[Result]:
    """Check that replaying the rounds without a daemon and without faults gives the same bits."""
    command = [sys.executable, "-m", "online_meta", "replay", str(served.config), "--out", str(out)]
    done = subprocess.run(
        [*command, *served.overrides, "--set", "regret.comparator=[]"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        yield "replay comes to the same SHA-256", False, done.stderr[-500:]
        return
    here, there = served.hash(), hash_of(out / "checkpoints")
    yield "replay comes to the same SHA-256", here == there, f"{here[:16]} and {there[:16]}"


def check_flat(lives: dict[tuple[str, int], list[Sample]]) -> Iterator[Result]:
    """Check that no process grows in memory or open files after its first minute."""
    long = sum(trend(samples) is not None for samples in lives.values())
    yield "processes lived long enough to measure", long > 0, f"{long} of {len(lives)} for 90 s or more"
    for (role, pid), samples in sorted(lives.items()):
        found = trend(samples)
        series = " ".join(f"{sample.mib:.0f}" for sample in samples[:: max(1, len(samples) // 8)])
        files = f"{min(s.files for s in samples)}-{max(s.files for s in samples)} files"
        if found is not None:
            slopes = f"{found.mib_per_minute:+.2f} MiB/min, {found.files_per_minute:+.2f} files/min"
            yield f"{role} {pid} does not grow", found.flat, f"{slopes}; {series} MiB; {files}"


def check_sockets(served: RestartedDaemon) -> Result:
    """Check that the daemon keeps no connection of a client that has gone."""

    def clients() -> list[str]:
        connections = psutil.Process(served.process.pid).net_connections("tcp")
        return [str(one.raddr) for one in connections if one.laddr.port == served.port and one.raddr]

    with suppress(AssertionError):
        wait_for("the clients' connections are closed", lambda: not clients(), 120)
    left = clients()
    return "no connection is left open", not left, f"{len(left)} connections of disconnected clients"


def check_log(said: str) -> Result:
    """Check that the daemon logged no unexpected exception."""
    wrong = [line for line in said.splitlines() if line.startswith("Traceback")]
    last = said[said.rindex("Traceback") :][:600] if wrong else ""
    return "no traceback in the daemon's log", not wrong, f"{len(wrong)} {last}"
