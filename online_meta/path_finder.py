"""Find the best path for the tasks that come, and a better one while the work goes on."""

import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path as Folder

from online_meta.choosing import Choice, Measured, choose, fitting, measure
from online_meta.compiling import Compilation, CompileError, load
from online_meta.paths import HOW, Path, signature_of
from online_meta.registry import nearest
from online_meta.summing import TaskSum
from online_meta.tracing import Program, as_chunk
from online_meta.types import Batch, Meta, Task

PATIENCE_SECONDS = 2.0
MOST_SIGNATURES = 8
"""Tasks of so many shapes are measured; those of further ones go one by one."""
log = logging.getLogger(__name__)


class PathFinder:
    """Measures each signature when it first comes, and compiles in the background what is worth it, one at a time."""

    def __init__(
        self,
        total: TaskSum,
        most: int,
        *,
        how: str = "auto",
        memory_limit: int | None = None,
        folder: Folder | None = None,
        compiles: bool = True,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        """Find paths for ``total``, ``most`` tasks at a time and within ``memory_limit`` bytes.

        A ``how`` of ``HOW`` leaves nothing to find: every signature goes by it. Compiled programs are kept in
        ``folder``; without one nothing is compiled. One that leaves compiling to another process (``compiles`` false)
        takes the programs that appear there. Nothing is measured before ``total`` has taken ``patience`` seconds in
        all: what is over sooner is not worth it. Raises ``ValueError`` for an unknown ``how``.
        """
        if how not in (*HOW, "auto"):
            raise ValueError(f"how = {how!r}: {nearest(how, (*HOW, 'auto'))}")
        self._total, self._how, self._folder, self._compiles = total, how, folder, compiles
        self._most, self._memory_limit, self._patience = most, memory_limit, patience
        self._best: dict[str, Measured] = {}
        self._waiting: deque[Choice] = deque()
        self._compiling: tuple[Choice, Compilation] | None = None

    def find(self, meta: Meta, tasks: Sequence[Task]) -> tuple[Path, ...]:
        """Return the best paths known by now for tasks like these and all before them."""
        if self._how == "auto" and self._total.seconds < self._patience:
            return ()
        for signature, task in {signature_of(task): task for task in reversed(tasks)}.items():
            if signature not in self._best and len(self._best) < MOST_SIGNATURES:
                alike = [one for one in tasks if signature_of(one) == signature] or [task]
                self._meet(meta, [_varied(alike[k % len(alike)], k // len(alike)) for k in range(self._most)])
        self._poll()
        return tuple(best.path for best in self._best.values())

    def knows(self, task: Task) -> bool:
        """Return whether tasks like this have been met."""
        return signature_of(task) in self._best

    def wait(self) -> None:
        """Wait for all that is being compiled."""
        while self._compiling or self._waiting:
            if self._compiling is not None:
                self._compiling[1].wait()
            self._poll()

    def close(self) -> None:
        """Stop what is being compiled."""
        self._waiting.clear()
        if self._compiling is not None:
            self._compiling[1].close()
            self._compiling = None

    def _meet(self, meta: Meta, tasks: list[Task]) -> None:
        if self._how != "auto":
            size = fitting(self._total.gradient, meta, tasks[0], self._most, self._memory_limit)
            path = Path(self._how, max(size, 1), signature_of(tasks[0]))
            self._best[path.signature] = Measured(path, 0.0, 0.0, None)
            return
        choice = choose(self._total.gradient, meta, tasks, self._most, self._memory_limit)
        best = next(way for way in choice.measured if way.path == choice.path)
        self._best[choice.trial.part.signature] = best
        told = ", ".join(f"{way.path.how} {_told(way)}" for way in choice.measured)
        log.info("%d tasks of %s: %s", len(choice.trial.part.tasks), choice.trial.part.signature, told)
        if choice.traced is not None and self._folder is not None:
            self._waiting.append(choice)

    def _poll(self) -> None:
        if self._compiling is not None:
            choice, compilation = self._compiling
            try:
                program = compilation.poll()
            except CompileError as error:
                log.warning("%s; %s goes on", error, choice.path.how)
                self._compiling, program = None, None
            if program is not None:
                self._compiling = None
                self._take(choice, program)
        if self._compiling is None:
            self._start_next()

    def _start_next(self) -> None:
        if not self._waiting or self._folder is None:
            return
        choice = self._waiting[0]
        assert choice.traced is not None
        program = load(self._folder, choice.traced.digest)
        if program is not None:
            self._waiting.popleft()
            self._take(choice, program)
        elif self._compiles:
            self._waiting.popleft()
            self._compiling = choice, Compilation(choice.traced, self._folder)

    def _take(self, choice: Choice, program: Program) -> None:
        """Let a compiled program take over, if it is right and faster than what there is."""
        assert choice.traced is not None
        signature = choice.trial.part.signature
        path = Path("compiled", choice.path.tasks, signature, choice.traced.digest)
        found = measure(choice.trial, path, as_chunk(program))
        log.info("compiled: %s, instead of %s %s", _told(found), choice.path.how, _told(self._best[signature]))
        if found.refused is None and found.seconds < self._best[signature].seconds:
            self._total.add_program(path, program)
            self._best[signature] = found


def _varied(task: Task, k: int) -> Task:
    """Return a task that differs from ``task`` for k > 0: among equal ones, an error in telling them apart hides."""

    def vary(batch: Batch) -> Batch:
        x = batch.x.roll(k, 0)
        return Batch(x * (1 + k / 64) if x.is_floating_point() else x, batch.y)

    return Task(vary(task.support), vary(task.query)) if k else task


def _told(way: Measured) -> str:
    return f"is out: {way.refused}" if way.refused else f"{way.seconds * 1e3:.2f} ms"
