"""The log of a run's forks and promotions, next to its history: each is durable before it takes effect."""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from trainers.checkpoint import list_checkpoints
from trainers.journal.jsonl import LineReader, LineWriter
from trainers.journal.run_files import MAIN, RunFiles


class RecordedStage(NamedTuple):
    """The settings of a trainer, as JSON, which hold from round ``first`` on."""

    first: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Fork:
    """A branch of a run: the same rounds, played with other settings from a round on.

    Attributes:
        name: of the fork.
        parent: the branch from which it was made.
        at: first round that is played with the changed settings.
        changes: the changed settings, as SECTION.KEY=VALUE.
        stages: the settings from round 0 on; the last stage is that of the fork, and those before are its parent's.
        timestamp: Unix time in seconds.
    """

    name: str
    parent: str
    at: int
    changes: tuple[str, ...]
    stages: tuple[RecordedStage, ...]
    timestamp: float


class Promotion(NamedTuple):
    """The event that the branch ``name``, which has learned ``round`` rounds, is served instead of ``instead_of``."""

    name: str
    round: int
    instead_of: str
    timestamp: float


class Branches(NamedTuple):
    """The branches of a run.

    Attributes:
        forks: by name.
        promotions: so far, in their order.
        dropped: the forks that are no longer played, by name.
    """

    forks: dict[str, Fork]
    promotions: Sequence[Promotion] = ()
    dropped: Mapping[str, Fork] = MappingProxyType({})

    @property
    def served(self) -> str:
        """The name of the branch that is served."""
        return self.promotions[-1].name if self.promotions else MAIN

    def list_names(self) -> list[str]:
        """Return the names of all branches: of the one with which the run began, and of the forks."""
        return [MAIN, *self.forks]

    def find_fork(self, name: str) -> Fork:
        """Return a fork, which may have been dropped since; raises ``KeyError`` if there never was one."""
        return self.forks.get(name) or self.dropped[name]

    def find_parting(self, one: str, other: str) -> int:
        """Return the first round that two branches play with settings of their own."""
        for mine, theirs in zip_longest(self._list_origins(one), self._list_origins(other)):
            if mine != theirs:
                return min(origin[0] for origin in (mine, theirs) if origin is not None)
        return 0

    def _list_origins(self, name: str) -> list[tuple[int, str]]:
        """Return the branches whose settings a branch plays, each with the first round that it plays with them."""
        if name == MAIN:
            return [(0, MAIN)]
        fork = self.find_fork(name)
        return [*(origin for origin in self._list_origins(fork.parent) if origin[0] < fork.at), (fork.at, name)]

    def promote(self, promotion: Promotion) -> "Branches":
        """Return the branches after a further promotion."""
        return self._replace(promotions=(*self.promotions, promotion))

    def files_of(self, folder: Path, name: str) -> RunFiles:
        """Return the files of a branch of the run in ``folder``."""
        return RunFiles(folder, None if name == MAIN and not self.promotions else name)


def read_branches(folder: Path) -> Branches:
    """Return the branches of the run in ``folder``."""
    forks: dict[str, Fork] = {}
    dropped: dict[str, Fork] = {}
    promotions: list[Promotion] = []
    for line in LineReader(RunFiles(folder).fork_log).lines():
        if line["event"] == "fork":
            stages = tuple(RecordedStage(one["first"], one["settings"]) for one in line["stages"])
            known = {key: line[key] for key in ("name", "parent", "at", "timestamp")}
            forks[line["name"]] = Fork(**known, changes=tuple(line["changes"]), stages=stages)
        elif line["event"] == "promote":
            promotions.append(Promotion(*(line[key] for key in Promotion._fields)))
        elif line["event"] == "drop":
            dropped[line["name"]] = forks.pop(line["name"])
    return Branches(forks, promotions, dropped)


def log_fork(folder: Path, fork: Fork) -> None:
    """Append the event of a new fork, durably."""
    stages = [stage._asdict() for stage in fork.stages]
    _append(folder, {"event": "fork", **asdict(fork), "stages": stages})


def log_promotion(folder: Path, promotion: Promotion) -> None:
    """Append a promotion, durably; it takes effect in a running daemon soon, and at the next start."""
    _append(folder, {"event": "promote", **promotion._asdict()})


def log_drop(folder: Path, name: str) -> None:
    """Append the event that a fork is no longer played, durably."""
    _append(folder, {"event": "drop", "name": name, "timestamp": time.time()})


def _append(folder: Path, line: dict[str, Any]) -> None:
    with closing(LineWriter(RunFiles(folder).fork_log)) as writer:
        writer.append(line)
        writer.sync()


def oldest_checkpoint(folder: Path) -> int:
    """Return the round of the oldest checkpoint of all branches of a run; 0 if a branch has none.

    No branch plays an earlier round again, so that retention may delete what was discarded before. The folder of a fork
    counts from its first moment on, before its event is logged.
    """
    forks = RunFiles(folder).forks
    names = sorted(entry.name for entry in forks.iterdir() if _is_fork(entry)) if forks.is_dir() else []
    branches = [RunFiles(folder), *(RunFiles(folder, name) for name in names)]
    return min(next(iter(list_checkpoints(files.checkpoints)), 0) for files in branches)


def _is_fork(folder: Path) -> bool:
    return folder.is_dir() and not folder.name.startswith(".") and folder.name != MAIN
