"""The group of ranks that plays a run, as its files tell: who plays, what each has done, how often all began again."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.run_files import RunFiles

AMOUNTS = ("steps", "step_seconds", "waiting_seconds")
"""What is counted of each rank, from 0 on whenever it begins."""
Amounts = dict[str, float]


class GroupView:
    """Follows the files that the leading rank and the agent replace; one thread at a time may ``refresh`` it.

    ``restarts`` counts how often the trainer, or all ranks of it, have begun again since the daemon began.
    """

    def __init__(self, files: RunFiles, supervised: Callable[[], int]) -> None:
        """Follow ``files``, in which nothing is true any more; ``supervised`` says how often the daemon has restarted.

        What it restarts is the trainer itself, or the agent of its ranks, whose own count then begins at 0 again.
        """
        self.restarts = 0
        self._supervised = supervised
        self._files = files
        self._roll: dict[str, Any] = {}
        self._by_agent: dict[int, int] = {}
        for file in (files.ranks, files.agent):
            file.unlink(missing_ok=True)

    def refresh(self) -> tuple[int, dict[int, Amounts]]:
        """Return how many restarts there were, and how much each rank has done, since the last time."""
        agent = _read(self._files.agent)
        if agent:
            self._by_agent[agent["pid"]] = agent["restarts"]
        before, self.restarts = self.restarts, self._supervised() + sum(self._by_agent.values())
        old, self._roll = self._roll, _read(self._files.ranks)
        return self.restarts - before, _since(old, self._roll)

    def world_size(self) -> int:
        """Return how many ranks play now; 0 when one is dead, so that all have to begin again.

        Those on other machines are believed to live while these here do.
        """
        roll = self._roll
        return roll["world_size"] if roll and all(_lives(roll["ranks"][rank]["pid"]) for rank in roll["near"]) else 0

    def ranks(self) -> list[dict[str, Any]]:
        """Return what each of the last ranks has done since it began: meta-steps, seconds on them, seconds waiting."""
        return [{key: rank[key] for key in ("rank", "host", *AMOUNTS)} for rank in self._roll.get("ranks", [])]


def _read(path: Path) -> dict[str, Any]:
    """Return what a file that is always replaced as a whole holds; nothing while there is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    return found


def _since(old: dict[str, Any], new: dict[str, Any]) -> dict[int, Amounts]:
    """Return what each rank has done between two calls of the roll; ranks that began in between began at 0."""
    same = old.get("started") == new.get("started")
    before = {rank["rank"]: rank for rank in old.get("ranks", []) if same}
    return {
        rank["rank"]: {key: rank[key] - before.get(rank["rank"], {}).get(key, 0) for key in AMOUNTS}
        for rank in new.get("ranks", [])
    }


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
