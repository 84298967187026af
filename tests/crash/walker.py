"""Kill a life at a chosen system call, or let the call fail, and see what is left."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from streams import ledger
from streams.arrivals import Conflict
from streams.history import History
from streams.sealed import RoundThinned
from streams.sealing import tidy
from streams.verify import verify
from tests.crash.scenarios import numbers_in, payload_of, record_of

ROOT = Path(__file__).parents[2]
CALLS = ("pwrite64", "write", "fsync", "fdatasync", "ftruncate", "rename", "unlink", "mkdir", "rmdir", "unlinkat")
"""The system calls that change files; acknowledgements are written by another, ``writev``, and never fail."""
KINDS = ("signal=KILL", "error=EIO", "error=ENOSPC")
PATIENCE = 60.0


class Point(NamedTuple):
    """The ``when``-th ``call`` of a thread of the ``scenario`` meets the fate ``kind``; "7+": and all later ones."""

    scenario: str
    call: str
    kind: str
    when: str


class Walker:
    """Lives that are traced; close it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.errors = open(folder / "errors", "ab")  # noqa: SIM115 - closed in close
        self.zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        self.lives = 0
        self.points: dict[str, list[Point]] = {}

    def close(self) -> None:
        self.zygote.communicate()
        self.errors.close()

    def live(self, scenario: str, *trace: str) -> tuple[Path, int]:
        """Play a scenario under strace with these arguments; return its folder and how it ended."""
        self.lives += 1
        folder = self.folder / f"life-{self.lives}"
        order = {"scenario": scenario, "folder": str(folder), "acknowledged": f"{folder}.acknowledged"}
        self._tell({**order, "stopped": bool(trace)})
        pid = self._hear()["pid"]
        tracer = None
        if trace:
            wait_until(lambda: state_of(pid) in "Tt")
            tracer = subprocess.Popen(["strace", "-f", "-qq", "-p", str(pid), *trace], stderr=subprocess.DEVNULL)
            wait_until(lambda: traced(pid))
            os.kill(pid, signal.SIGCONT)
        status = int(self._hear()["status"])
        if tracer is not None:
            tracer.wait()
        return folder, status

    def _tell(self, order: dict[str, Any]) -> None:
        assert self.zygote.stdin is not None
        self.zygote.stdin.write(json.dumps(order).encode() + b"\n")
        self.zygote.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self.zygote.stdout is not None
        line = self.zygote.stdout.readline()
        assert line, (self.folder / "errors").read_text()
        heard: dict[str, Any] = json.loads(line)
        return heard


def wait_until(true: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


def count_calls(walker: Walker, scenario: str) -> dict[str, int]:
    """Return how often each call is made by the thread that makes it most often, in an unharmed life."""
    log = walker.folder / f"{scenario}.calls"
    folder, status = walker.live(scenario, "-e", f"trace={','.join(CALLS)}", "-o", str(log))
    assert status == 0, (walker.folder / "errors").read_text()
    found = Counter(re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE))
    clean_up(folder)
    return {call: max([0, *(n for (_, name), n in found.items() if name == call)]) for call in CALLS}


def points_of(walker: Walker, scenario: str) -> list[Point]:
    """Return all points of a scenario: every call killed, failing once, and (a full disk) failing for good."""
    if scenario not in walker.points:
        points = walker.points[scenario] = []
        for call, times in count_calls(walker, scenario).items():
            for n in range(1, times + 1):
                points += [Point(scenario, call, kind, str(n)) for kind in KINDS]
                points.append(Point(scenario, call, "error=ENOSPC", f"{n}+"))
    return walker.points[scenario]


def walk(walker: Walker, point: Point) -> dict[str, int]:
    """Let one point happen; compare what is left with what was acknowledged. Returns what was counted."""
    inject = f"inject={point.call}:{point.kind}:when={point.when}"
    folder, status = walker.live(point.scenario, "-e", f"trace={point.call}", "-e", inject, "-o", "/dev/null")
    told = Path(f"{folder}.acknowledged")
    acknowledged = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    threads = point.scenario != "ingest"  # Which of them makes how many calls is not the same each time.
    assert status == -signal.SIGKILL or threads or not point.kind.startswith("signal"), f"{point}: it lived on"
    try:
        check(folder, acknowledged)
    except Exception as error:
        raise AssertionError(f"{point}: {error}") from error
    clean_up(folder)
    return {"acknowledged": len(acknowledged), "harmed": int(status != 0)}


def check(folder: Path, acknowledged: list[dict[str, Any]]) -> None:
    """A next start finds everything that was acknowledged, once, and goes on."""
    if not (folder / ledger.FILE).exists():
        assert not acknowledged, "the history is gone"
    with History.open(folder, write=True) as history:
        rounds = dict(numbers_in(history))
        assert len(set(rounds.values())) == len(rounds), "a task has two rounds"
        for said in acknowledged:
            assert rounds.get(said["round"]) == said["number"], f"{said} was acknowledged, and is lost"
        for round, number in rounds.items():
            same(history, round, number)
        evens = [number for number in rounds.values() if number % 2 == 0]
        assert history.cursor("even") == (str(max(evens)) if evens else None) or not in_order(rounds)
        assert tidy(history) == []
        found = verify(folder)
        assert found.clean, str(found)
        (answer,) = history.append([record_of(1_000_000)])
        assert not isinstance(answer, Conflict)
        assert answer.round == len(rounds)
        same(history, answer.round, 1_000_000)


def in_order(rounds: dict[int, int]) -> bool:
    return list(rounds.values()) == sorted(rounds.values())


def same(history: History, round: int, number: int) -> None:
    try:
        assert history.payload(round) == payload_of(number), f"round {round} is not what was written"
    except RoundThinned:
        assert history.ask("SELECT 1 FROM decisions")


def clean_up(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    Path(f"{folder}.acknowledged").unlink(missing_ok=True)
