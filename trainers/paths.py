"""From which round on which path summed each learner's meta-gradients, written down before it is gone by."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path as File
from typing import Any

from online_meta.path_finder import PATIENCE_SECONDS, PathFinder
from online_meta.paths import Path, signature_of
from online_meta.types import Learner, Task
from trainers.json_lines import LineReader, LineWriter
from trainers.settings import EngineSettings

Paths = dict[str, tuple[Path, ...]]
"""The paths of each learner that sums meta-gradients, by its name."""


class PathBook:
    """The paths of a run in a file beside the history; a change is durable before the round that it begins with.

    A history that is played again by other ``settings`` has nothing to do with what was written for these.
    """

    def __init__(self, path: File, settings: str, planned: int) -> None:
        """Open the book at ``path``; creates it if need be. Rounds below ``planned`` are in the book of plans.

        ``settings`` is their fingerprint.
        """
        self._writer = LineWriter(path)
        self._settings = settings
        lines = [line for line in LineReader(path).refresh() if line["settings"] == self._settings]
        self._changes = [(line["round"], read_paths(line["paths"])) for line in lines]
        # Plans that were there before the first line under these settings were made under others.
        self._bound = range(lines[0]["free"] if lines else planned, planned)
        if not lines:
            self._changes.append((0, {}))
            self._write(0, {}, free=planned)

    def binds(self, round: int) -> bool:
        """Return whether a round was planned under these settings: it is played by the paths in the book."""
        return round in self._bound

    def at(self, round: int) -> Paths:
        """Return the paths of ``round``: those of the last change written for it or a round before."""
        return next((paths for first, paths in reversed(self._changes) if first <= round), {})

    def change(self, round: int, paths: Paths) -> None:
        """Go by ``paths`` from ``round`` on, whatever was written for later rounds that were never played."""
        if self.at(round) == paths and all(first <= round for first, _ in self._changes):
            return
        self._changes.append((round, dict(paths)))
        self._write(round, paths)

    def _write(self, round: int, paths: Paths, **more: int) -> None:
        self._writer.append({"round": round, "settings": self._settings, "paths": told_paths(paths), **more})
        self._writer.sync()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def told_paths(paths: Paths) -> dict[str, list[list[Any]]]:
    """Return paths as JSON has them."""
    return {name: [list(path) for path in found] for name, found in paths.items()}


def read_paths(paths: Mapping[str, list[list[Any]]]) -> Paths:
    """Return paths that ``told_paths`` told."""
    return {name: tuple(Path(*path) for path in found) for name, found in paths.items()}


class Steering:
    """Lets every learner that sums meta-gradients go by the paths in the book, and looks for better ones."""

    def __init__(
        self,
        learners: Mapping[str, Learner],
        settings: EngineSettings,
        batch: int,
        programs: File,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        """Steer those of ``learners`` that have a ``total``; nothing is looked for before ``patience`` seconds."""
        self._learners: dict[str, Any] = {n: learner for n, learner in learners.items() if hasattr(learner, "total")}
        make = partial(PathFinder, how=settings.how, memory_limit=settings.memory_limit, folder=programs)
        self._finders = {n: make(learner.total, batch, patience=patience) for n, learner in self._learners.items()}

    def find(self, known: Paths, tasks: list[Task]) -> Paths:
        """Return the paths in ``known``, with better and new ones where there are any by now for tasks like these."""
        found: Paths = {}
        for name, finder in self._finders.items():
            by_signature = {path.signature: path for path in known.get(name, ())}
            settled = {path.signature for path in by_signature.values() if path.how == "compiled"}
            new = [task for task in tasks if signature_of(task) not in settled]
            by_signature |= {path.signature: path for path in finder.find(self._learners[name].engine.meta(), new)}
            if by_signature:
                found[name] = tuple(by_signature.values())
        return found

    def follow(self, paths: Paths) -> None:
        """Let the learners go by ``paths``."""
        for name, learner in self._learners.items():
            learner.total.follow(paths.get(name, ()))

    def wait(self) -> None:
        """Wait for all that is being compiled."""
        for finder in self._finders.values():
            finder.wait()

    def close(self) -> None:
        """Stop what is being compiled."""
        for finder in self._finders.values():
            finder.close()
