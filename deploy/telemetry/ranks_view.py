"""Read the state of a run's ranks from its files: which ranks run, what each has done, how often they restarted."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.journal.run_files import RunFiles

RANK_COUNTERS = ("steps", "step_seconds", "waiting_seconds")
"""Counters of each rank; they start at 0 when the rank starts."""
RankCounters = dict[str, float]


class RanksView:
    """A view of the files that the coordinator rank and the agent replace; not thread-safe.

    ``restarts`` counts how often the trainer, or the group of its ranks, has restarted since the daemon started.

    Args:
        files: of the run; the present content is stale and is removed.
        count_restarts: returns how often the daemon has restarted the trainer, or the agent of its ranks. The agent's
            own count of restarts starts at 0 each time.
    """

    def __init__(self, files: RunFiles, count_restarts: Callable[[], int]) -> None:
        """Remove the stale files of an earlier daemon."""
        self.restarts = 0
        self._count_restarts = count_restarts
        self._files = files
        self._report: dict[str, Any] = {}
        self._agent_restarts: dict[int, int] = {}
        for file in (files.ranks, files.agent):
            file.unlink(missing_ok=True)

    def refresh(self) -> tuple[int, dict[int, RankCounters]]:
        """Return the number of restarts, and the increase of each rank's counters, since the last call."""
        agent = _read(self._files.agent)
        if agent:
            self._agent_restarts[agent["pid"]] = agent["restarts"]
        before, self.restarts = self.restarts, self._count_restarts() + sum(self._agent_restarts.values())
        old, self._report = self._report, _read(self._files.ranks)
        return self.restarts - before, _difference(old, self._report)

    def world_size(self) -> int:
        """Return the number of running ranks; 0 if a rank is dead, because then all ranks must restart.

        Ranks on other machines count as alive while all ranks on this machine are alive.
        """
        report = self._report
        return (
            report["world_size"]
            if report and all(_is_alive(report["ranks"][rank]["pid"]) for rank in report["near"])
            else 0
        )

    def ranks(self) -> list[dict[str, Any]]:
        """Return the counters of each rank since its start: meta-steps, seconds in them, seconds waiting."""
        return [{key: rank[key] for key in ("rank", "host", *RANK_COUNTERS)} for rank in self._report.get("ranks", [])]


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a file that is always replaced as a whole; {} if it does not exist."""
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    return found


def _difference(old: dict[str, Any], new: dict[str, Any]) -> dict[int, RankCounters]:
    """Return the increase of each rank's counters between two reports; after a restart they start at 0."""
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
