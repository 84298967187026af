"""The group of ranks that plays a run, as its files tell: who plays, what each has done, how often all began again."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.journal.run_files import RunFiles

RANK_COUNTERS = ("steps", "step_seconds", "waiting_seconds")
"""What is counted of each rank, from 0 on whenever it begins."""
RankCounters = dict[str, float]


class RanksView:
    """Follows the files that the leading rank and the agent replace; one thread at a time may ``refresh`` it.

    ``restarts`` counts how often the trainer, or all ranks of it, have begun again since the daemon began.
    """

    def __init__(self, files: RunFiles, count_restarts: Callable[[], int]) -> None:
        """Follow ``files``, whose content is stale now; ``count_restarts`` returns the daemon's number of restarts.

        What it restarts is the trainer itself, or the agent of its ranks, whose own count then begins at 0 again.
        """
        self.restarts = 0
        self._count_restarts = count_restarts
        self._files = files
        self._report: dict[str, Any] = {}
        self._agent_restarts: dict[int, int] = {}
        for file in (files.ranks, files.agent):
            file.unlink(missing_ok=True)

    def refresh(self) -> tuple[int, dict[int, RankCounters]]:
        """Return how many restarts there were, and how much each rank has done, since the last time."""
        agent = _read(self._files.agent)
        if agent:
            self._agent_restarts[agent["pid"]] = agent["restarts"]
        before, self.restarts = self.restarts, self._count_restarts() + sum(self._agent_restarts.values())
        old, self._report = self._report, _read(self._files.ranks)
        return self.restarts - before, _difference(old, self._report)

    def world_size(self) -> int:
        """Return how many ranks play now; 0 when one is dead, so that all have to begin again.

        Those on other machines are believed to live while these here do.
        """
        report = self._report
        return (
            report["world_size"]
            if report and all(_is_alive(report["ranks"][rank]["pid"]) for rank in report["near"])
            else 0
        )

    def ranks(self) -> list[dict[str, Any]]:
        """Return what each of the last ranks has done since it began: meta-steps, seconds on them, seconds waiting."""
        return [{key: rank[key] for key in ("rank", "host", *RANK_COUNTERS)} for rank in self._report.get("ranks", [])]


def _read(path: Path) -> dict[str, Any]:
    """Return what a file that is always replaced as a whole holds; nothing while there is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    return found


def _difference(old: dict[str, Any], new: dict[str, Any]) -> dict[int, RankCounters]:
    """Return what each rank has done between two calls of the roll; ranks that began in between began at 0."""
    same = old.get("started") == new.get("started")
    before = {rank["rank"]: rank for rank in old.get("ranks", []) if same}
    return {
        rank["rank"]: {key: rank[key] - before.get(rank["rank"], {}).get(key, 0) for key in RANK_COUNTERS}
        for rank in new.get("ranks", [])
    }


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
