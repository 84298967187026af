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

from streams.history.errors import HistoryBusy
from tests.crash.lives import Life, find_life

ROOT = Path(__file__).parents[2]
CALLS = ("pwrite64", "write", "fsync", "fdatasync", "ftruncate", "rename", "unlink", "mkdir", "rmdir", "unlinkat")
"""The system calls that change files; acknowledgements are written by another, ``writev``, and never fail."""
KINDS = ("signal=KILL", "error=EIO", "error=ENOSPC")
PATIENCE = 200.0


class Point(NamedTuple):
    """The ``when``-th ``call`` of a thread of the ``scenario`` meets the fate ``kind``; "7+": and all later ones.

    With ``first`` it is a call of the next start, after that other point of the same scenario.
    """

    scenario: str
    call: str
    kind: str
    when: str
    first: "Point | None" = None

    def __str__(self) -> str:
        own = f"{self.call}:{self.kind}:{self.when}"
        return f"{self.scenario}/{own}" if self.first is None else f"{self.first}/{own}"


def read_point(said: str) -> Point:
    """Return the point that is written so."""
    scenario, *faults = said.split("/")
    point = None
    for fault in faults:
        call, kind, when = fault.split(":")
        point = Point(scenario, call, kind, when, point)
    if point is None or len(faults) > 2:
        raise ValueError(f"{said!r} is no point; one is scenario/call:kind:when, and the second fault likewise")
    return point


class Start(NamedTuple):
    """What a part of a life finds: which part it is, and what the one before left (None: nothing)."""

    part: str
    folder: Path | None


Starts = dict[tuple[str, Point | None], Start]
"""By scenario and first fault."""


class Walker:
    """Lives that are traced; close it."""

    def __init__(self, folder: Path, starts: Starts | None = None) -> None:
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
        self.points: dict[tuple[str, Point | None], list[Point]] = {}
        self.starts: Starts = {} if starts is None else starts

    def close(self) -> None:
        self.zygote.communicate()
        self.errors.close()

    def live(self, scenario: str, *trace: str, start: Start | None = None) -> tuple[Path, int]:
        """Play a scenario, all of it or what begins at ``start``, under strace with these arguments.

        Returns its folder and how it ended.
        """
        self.lives += 1
        folder = self.folder / f"life-{self.lives}"
        parts = ["prepare", "play"] if find_life(scenario).prepare else ["play"]
        if start is not None:
            parts = [start.part]
            if start.folder is not None:
                copy_life(start.folder, folder)
        order = {"scenario": scenario, "folder": str(folder), "acknowledged": str(told_in(folder))}
        self._tell({**order, "parts": parts, "stopped": bool(trace)})
        pid = self._hear()["pid"]
        tracer = None
        if trace:
            wait_until(lambda: state_of(pid) in "Tt")
            tracer = subprocess.Popen(["strace", "-f", "-qq", "-p", str(pid), *trace], stderr=self.errors)
            wait_until(lambda: tracer.poll() is not None or traced(pid))
            if tracer.poll() is not None:
                os.kill(pid, signal.SIGKILL)
                raise RuntimeError(f"strace ended: {(self.folder / 'errors').read_text()[-500:]}")
            os.kill(pid, signal.SIGCONT)
        status = int(self._hear()["status"])
        if tracer is not None:
            tracer.wait()
        return folder, status

    def start_of(self, scenario: str, first: Point | None = None) -> Start:
        """Return where a scenario begins to be harmed: after what prepares it, or after a ``first`` fault."""
        if (scenario, first) not in self.starts:
            if first is not None:
                start = Start("again", self.harm(first)[0])
            elif find_life(scenario).prepare is None:
                start = Start("play", None)
            else:
                folder, status = self.live(scenario, start=Start("prepare", None))
                assert status == 0, (self.folder / "errors").read_text()
                start = Start("play", folder)
            self.starts[scenario, first] = start
        return self.starts[scenario, first]

    def harm(self, point: Point) -> tuple[Path, int]:
        """Let a point happen; return the folder that it left and how the process ended."""
        inject = f"inject={point.call}:{point.kind}:when={point.when}"
        start = self.start_of(point.scenario, point.first)
        return self.live(point.scenario, "-e", f"trace={point.call}", "-e", inject, "-o", "/dev/null", start=start)

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


def count_calls(walker: Walker, scenario: str, first: Point | None = None) -> dict[str, int]:
    """Return how often each call is made by the thread that makes it most often, in an unharmed life."""
    log = walker.folder / f"{scenario}.calls"
    start = walker.start_of(scenario, first)
    folder, status = walker.live(scenario, "-e", f"trace={','.join(CALLS)}", "-o", str(log), start=start)
    assert status == 0, f"{first or scenario}: the next start fails: {(walker.folder / 'errors').read_text()[-2000:]}"
    found = Counter(re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE))
    clean_up(folder)
    return {call: max([0, *(n for (_, name), n in found.items() if name == call)]) for call in CALLS}


def points_of(walker: Walker, scenario: str, first: Point | None = None) -> list[Point]:
    """Return all points of a scenario: every call killed, failing once, and (a full disk) failing for good.

    With ``first`` they are those of the next start after it.
    """
    if (scenario, first) not in walker.points:
        points = walker.points[scenario, first] = []
        for call, times in count_calls(walker, scenario, first).items():
            for n in range(1, times + 1):
                points += [Point(scenario, call, kind, str(n), first) for kind in KINDS]
                points.append(Point(scenario, call, "error=ENOSPC", f"{n}+", first))
    return walker.points[scenario, first]


def walk(walker: Walker, point: Point) -> dict[str, int]:
    """Let one point happen; compare what is left with what was acknowledged. Returns what was counted."""
    folder, status = walker.harm(point)
    told = told_in(folder)
    acknowledged = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    exact = point.scenario == "ingest" and point.first is None  # Elsewhere threads share the calls in different ways.
    assert status == -signal.SIGKILL or not exact or not point.kind.startswith("signal"), f"{point}: it lived on"
    counted = {"acknowledged": len(acknowledged), "harmed": int(status != 0)}
    try:
        check_patiently(find_life(point.scenario), folder, acknowledged)
    except Exception as error:
        raise AssertionError(f"{point}: {type(error).__name__}: {error}") from error
    clean_up(folder)
    return counted


def check_patiently(life: Life, folder: Path, acknowledged: list[dict[str, Any]]) -> None:
    """Check what is left; a process that another walker forks holds a copy of the lock until it has become strace."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return life.check(folder, acknowledged)
        except HistoryBusy:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def told_in(folder: Path) -> Path:
    """Return the file that says what was acknowledged in a life."""
    return Path(f"{folder}.acknowledged")


def copy_life(left: Path, folder: Path) -> None:
    """Let a life begin with what another left; shared memory is gone with its processes."""
    if left.exists():
        shutil.copytree(left, folder, ignore=shutil.ignore_patterns("*-shm"))
    if told_in(left).exists():
        shutil.copy(told_in(left), told_in(folder))


def clean_up(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    told_in(folder).unlink(missing_ok=True)
