"""Kill a life at a chosen system call, or let the call fail, and check what is left."""

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
"""The system calls that change files. Acknowledgements use another call, ``writev``, which never fails."""
KINDS = ("signal=KILL", "error=EIO", "error=ENOSPC")
TIMEOUT_SECONDS = 200.0


class Point(NamedTuple):
    """At the ``when``-th ``call`` of a thread of ``scenario``, inject ``kind``; "7+" means at every call from the 7th.

    With ``first``, the call belongs to the next start after the point ``first`` of the same scenario.
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
    """Parse a point from its text."""
    scenario, *faults = said.split("/")
    point = None
    for fault in faults:
        call, kind, when = fault.split(":")
        point = Point(scenario, call, kind, when, point)
    if point is None or len(faults) > 2:
        raise ValueError(
            f"{said!r} is not a point; write scenario/call:kind:when, and append /call:kind:when for a second fault"
        )
    return point


class Start(NamedTuple):
    """How a life starts: which part runs, and the folder left by the part before (None: an empty one)."""

    part: str
    folder: Path | None


Starts = dict[tuple[str, Point | None], Start]
"""The starts by scenario and first fault."""


class Walker:
    """Runs lives under strace. Must be closed."""

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
        """Run a scenario, or only the part that begins at ``start``, under strace with the arguments ``trace``.

        Returns its folder and exit status.
        """
        self.lives += 1
        folder = self.folder / f"life-{self.lives}"
        parts = ["prepare", "play"] if find_life(scenario).prepare else ["play"]
        if start is not None:
            parts = [start.part]
            if start.folder is not None:
                copy_life(start.folder, folder)
        order = {"scenario": scenario, "folder": str(folder), "acknowledged": str(acknowledged_file(folder))}
        self._send({**order, "parts": parts, "stopped": bool(trace)})
        pid = self._receive()["pid"]
        tracer = None
        if trace:
            wait_until(lambda: state_of(pid) in "Tt")
            tracer = subprocess.Popen(["strace", "-f", "-qq", "-p", str(pid), *trace], stderr=self.errors)
            wait_until(lambda: tracer.poll() is not None or traced(pid))
            if tracer.poll() is not None:
                os.kill(pid, signal.SIGKILL)
                raise RuntimeError(f"strace ended: {(self.folder / 'errors').read_text()[-500:]}")
            os.kill(pid, signal.SIGCONT)
        status = int(self._receive()["status"])
        if tracer is not None:
            tracer.wait()
        return folder, status

    def start_of(self, scenario: str, first: Point | None = None) -> Start:
        """Return where the faults of a scenario begin: after its preparation, or after a ``first`` fault."""
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
        """Inject a point; return the folder that it left and the exit status of the process."""
        inject = f"inject={point.call}:{point.kind}:when={point.when}"
        start = self.start_of(point.scenario, point.first)
        return self.live(point.scenario, "-e", f"trace={point.call}", "-e", inject, "-o", "/dev/null", start=start)

    def _send(self, order: dict[str, Any]) -> None:
        assert self.zygote.stdin is not None
        self.zygote.stdin.write(json.dumps(order).encode() + b"\n")
        self.zygote.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self.zygote.stdout is not None
        line = self.zygote.stdout.readline()
        assert line, (self.folder / "errors").read_text()
        message: dict[str, Any] = json.loads(line)
        return message


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


def count_calls(walker: Walker, scenario: str, first: Point | None = None) -> dict[str, int]:
    """Return for each call how often the thread that makes it most often makes it, in a life without faults."""
    log = walker.folder / f"{scenario}.calls"
    start = walker.start_of(scenario, first)
    folder, status = walker.live(scenario, "-e", f"trace={','.join(CALLS)}", "-o", str(log), start=start)
    assert status == 0, f"{first or scenario}: the next start fails: {(walker.folder / 'errors').read_text()[-2000:]}"
    found = Counter(re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE))
    clean_up(folder)
    return {call: max([0, *(n for (_, name), n in found.items() if name == call)]) for call in CALLS}


def points_of(walker: Walker, scenario: str, first: Point | None = None) -> list[Point]:
    """Return all points of a scenario: a kill at every call, one failure, and a permanent failure (a full disk).

    With ``first``, the points are those of the next start after it.
    """
    if (scenario, first) not in walker.points:
        points = walker.points[scenario, first] = []
        for call, times in count_calls(walker, scenario, first).items():
            for n in range(1, times + 1):
                points += [Point(scenario, call, kind, str(n), first) for kind in KINDS]
                points.append(Point(scenario, call, "error=ENOSPC", f"{n}+", first))
    return walker.points[scenario, first]


def walk(walker: Walker, point: Point) -> dict[str, int]:
    """Inject one point and compare what is left with what was acknowledged; return the counts."""
    folder, status = walker.harm(point)
    file = acknowledged_file(folder)
    acknowledged = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    exact = point.scenario == "ingest" and point.first is None  # elsewhere, the split among threads varies
    assert status == -signal.SIGKILL or not exact or not point.kind.startswith("signal"), (
        f"{point}: it survived the kill"
    )
    counted = {"acknowledged": len(acknowledged), "harmed": int(status != 0)}
    try:
        check_once_unlocked(find_life(point.scenario), folder, acknowledged)
    except Exception as error:
        raise AssertionError(f"{point}: {type(error).__name__}: {error}") from error
    clean_up(folder)
    return counted


def check_once_unlocked(life: Life, folder: Path, acknowledged: list[dict[str, Any]]) -> None:
    """Check what is left. Another walker's fork holds a copy of the lock until it has executed strace; wait for it."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        try:
            return life.check(folder, acknowledged)
        except HistoryBusy:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def acknowledged_file(folder: Path) -> Path:
    """Return the file of a life's acknowledgements."""
    return Path(f"{folder}.acknowledged")


def copy_life(left: Path, folder: Path) -> None:
    """Copy what another life left. Shared memory is omitted, because it does not survive its processes."""
    if left.exists():
        shutil.copytree(left, folder, ignore=shutil.ignore_patterns("*-shm"))
    if acknowledged_file(left).exists():
        shutil.copy(acknowledged_file(left), acknowledged_file(folder))


def clean_up(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    acknowledged_file(folder).unlink(missing_ok=True)
